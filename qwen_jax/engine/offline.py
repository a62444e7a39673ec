"""Offline generation: lists of prompts in, lists of results out, over a fixed batch.

Knows prompts, seeds, limits and results; knows no messages, and no array.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from qwen_jax.engine.sequence import Job, Sequence
from qwen_jax.engine.static_batch import Progress, StaticBatch
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import Metrics, RequestOutput

_STRETCH = 64  # tokens decoded between two looks from the host
_STOP_STRETCH = 16  # the same where a stop string may end a row earlier


@dataclasses.dataclass
class Totals:
    """What has been done so far, over all requests. Times in seconds; compiling is apart.

    Attributes:
        prompt_tokens, generated_tokens: counts.
        decode_tokens: generated ones but the first of each sequence, which prefill brings.
        prefill_time: until the first tokens.
        decode_time: from there on.
        compile_time: tracing and compiling.
    """

    prompt_tokens: int = 0
    generated_tokens: int = 0
    decode_tokens: int = 0
    prefill_time: float = 0.0
    decode_time: float = 0.0
    compile_time: float = 0.0

    def __sub__(self, earlier: "Totals") -> "Totals":
        names = [f.name for f in dataclasses.fields(self)]
        return Totals(*(getattr(self, n) - getattr(earlier, n) for n in names))


@dataclasses.dataclass
class _Request:
    prompt: Prompt
    sequences: list[Sequence]
    result: RequestOutput

    def finish(self) -> RequestOutput:
        self.result.outputs = [s.output() for s in self.sequences]
        self.result.finished = all(s.finish_reason is not None for s in self.sequences)
        self.result.metrics.generated_tokens = sum(len(s.token_ids) for s in self.sequences)
        return self.result


class Offline:
    """Runs requests to their end, group by group.

    Args:
        batch: what generates.
        tokenizer: for text; None: token ids only.
        eos_ids: the checkpoint's ends of text.
        max_model_len: longest context, prompt and new tokens together.
        max_num_seqs: most rows of a group.
        seed: of requests that bring none.
    """

    def __init__(
        self,
        batch: StaticBatch,
        tokenizer: Tokenizer | None,
        *,
        eos_ids: tuple[int, ...],
        max_model_len: int,
        max_num_seqs: int,
        seed: int,
    ):
        self._batch, self._tokenizer = batch, tokenizer
        self._eos_ids, self._max_model_len = eos_ids, max_model_len
        self._max_num_seqs, self._seed = max_num_seqs, seed
        self._numbers = itertools.count()
        self.totals = Totals()

    def run(
        self, prompts: list[Prompt], params: list[SamplingParams], *, use_tqdm: bool
    ) -> list[RequestOutput]:
        """All prompts to their end; results in the order of the prompts."""
        requests = [self._request(p, q) for p, q in zip(prompts, params, strict=True)]
        flat = [(r, s) for r in requests for s in r.sequences]
        began, tokens, done = time.perf_counter(), 0, 0
        with tqdm(total=len(flat), desc="requests", unit="req", disable=not use_tqdm) as bar:
            sequences = [s for _, s in flat]
            for group in self._batch.groups(sequences, self._max_num_seqs):
                members, flat = flat[: len(group)], flat[len(group) :]
                stops = any(s.job.params.stop_strings for s in group)
                for progress in self._run_group(members, _STOP_STRETCH if stops else _STRETCH):
                    tokens += progress.new_tokens
                    finished = sum(s.finish_reason is not None for s in sequences)
                    rate = tokens / (time.perf_counter() - began)
                    bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                    bar.update(finished - done)
                    done = finished
        return [request.finish() for request in requests]

    def stream(
        self, prompt: Prompt, params: SamplingParams
    ) -> Iterator[tuple[str, RequestOutput | None]]:
        """One prompt: its new text, token by token, and with the last piece the result.

        Raises:
            ValueError: ``params.n`` is not 1.
        """
        if params.n != 1:
            raise ValueError(f"n={params.n} cannot be streamed; use n=1, or generate")
        request = self._request(prompt, params)
        (sequence,) = request.sequences
        for progress in self._run_group([(request, sequence)], 1):
            ended = sequence.finish_reason is not None
            yield progress.new_text[0], request.finish() if ended else None

    def _run_group(
        self, members: list[tuple[_Request, Sequence]], stretch: int
    ) -> Iterator[Progress]:
        """Runs a group, keeping the times and prompt logprobs of each request."""
        running = list({id(r): r for r, _ in members}.values())
        totals = self.totals
        for i, progress in enumerate(self._batch.run([s for _, s in members], stretch)):
            totals.generated_tokens += progress.new_tokens
            totals.compile_time += progress.compile_seconds
            if i == 0:
                totals.prompt_tokens += sum(len(s.job.prompt) for _, s in members)
                totals.prefill_time += progress.seconds
                for (owner, _), found in zip(members, self._batch.prompt_logprobs, strict=True):
                    owner.result.metrics.time_to_first_token = progress.seconds
                    owner.result.prompt_logprobs = found
            else:
                totals.decode_tokens += progress.new_tokens
                totals.decode_time += progress.seconds
                for owner in running:
                    owner.result.metrics.generation_time += progress.seconds
            running = [r for r in running if any(s.finish_reason is None for s in r.sequences)]
            yield progress

    def _request(self, prompt: Prompt, params: SamplingParams) -> _Request:
        number = next(self._numbers)
        given = self._seed if params.seed is None else params.seed
        seed = [given % 2**64, *([number] if params.seed is None else [])]
        room = self._max_model_len - len(prompt.token_ids)
        stops = tuple(params.stop_token_ids or ())
        if not params.ignore_eos:
            stops = tuple(dict.fromkeys((*stops, *prompt.stop_ids, *self._eos_ids)))
        sequences = []
        for i in range(params.n):
            job = Job(
                prompt=prompt.token_ids,
                params=params,
                seed=int(np.random.SeedSequence([*seed, i]).generate_state(1)[0]),
                stop_ids=stops,
                max_tokens=min(params.max_tokens or room, room),
                name=f"request {number}",
                vision=prompt.vision,
            )
            sequences.append(Sequence(job, self._tokenizer, i))
        result = RequestOutput(
            request_id=str(number),
            prompt=prompt.text,
            prompt_token_ids=list(prompt.token_ids),
            prompt_logprobs=None,
            outputs=[],
            metrics=_metrics(prompt),
        )
        return _Request(prompt, sequences, result)


def _metrics(prompt: Prompt) -> Metrics:
    pictures = prompt.vision.pictures if prompt.vision else ()
    return Metrics(
        prompt_tokens=len(prompt.token_ids),
        picture_tokens=sum(picture.num_tokens for picture in pictures),
        picture_pixels=sum(picture.num_pixels for picture in pictures),
    )
