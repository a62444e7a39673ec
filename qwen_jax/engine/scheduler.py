"""Which rows go into the next step, and whose pages they write to.

Knows tokens by number, pages and slots; knows no logits, no text and no array. Rows that came first
go first. A step is one of two kinds:

    ragged    every row that is running brings something: its newest token, or a chunk of what the
              device has not seen of it: a prompt, forced tokens, a text to be resumed
    stretch   all rows only decode: several steps without the host

Steps are planned before the one before has come back, so a plan counts on no row's ending early:
a row that did was in one step too many, and what that brought is dropped. When pages run out,
first the steps on their way are awaited, then the row that came last gives its pages up; it
is computed again, which changes none of its tokens.
"""

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from qwen_jax.engine.pages import PagePool
from qwen_jax.engine.row import Row

MOST_STEPS = 64  # of a stretch: the size of the output buffers
_STOP_STEPS = 16  # where a stop string may end a row earlier
_CROWDED_STEPS = 8  # where somebody waits for a row to end
_ROUND_TRIP = 0.03  # seconds of a stretch, about: how late a new request or a stop is seen
_LOOK = 1024  # waiting rows that are looked at, of maybe millions: those of one request, at least
_SLOW_START = 4  # a row's first tokens come one by one, then a quarter of what it has at once


@dataclasses.dataclass
class Part:
    """A row's share of a step.

    Attributes:
        row: whose.
        start: position of its first token, where ``known``.
        take: tokens it brings; in a stretch, new tokens that it will get if nothing ends it.
        known: whether the host gives the tokens; else it is the newest one, on the device.
        chooses: whether it gets a new token.
    """

    row: Row
    start: int
    take: int
    known: bool
    chooses: bool


@dataclasses.dataclass
class Step:
    """What the device does next; ``steps`` 0 is a ragged step."""

    parts: list[Part]
    steps: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens that the host gives."""
        return sum(part.take for part in self.parts if part.known)

    @property
    def constrained(self) -> bool:
        """Whether a row's mask is needed before it chooses."""
        return any(part.chooses and part.row.constraint is not None for part in self.parts)


