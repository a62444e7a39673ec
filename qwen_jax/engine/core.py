"""The engine without its thread: requests, the scheduler, the runner, and what becomes of tokens.

Knows which request a token belongs to and what its owner hears; knows no lock. Everything here runs
on one thread.
"""

import collections
import itertools
import logging
import zlib
from collections.abc import Callable

import numpy as np

from qwen_jax import sampling
from qwen_jax.engine.events import Failed
from qwen_jax.engine.faults import DeviceError, StepFailed, on_device
from qwen_jax.engine.outcome import add_prompt_logprobs, advance, got
from qwen_jax.engine.pages import PagePool
from qwen_jax.engine.request import Request
from qwen_jax.engine.row import Row
from qwen_jax.engine.runner import Flight, Pass, Runner
from qwen_jax.engine.scheduler import Part, Scheduler, Step
from qwen_jax.engine.step_clock import StepClock
from qwen_jax.engine.token_logprobs import Entry, TokenLogprobs
from qwen_jax.engine.totals import EngineStats, Totals
from qwen_jax.model.cache import row_ways
from qwen_jax.prompt.tokenizer import Tokenizer

log = logging.getLogger(__name__)

_AHEAD = 512  # new tokens of a row that a growing cache makes room for at once


class Core:
    """Runs requests, one turn after the other.

    Args:
        runner: the device.
        tokenizer: for the tokens' text in logprobs; None leaves it out.
        max_rows: most rows at once.
        max_tokens: most tokens of a ragged step.
        max_pages: how many pages the cache may have.
        shared: whether it is on the devices of several processes, which cannot recover alone.

    Attributes:
        shared: see above.
        scheduler: what plans the steps.
        totals: what has been done.
        digest: over the tokens of all steps that have landed.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Tokenizer | None,
        *,
        max_rows: int,
        max_tokens: int,
        max_pages: int,
        shared: bool,
    ):
        self._runner, self._max_pages, self._max_rows = runner, max_pages, max_rows
        self.shared = shared
        self._page_size = runner.runtime.page_size
        self._pool = PagePool(runner.num_pages, row_ways(runner.runtime))
        self.scheduler = Scheduler(
            self._pool,
            page_size=self._page_size,
            max_rows=max_rows,
            max_tokens=max_tokens,
            grow=self._grow,
            seated=self._seated,
        )
        self.totals = Totals()
        self.digest = 0
        self._clock = StepClock(self.totals)
        self._logprobs = TokenLogprobs(tokenizer)
        self._requests: dict[Request, None] = {}
        self._flights: collections.deque[Flight] = collections.deque()

    # ---- requests --------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Takes a request in."""
        self._requests[request] = None
        self.scheduler.add(request.rows)
        for row in request.rows:
            if row.constraint is not None and request in self._requests:
                self._advance(row, [], None)

    def cancel(self, request: Request) -> None:
        """Ends a request where it is; nothing if it is over."""
        if request in self._requests:
            self._drop(request)
            request.sink(request.finish())

    def fail(self, request: Request, error: Exception, *, spoiled: bool = False) -> None:
        """Ends a request with an error; nothing if it is over.

        spoiled: what is in its pages is wrong.
        """
        if request in self._requests:
            self._drop(request, spoiled=spoiled)
            request.sink(Failed(error))

    def fail_all(self, make: Callable[[str], Exception]) -> None:
        """Ends every request with an error made of its name."""
        self._flights.clear()
        for request in list(self._requests):
            self.fail(request, make(request.name))

    @property
    def busy(self) -> bool:
        """Whether there is a request that is not over, or a step on its way."""
        return bool(self._requests or self._flights)

    def stats(self) -> EngineStats:
        """How busy it is; may be called from any thread."""
        running = len({id(row.request) for row in tuple(self.scheduler.running)})
        return EngineStats(
            running=running,
            waiting=max(len(self._requests) - running, 0),
            pages_total=self._max_pages,
            pages_used=self._pool.used,
            pages_cached=self._pool.cached,
            prompt_tokens=self.totals.prompt_tokens,
            generated_tokens=self.totals.generated_tokens,
            prefix_hit_tokens=self.scheduler.hit_tokens,
            preemptions=self.scheduler.preemptions,
        )

    def _drop(self, request: Request, *, spoiled: bool = False) -> None:
        """Forgets a request; its pages are free at once."""
        del self._requests[request]
        for row in request.rows:
            if not row.done:
                row.sequence.end("abort")
                self.scheduler.remove(row, spoiled=spoiled)

    # ---- turns -----------------------------------------------------------------------------------

    def turn(self) -> None:
        """Plans and starts a step, then takes the tokens of the one before."""
        with self._clock.turn():
            self._turn()

    def _turn(self) -> None:
        step = None
        try:
            if not self._flights and self._runner.lost:  # somebody else has taken the cache
                self._start_anew()
            step = self.scheduler.plan(in_flight=bool(self._flights))
            if step is not None:
                self._start(step)
            if self._flights and (step is None or len(self._flights) > 1):
                self._land()
        except StepFailed as failure:
            if self.shared:  # other processes, if they are still there, have gone on
                raise DeviceError(f"the device has failed: {failure.__cause__!r}") from failure
            self._recover(failure, step)

    def _start(self, step: Step) -> None:
        if not self._flights:
            self._clock.starts()
        if step.steps:
            self._flights.append(on_device(self._runner.stretch, step))
            return
        passed = on_device(self._runner.forward, step)
        if step.constrained:
            while self._flights:
                self._land()
            self._constrain(passed)
        self._flights.append(on_device(self._runner.choose, passed))

    def _constrain(self, passed: Pass) -> None:
        """Masks for the rows that still choose, now that the tokens before are known.

        Rows that have ended meanwhile, or got forced tokens, choose nothing after this pass.
        """
        words = -(-self._runner.config.text.vocab_size // 32)
        for part in passed.choosers:
            row = part.row
            if not row.done and not part.known and not row.on_device:
                row.pending -= 1
                part.chooses = False
            elif not row.done and row.constraint is not None:
                passed.masks[row] = np.zeros(words, np.uint32)
                try:
                    row.constraint.mask(passed.masks[row])
                except Exception as error:
                    self._fail_form(row.request, error)
            part.chooses &= not row.done

    def _fail_form(self, request: Request, error: Exception) -> None:
        """Ends a request whose constraint, which is not ours, has raised: the others go on."""
        failure = RuntimeError(f"{request.name}: structured output has failed: {error!r}")
        failure.__cause__ = error
        self.fail(request, failure)

    def _land(self) -> None:
        """Waits for the first step on its way, and hands out what it brought."""
        flight = self._flights[0]
        with self._clock.wait():
            on_device(flight.land)
        self._flights.popleft()
        passes = int(flight.made.count.max()) if flight.step.steps and flight.made else 1
        seconds = self._clock.landed(flight.step, passes)
        if seconds is not None:
            self.scheduler.step_seconds = seconds
        if flight.made is not None:
            self.digest = zlib.crc32(np.ascontiguousarray(flight.made.tokens), self.digest)
        add_prompt_logprobs(flight, self._logprobs)
        for b, part in enumerate(flight.choosers):
            if part.chooses and not part.row.done:
                self._take(flight, b, part)

    def _take(self, flight: Flight, b: int, part: Part) -> None:
        """Gives a row its tokens of a step."""
        row = part.row
        row.pending -= part.take if flight.step.steps else 1
        brought = got(flight, b, self._logprobs)
        if brought.tokens:
            self._advance(row, brought.tokens, brought.entries)
        if brought.failed is not None and not row.done:
            where = f"{row.request.name} at new token {len(row.sequence.token_ids) + 1}"
            try:
                sampling.check_tokens(np.array([brought.failed]), [where])
            except ValueError as error:
                self.fail(row.request, error, spoiled=brought.failed == sampling.NOT_FINITE)

    def _advance(self, row: Row, new: list[int], entries: list[Entry] | None) -> None:
        """Moves a row on, tells its owner, and ends what has ended."""
        request, before = row.request, len(row.sequence.token_ids)
        try:
            delta = advance(row, new, entries)
        except Exception as error:
            self._fail_form(request, error)
            return
        if len(row.sequence.token_ids) > before:
            first = request.got_token()
            self.totals.count(row.sequence, before, first_of_request=first)
        if delta is not None:
            request.sink(delta)
        if row.done:
            self.scheduler.remove(row)
        elif row.slot is not None and not row.on_device:
            on_device(self._runner.recount, row, rows=[row])  # forced tokens count too
        if request.done:
            del self._requests[request]
            request.sink(request.finish())

    # ---- pages and errors ------------------------------------------------------------------------

    def _seated(self, row: Row) -> None:
        row.request.seated = True
        if not row.prefilled and row.first is None:
            row.request.result.metrics.cached_tokens = row.computed
        on_device(self._runner.seat, row, rows=[row])

    def _grow(self, wanted: int) -> bool:
        """Makes the cache larger, by doubling, to what rows will soon want; False if it may not."""
        if wanted > self._max_pages or self._pool.num_pages >= self._max_pages:
            return False
        rows = itertools.chain(self.scheduler.running, self.scheduler.waiting)
        rows = itertools.islice(rows, self._max_rows)
        tokens = (len(r.tokens) + min(r.left, _AHEAD) for r in rows)
        wanted = max(wanted, sum(-(-n // self._page_size) for n in tokens))
        size = self._pool.num_pages
        while size < wanted:
            size *= 2
        self.resize(min(size, self._max_pages))
        return True

    def resize(self, num_pages: int | None = None) -> None:
        """Makes the cache larger; None: as large as it may be."""
        num_pages = num_pages or self._max_pages
        if num_pages > self._pool.num_pages:
            on_device(self._runner.grow, num_pages)
            self._pool.grow(num_pages)

    def _recover(self, failure: StepFailed, step: Step | None) -> None:
        """Fails the requests in the steps on their way; the others are computed again."""
        log.error("a step has failed: %s", failure.__cause__)
        steps = [flight.step for flight in self._flights] + ([step] if step else [])
        rows = [*failure.rows, *(part.row for each in steps for part in each.parts)]
        self._flights.clear()
        for request in dict.fromkeys(row.request for row in rows):
            error = DeviceError(f"{request.name}: the device has failed: {failure.__cause__!r}")
            error.__cause__ = failure.__cause__
            self.fail(request, error, spoiled=True)
        self._start_anew()

    def _start_anew(self) -> None:
        """An empty cache; rows that were running wait for their turn."""
        for row in reversed(list(self.scheduler.running)):
            self.scheduler.preempt(row)
        self._pool.forget(range(self._pool.num_pages))
        self._runner.reset()
