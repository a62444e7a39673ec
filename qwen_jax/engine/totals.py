"""What an engine has done so far. Plain numbers."""

import dataclasses

from qwen_jax.engine.sequence import Sequence


@dataclasses.dataclass
class Totals:
    """Over all requests. Times in seconds; compiling is apart.

    Attributes:
        prompt_tokens, generated_tokens: counts.
        decode_tokens: generated ones but the first of each sequence, which prefill brings.
        prefill_time: of the device, for tokens that were known.
        decode_time: of the device, for the others; a mixed step is shared out by its tokens.
        compile_time: tracing and compiling.
        steps: forward passes.
        host_time: processor time of the engine's thread: planning, feeding the device, making text
            of tokens.
        wait_time: the engine had nothing to do until the device was done.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_tokens: int = 0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    compile_time: float = 0.0
    steps: int = 0
    host_time: float = 0.0
    wait_time: float = 0.0

    def count(self, sequence: Sequence, before: int, *, first_of_request: bool) -> None:
        """Counts the tokens that a sequence has got since it had ``before``."""
        got = len(sequence.token_ids) - before
        if first_of_request:
            self.prompt_tokens += len(sequence.job.prompt)
        self.generated_tokens += got
        self.decode_tokens += got - (before == 0)

    def __sub__(self, earlier: "Totals") -> "Totals":
        names = [f.name for f in dataclasses.fields(self)]
        return Totals(*(getattr(self, n) - getattr(earlier, n) for n in names))


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """How busy an engine is.

    Attributes:
        running, waiting: requests.
        pages_total, pages_used: of the cache; used are those of running rows.
        pages_cached: free ones that a prompt with the same beginning would find.
        prompt_tokens, generated_tokens: since the start, as are the following.
        prefix_hit_tokens: prompt tokens that were in the cache already.
        preemptions: times that a row gave its pages up.
    """

    running: int
    waiting: int
    pages_total: int
    pages_used: int
    pages_cached: int
    prompt_tokens: int
    generated_tokens: int
    prefix_hit_tokens: int
    preemptions: int
