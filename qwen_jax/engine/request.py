"""A request in the engine: its sequences, what its owner hears, and when things happened.

Knows prompts, seeds, limits and results; knows no page and no array.
"""

import dataclasses
import time
from collections.abc import Callable

import numpy as np

from qwen_jax.engine.constraint import Factory
from qwen_jax.engine.events import Event, Finished
from qwen_jax.engine.row import Row
from qwen_jax.engine.sequence import Job, Sequence
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import Metrics, RequestOutput

Sink = Callable[[Event], None]


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What all requests of an engine have in common.

    Attributes:
        tokenizer: for text; None: token ids only.
        eos_ids: the checkpoint's ends of text.
        max_model_len: longest context, prompt and new tokens together.
        seed: of requests that bring none.
    """

    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    max_model_len: int
    seed: int = 0


class Request:
    """One prompt and its ``n`` sequences.

    Args:
        number: how many requests came before: part of the seed of one that brings none.
        prompt, params: what is wanted.
        sink: hears the events.
        request_id: in the result; default: the number.
        name: in errors; default: "request" and the number.
        defaults: of the engine.
        constraint: makes what each sequence is held to.

    Attributes:
        number, name: see above.
        rows: of the sequences.
        result: filled in by the end.
        seated: whether a row of it has ever run.

    Raises:
        ValueError: the prompt leaves no room for a token, or is empty.
    """

    def __init__(
        self,
        number: int,
        prompt: Prompt,
        params: SamplingParams,
        sink: Sink,
        *,
        request_id: str | None,
        name: str,
        defaults: Defaults,
        constraint: Factory | None,
    ):
        self.number, self.name = number, name or f"request {number}"
        self.sink = sink
        self.seated = False
        room = defaults.max_model_len - len(prompt.token_ids)
        if not prompt.token_ids or room < 1:
            raise ValueError(
                f"{self.name}: a prompt of {len(prompt.token_ids):,} tokens is not in "
                f"1 .. {defaults.max_model_len - 1:,}"
            )
        stops = tuple(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops = tuple(dict.fromkeys((*stops, *prompt.stop_ids, *defaults.eos_ids)))
        given = defaults.seed if params.seed is None else params.seed
        seed = [given % 2**64, *([number] if params.seed is None else [])]
        self.rows: list[Row] = []
        for i in range(params.n):
            job = Job(
                prompt=prompt.token_ids,
                params=params,
                seed=int(np.random.SeedSequence([*seed, i]).generate_state(1)[0]),
                stop_ids=stops,
                max_tokens=min(params.max_tokens or room, room),
                name=self.name,
                vision=prompt.vision,
                constraint=constraint,
            )
            first = self.rows[0] if self.rows else None
            self.rows.append(Row(self, Sequence(job, defaults.tokenizer, i), first))
        self.result = RequestOutput(
            request_id=str(number) if request_id is None else request_id,
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids),
            prompt_logprobs=None,
            outputs=[],
            metrics=_metrics(prompt),
        )
        self._began = time.perf_counter()
        self._first_token = 0.0

    @property
    def done(self) -> bool:
        """Whether all its sequences have ended."""
        return all(row.done for row in self.rows)

    def got_token(self) -> bool:
        """Notes when the first token came; whether this is it."""
        if self._first_token:
            return False
        self._first_token = time.perf_counter()
        self.result.metrics.first_token_time = time.time()
        self.result.metrics.time_to_first_token = self._first_token - self._began
        return True

    def finish(self) -> Finished:
        """The last event: the result of all sequences as they are now."""
        result, metrics = self.result, self.result.metrics
        result.outputs = [row.sequence.output() for row in self.rows]
        result.prompt_logprobs = self.rows[0].prompt_logprobs
        result.finished = self.done
        metrics.generated_tokens = sum(len(row.sequence.token_ids) for row in self.rows)
        metrics.finished_time = time.time()
        if self._first_token:
            metrics.generation_time = time.perf_counter() - self._first_token
        return Finished(result)


def _metrics(prompt: Prompt) -> Metrics:
    pictures = prompt.vision.pictures if prompt.vision else ()
    return Metrics(
        prompt_tokens=len(prompt.token_ids),
        picture_tokens=sum(picture.num_tokens for picture in pictures),
        picture_pixels=sum(picture.num_pixels for picture in pictures),
        arrival_time=time.time(),
    )