class Scheduler:
    """Plans steps.

    Args:
        pool: the pages.
        page_size: positions of a page.
        max_rows: slots.
        max_tokens: of a ragged step, of which each decoding row takes one.
        grow: makes the pool larger, if it can: called with the pages that are wanted in all.
        seated: called with every row that gets a slot.

    Attributes:
        waiting, running: rows, those that came first at the front.
        step_seconds: what a decode step takes, for the length of a stretch.
        preemptions: rows that gave up their pages so far.
        hit_tokens: prompt tokens that were found in the cache so far.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        max_rows: int,
        max_tokens: int,
        grow: Callable[[int], bool],
        seated: Callable[[Row], None],
    ):
        self.pool, self._page_size = pool, page_size
        self._max_tokens = max_tokens
        self._grow, self._seated = grow, seated
        self._slots = list(reversed(range(max_rows)))
        self.waiting: collections.deque[Row] = collections.deque()
        self.running: list[Row] = []
        self.step_seconds = _ROUND_TRIP
        self.preemptions = self.hit_tokens = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Rows of a new request."""
        self.waiting.extend(rows)

    def remove(self, row: Row, *, spoiled: bool = False) -> None:
        """Takes out a row that has ended; its pages are free at once.

        spoiled: what is in them is wrong, and nobody may share it.
        """
        if row.slot is None:
            self.waiting.remove(row)
            return
        self.running.remove(row)
        if spoiled:
            self.pool.forget(row.pages)
        else:
            row.register(self.pool, self._page_size)
        self._free(row)

    def preempt(self, row: Row) -> None:
        """Takes a row's pages; it waits, in front of all others, to be computed again."""
        self.running.remove(row)
        self._free(row)
        self.waiting.appendleft(row)
        self.preemptions += 1

    def plan(self, *, in_flight: bool) -> Step | None:
        """The next step, counted as done; None where there is nothing to do for now.

        in_flight: whether steps are on their way: then no row is preempted, and None means that
        one of them must come back first.
        """
        self._admit()
        while True:
            active = [row for row in self.running if not row.on_device or row.left > 0]
            step = self._cut(active)
            if step is None or self._reserve(step):
                break
            if step.steps > 1:
                step = self._stretch(active, 1)
                if self._reserve(step):
                    break
            if in_flight:
                return None
            self.preempt(self.running[-1])
        if step is not None:
            self._count(step)
        return step

    # ---- who -------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Seats rows while there are slots, pages, and room in the next step."""
        backlog = sum(len(r.tokens) - r.computed for r in self.running if not r.on_device)
        for row in list(itertools.islice(self.waiting, _LOOK if self._slots else 0)):
            if not self._slots or backlog >= self._max_tokens:
                return
            if not row.ready:
                continue
            keys = row.sharable_keys(self._page_size)
            count = self._pages(len(row.tokens))
            spare = len(self.running)  # each of them may soon need one more
            claimed = self.pool.claim(keys, count, spare=spare)
            if claimed is None and self._grow(self.pool.used + count + spare):
                claimed = self.pool.claim(keys, count, spare=spare)
            if claimed is None:
                return
            self.waiting.remove(row)
            row.seat(self._slots.pop(), *claimed, self._page_size)
            self.hit_tokens += 0 if row.prefilled else row.computed
            self.running.append(row)
            self._seated(row)
            backlog += len(row.tokens) - row.computed

    def _free(self, row: Row) -> None:
        assert row.slot is not None
        self._slots.append(row.slot)
        self.pool.release(row.pages)
        row.unseat()

    # ---- what ------------------------------------------------------------------------------------

    def _cut(self, active: list[Row]) -> Step | None:
        if not active:
            return None
        if all(row.on_device and not row.stepwise for row in active):
            return self._stretch(active, self._length(active))
        decoding = sum(row.on_device for row in active)
        room = max(self._max_tokens - decoding, 1)
        parts = []
        for row in active:
            if row.on_device:
                parts.append(Part(row, row.computed, 1, known=False, chooses=True))
                continue
            missing = len(row.tokens) - row.computed
            take = min(missing, room)
            if take:
                chooses = take == missing
                parts.append(Part(row, row.computed, take, known=True, chooses=chooses))
                room -= take
        return Step(parts)

    def _stretch(self, rows: list[Row], steps: int) -> Step:
        parts = [Part(r, r.computed, min(steps, r.left), known=False, chooses=True) for r in rows]
        return Step(parts, steps)

    def _length(self, rows: list[Row]) -> int:
        """How many decode steps the device does without the host."""
        steps = min(MOST_STEPS, max(row.left for row in rows))
        steps = min(steps, 1 + min(row.made for row in rows) // _SLOW_START)
        steps = min(steps, max(1, int(_ROUND_TRIP / max(self.step_seconds, 1e-6))))
        if any(row.sequence.job.params.stop_strings for row in rows):
            steps = min(steps, _STOP_STEPS)
        if self.waiting:
            steps = min(steps, _CROWDED_STEPS, *(row.left for row in rows))
        return steps

    # ---- pages -----------------------------------------------------------------------------------

    def _pages(self, positions: int) -> int:
        return -(-positions // self._page_size)

    def _reserve(self, step: Step) -> bool:
        """Pages for what the step writes; False, with nothing changed, if there are too few."""
        need = [max(self._pages(p.row.computed + p.take) - len(p.row.pages), 0) for p in step.parts]
        found = self.pool.allocate(sum(need))
        if found is None and self._grow(self.pool.used + sum(need)):
            found = self.pool.allocate(sum(need))
        if found is None:
            return False
        for part, count in zip(step.parts, need, strict=True):
            part.row.pages += found[:count]
            del found[:count]
        return True

    def _count(self, step: Step) -> None:
        """Counts the step as done."""
        for part in step.parts:
            row = part.row
            row.computed += part.take
            if part.known:
                row.register(self.pool, self._page_size)
            if part.chooses:
                row.pending += part.take if step.steps else 1
                row.on_device = row.prefilled = True
