"""A fixed batch over the generate loop: rows start together and leave when they finish.

Knows sequences, pages and the generate programs; knows no prompts' text. A group is only started
if its rows fit at their longest, so no row can run out of pages half-way; on a CPU, whose memory is
shared with others, the cache is made small and doubled when rows grow into it.
"""

import dataclasses
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import generate, sampling
from qwen_jax.engine.pages import PageTable
from qwen_jax.engine.sequence import Sequence
from qwen_jax.model.cache import grow_cache, make_cache, pack
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Logprob
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

_FIRST_PAGES = 64


@dataclasses.dataclass
class Progress:
    """What one stretch of decoding brought: the new text of each sequence, and the time."""

    new_text: list[str]
    new_tokens: int
    seconds: float


class StaticBatch:
    """Runs groups of sequences, one group at a time, in a cache of its own.

    Args:
        params, config, runtime: the model.
        max_pages: how many pages the cache may have.
        tokenizer: for the tokens' text in logprobs; None leaves it out.
        max_model_len: the longest context.
        max_prefill_tokens: prompts are taken in chunks of at most this many tokens.
    """

    def __init__(
        self,
        params: Weights,
        config: ModelConfig,
        runtime: Runtime,
        tokenizer: Tokenizer | None,
        *,
        max_pages: int,
        max_model_len: int,
        max_prefill_tokens: int,
    ):
        self._params, self._config, self._runtime = params, config, runtime
        self._max_pages = max_pages
        grows = runtime.mesh.devices.flat[0].platform == "cpu"
        first = min(max_pages, _FIRST_PAGES) if grows else max_pages
        self._cache = make_cache(config.text, runtime, first)
        self._tokenizer = tokenizer
        self._table_width = -(-max_model_len // runtime.page_size)
        self._max_prefill_tokens = max_prefill_tokens
        self.prompt_logprobs: list[list[dict[int, Logprob] | None] | None] = []

    def pages_for(self, sequence: Sequence) -> int:
        """Pages that a sequence may need."""
        longest = len(sequence.job.prompt) + sequence.job.max_tokens
        return -(-longest // self._runtime.page_size)

    def groups(self, sequences: list[Sequence], max_rows: int) -> Iterator[list[Sequence]]:
        """Cuts a list of sequences, in order, into groups that fit the rows and the pages."""
        group: list[Sequence] = []
        pages = 0
        for sequence in sequences:
            need = self.pages_for(sequence)
            if group and (len(group) == max_rows or pages + need > self._max_pages):
                yield group
                group, pages = [], 0
            group.append(sequence)
            pages += need
        if group:
            yield group

    def run(self, group: list[Sequence], stretch: int) -> Iterator[Progress]:
        """Generates a group to its end, at most ``stretch`` tokens per row between two yields.

        Raises:
            ValueError: the model's logits were not finite, or the settings forbid every token.
        """
        rows, options, settings = self._rows(group)
        counts = self._counts(group, settings) if options.features.penalties else None
        began = time.perf_counter()
        pages = PageTable(rows.max_tokens.shape[0], self._table_width, self._runtime.page_size)
        self._reserve(pages, group, stretch)
        state = self._start(group, rows, counts, options, pages.table)
        taken = [0] * len(group)
        while True:
            progress, running = self._collect(state, group, taken, options)
            now = time.perf_counter()
            yield dataclasses.replace(progress, seconds=now - began)
            began = now
            if not any(running):
                break
            finish = np.asarray(state.finish)
            kept = [generate.RUNNING if r else generate.STOP for r in running]
            finish = np.concatenate([kept, finish[len(group) :]]).astype(np.int32)
            self._reserve(pages, group, stretch)
            state = generate.jit_advance(
                self._params,
                self._config,
                self._runtime,
                state.replace(
                    finish=jnp.asarray(finish),
                    cache=self._cache,
                    page_table=jnp.asarray(pages.table),
                ),
                rows,
                jnp.int32(stretch),
                options=options,
            )
            self._cache = state.cache

    def _rows(self, group: list[Sequence]):
        size = self._runtime.buckets.pick("rows", len(group))
        settings = [_settings(s) for s in group]
        unused = [dataclasses.replace(settings[0], bias={}, allowed=None)] * (size - len(group))
        row_sampling = sampling.RowSampling.make(settings + unused, self._config.text.vocab_size)
        limits = [s.job.max_tokens for s in group] + [0] * (size - len(group))
        options = generate.Options(
            features=sampling.Features.of(row_sampling),
            new_tokens=self._runtime.buckets.pick("new_tokens", max(limits)),
            logprobs=_most(s.job.params.logprobs for s in group),
            prompt_logprobs=_most(s.job.params.prompt_logprobs for s in group),
        )
        zeros = jnp.zeros(size, jnp.int32)
        return generate.Rows(row_sampling, jnp.asarray(limits, jnp.int32), zeros), options, settings

    def _counts(self, group: list[Sequence], settings) -> sampling.Counts:
        size = self._runtime.buckets.pick("rows", len(group))
        prompt = np.zeros((size, self._config.text.vocab_size), bool)
        for b, sequence in enumerate(group):
            prompt[b, list(sequence.job.prompt)] = True
        return sampling.Counts(
            output=jnp.zeros(prompt.shape, jnp.int32), prompt=jnp.asarray(prompt)
        )

    def _reserve(self, pages: PageTable, group: list[Sequence], stretch: int) -> None:
        """Pages for what the running rows may add in one stretch; a larger cache if needed."""
        for row, sequence in enumerate(group):
            if sequence.finish_reason is None:
                new = min(len(sequence.token_ids) + stretch + 1, sequence.job.max_tokens)
                pages.reserve(row, len(sequence.job.prompt) + new)
        have = self._cache.num_pages
        if pages.used > have:
            while have < pages.used:
                have *= 2
            self._cache = grow_cache(self._cache, min(have, self._max_pages))

    def _start(self, group: list[Sequence], rows, counts, options, table) -> generate.State:
        """Prefills in chunks; the last one samples the first tokens."""
        prompts = [s.job.prompt for s in group]
        cached = [0] * len(group)
        found: list[list] = [[None] for _ in group]
        model = (self._params, self._config, self._runtime)
        while True:
            left = sum(len(p) - c for p, c in zip(prompts, cached, strict=True))
            last = left <= max(self._max_prefill_tokens, len(group))
            takes = _chunk(prompts, cached, self._max_prefill_tokens, last)
            pieces = [p[c : c + n] for p, c, n in zip(prompts, cached, takes, strict=True)]
            size = self._runtime.buckets.pick("tokens", sum(takes))
            batch = pack(pieces, cached, table, num_tokens=size)
            targets = None
            if options.prompt_logprobs is not None:
                targets = _targets(prompts, cached, takes, size)
            if last:
                state = generate.jit_start(
                    *model, batch, self._cache, rows, counts, targets, options=options
                )
                self._cache = state.cache
                logprobs = state.prompt_logprobs
            else:
                _, self._cache, logprobs = generate.jit_prefill(
                    *model, batch, self._cache, targets, options=options
                )
            if logprobs is not None:
                self._add_prompt_logprobs(found, group, cached, takes, logprobs)
            cached = [c + n for c, n in zip(cached, takes, strict=True)]
            if last:
                wanted = [s.job.params.prompt_logprobs is not None for s in group]
                self.prompt_logprobs = [
                    x if w else None for x, w in zip(found, wanted, strict=True)
                ]
                return state.replace(prompt_logprobs=None)

    def _add_prompt_logprobs(self, found, group, cached, takes, logprobs) -> None:
        host = jax.device_get(logprobs)
        start = 0
        for b, (sequence, past, take) in enumerate(zip(group, cached, takes, strict=True)):
            prompt, wanted = sequence.job.prompt, sequence.job.params.prompt_logprobs
            for i in range(take):
                if wanted is not None and past + i + 1 < len(prompt):
                    found[b].append(self._entry(host, start + i, prompt[past + i + 1], wanted))
            start += take

    def _entry(self, host: sampling.Logprobs, at, token: int, k: int) -> dict[int, Logprob]:
        """The dict of one position: the best ``k`` and the token itself."""
        ids, values = host.top_ids[at], host.top_logprobs[at]
        k = len(ids) if k == -1 else k
        entry = {
            int(i): Logprob(float(v), rank, self._text(int(i)))
            for rank, (i, v) in enumerate(zip(ids[:k], values[:k], strict=True), start=1)
        }
        own = Logprob(float(host.logprob[at]), int(host.rank[at]), self._text(token))
        return {token: own, **{i: x for i, x in entry.items() if i != token}}

    def _text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token(token)

    def _collect(self, state: generate.State, group, taken: list[int], options):
        """Hands new tokens to their sequences; says which sequences go on."""
        tokens, count, finish, logprobs = jax.device_get(
            (state.tokens, state.count, state.finish, state.logprobs)
        )
        failed = [b for b in range(len(group)) if finish[b] == generate.FAILED]
        if failed:
            sampling.check_tokens(
                np.array([tokens[b, count[b] - 1] for b in failed]),
                [f"{group[b].job.name} at new token {count[b]}" for b in failed],
            )
        texts, total = [], 0
        for b, sequence in enumerate(group):
            new = tokens[b, taken[b] : count[b]].tolist()
            entries = None
            k = sequence.job.params.logprobs
            if k is not None and logprobs is not None:
                places = range(taken[b], count[b])
                entries = [
                    self._entry(logprobs, (b, i), t, k) for i, t in zip(places, new, strict=True)
                ]
            before = len(sequence.token_ids)
            texts.append(sequence.push(new, entries))
            total += len(sequence.token_ids) - before
            taken[b] = int(count[b])
        running = [s.finish_reason is None for s in group]
        return Progress(texts, total, 0.0), running


def _settings(sequence: Sequence) -> sampling.RowSettings:
    job, params = sequence.job, sequence.job.params
    return sampling.RowSettings(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        seed=job.seed,
        min_tokens=params.min_tokens,
        bias=dict(params.logit_bias or {}),
        allowed=params.allowed_token_ids,
        stop_ids=job.stop_ids,
    )


def _most(wanted) -> int | None:
    """The largest number of logprobs that any row wants; -1 (all) is the largest."""
    asked = [k for k in wanted if k is not None]
    return None if not asked else -1 if -1 in asked else max(asked)


def _chunk(prompts, cached, limit: int, last: bool) -> list[int]:
    """How many tokens of each prompt the next chunk takes; only the last takes a row's last one."""
    takes = []
    for prompt, past in zip(prompts, cached, strict=True):
        left = len(prompt) - past if last else min(len(prompt) - past - 1, limit)
        takes.append(left)
        limit -= left
    return takes


def _targets(prompts, cached, takes, size: int) -> jax.Array:
    """int32 [T]: the prompt token after each token of the chunk, -1 where there is none."""
    following = [
        p[c + 1 : c + n + 1] + (-1,) * (c + n + 1 - len(p))
        for p, c, n in zip(prompts, cached, takes, strict=True)
    ]
    flat = [token for row in following for token in row]
    return jnp.asarray(flat + [-1] * (size - len(flat)), jnp.int32)
