"""A sequence as the scheduler sees it: its tokens, its pages, and how far the device is.

Knows token ids, page numbers and a slot; knows no logits, no text and no other row.

    tokens    p p p p p p p p g g g ? ?      p prompt, g generated, ? made on the device, not seen
    computed  ------------------------->     positions that are in the cache once all that has been
                                             dispatched is done: all but the newest token
"""

from typing import Any

from qwen_jax.engine.constraint import Constraint
from qwen_jax.engine.pages import PagePool, block_key
from qwen_jax.engine.sequence import Sequence
from qwen_jax.engine.token_logprobs import Entry


class Row:
    """One of the sequences of a request.

    Attributes:
        request: whose it is, which is not looked into here.
        sequence: its text.
        first: the request's first row, whose prompt the others share; None for itself.
        tokens: prompt and generated tokens that the host knows.
        slot: where the device keeps its state; None while it waits.
        pages: of its positions, in order.
        computed: see above.
        pending: tokens that dispatched steps will bring, if nothing ends the row before.
        on_device: whether the device knows its newest token, which then goes in from there.
        prefilled: whether its whole prompt has been in the cache once.
        constraint: of structured output; None for free text.
        prompt_logprobs: of the prompt's tokens so far; None where nobody asks.
    """

    def __init__(self, request: Any, sequence: Sequence, first: "Row | None"):
        self.request, self.sequence, self.first = request, sequence, first
        job = sequence.job
        self.constraint: Constraint | None = job.constraint() if job.constraint else None
        self.tokens = list(job.prompt)
        self.slot: int | None = None
        self.pages: list[int] = []
        self.computed = self.pending = 0
        self.on_device = self.prefilled = False
        self.prompt_logprobs: list[Entry | None] | None = None
        if first is None and job.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]
        self._keys: list[bytes] = []
        self._registered = 0

    @property
    def made(self) -> int:
        """New tokens, with those on their way."""
        return len(self.tokens) - len(self.sequence.job.prompt) + self.pending

    @property
    def left(self) -> int:
        """New tokens that it may still get, when all that is on its way has come."""
        return self.sequence.job.max_tokens - self.made

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.sequence.finish_reason is not None

    @property
    def ready(self) -> bool:
        """Whether it may begin: a prompt that it shares is in the cache."""
        return self.first is None or self.first.prefilled or self.first.done

    @property
    def stepwise(self) -> bool:
        """Whether the host must see every token before the next, or every step's logprobs."""
        return self.constraint is not None or self.sequence.job.params.logprobs is not None

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether logprobs of prompt tokens are still to come."""
        found = self.prompt_logprobs
        return found is not None and len(found) < len(self.sequence.job.prompt)

    def sharable_keys(self, page_size: int) -> list[bytes]:
        """Keys of the full pages that other rows may have filled: not the one of the last token."""
        if self.wants_prompt_logprobs:
            return []
        return self._full(page_size, len(self.tokens) - 1)

    def seat(self, slot: int, pages: list[int], found: int, page_size: int) -> None:
        """Begins, or begins again: ``found`` of its pages have their content already."""
        self.slot, self.pages, self._registered = slot, pages, found
        self.computed = found * page_size

    def unseat(self) -> None:
        """Gives up slot and pages; everything must be computed again."""
        self.slot, self.pages, self.computed = None, [], 0
        self.on_device = False
        if self.wants_prompt_logprobs:
            self.prompt_logprobs = [None]

    def register(self, pool: PagePool, page_size: int) -> None:
        """Lets others find the pages that are full of tokens which the host knows.

        The last known token may not be in the cache (if it ended the text), so it does not count.
        """
        keys = self._full(page_size, min(self.computed, len(self.tokens) - 1))
        for i in range(self._registered, len(keys)):
            pool.register(self.pages[i], keys[i])
        self._registered = max(self._registered, len(keys))

    def _full(self, page_size: int, tokens: int) -> list[bytes]:
        """Keys of the full pages of the first ``tokens`` tokens."""
        count = tokens // page_size
        for i in range(len(self._keys), count):
            start = i * page_size
            before = self._keys[-1] if self._keys else b""
            seen = self._seen(start, start + page_size)
            self._keys.append(block_key(before, self.tokens[start : start + page_size], seen))
        return self._keys[:count]

    def _seen(self, start: int, stop: int) -> bytes:
        """What the placeholders among the tokens start:stop show."""
        vision = self.sequence.job.vision
        if vision is None:
            return b""
        inside = [span for span in vision.spans if span.start < stop and span.stop > start]
        pictures = [
            f"{vision.pictures[s.picture].digest} {s.slice} {s.start - start}" for s in inside
        ]
        return "\n".join(pictures).encode()
