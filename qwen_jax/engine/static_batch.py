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

from qwen_jax import generation, sampling
from qwen_jax.engine.chunks import plan_chunks, targets
from qwen_jax.engine.compile_clock import compile_clock
from qwen_jax.engine.pages import PageTable
from qwen_jax.engine.pictures import Features, FeatureStore, positions_of, visual_rows
from qwen_jax.engine.sequence import Sequence
from qwen_jax.engine.token_logprobs import Entry, TokenLogprobs, most_wanted
from qwen_jax.model.cache import grow_cache, make_cache, pack
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import VisionPrompt
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

_FIRST_PAGES = 64
_BUFFER = 64  # tokens of a row between two looks from the host, at most
_STOP_IDS = 8  # places of a row for ids that end it, at least: few widths reach the compiler
_WIDE_BUFFER = 4  # the same where each token brings the logprobs of the whole vocabulary


@dataclasses.dataclass
class Progress:
    """What one stretch of decoding brought.

    Attributes:
        new_text: of each sequence.
        new_tokens: of all.
        seconds, compile_seconds: of work, and of compiling besides.
    """

    new_text: list[str]
    new_tokens: int
    seconds: float = 0.0
    compile_seconds: float = 0.0


class StaticBatch:
    """Runs groups of sequences, one group at a time, in a cache of its own.

    Args:
        params, config, runtime: the model.
        tokenizer: for the tokens' text in logprobs; None leaves it out.
        max_pages: how many pages the cache may have.
        max_model_len: the longest context.
        max_prefill_tokens: prompts are taken in chunks of at most this many tokens.
        features: of pictures; None where the model sees none.
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
        features: FeatureStore | None = None,
    ):
        self._params, self._config, self._runtime = params, config, runtime
        self._max_pages = max_pages
        grows = runtime.mesh.devices.flat[0].platform == "cpu"
        self._pages = min(max_pages, _FIRST_PAGES) if grows else max_pages
        self._cache = make_cache(config.text, runtime, self._pages)
        self._table_width = -(-max_model_len // runtime.page_size)
        self._max_prefill_tokens = max_prefill_tokens
        self._features = features
        self._logprobs = TokenLogprobs(tokenizer)
        self._clock = compile_clock()
        self._turn = 0  # which call of `run` the cache belongs to
        self.prompt_logprobs: list[list[Entry | None] | None] = []

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
        """Generates a group to its end, about ``stretch`` tokens per row between two yields.

        Raises:
            ValueError: the model's logits were not finite, or the settings forbid every token.
            RuntimeError: another call of `run` has taken the cache meanwhile.
        """
        self._turn += 1
        turn = self._turn
        self._revive()
        rows, options = self._rows(group)
        pages = PageTable(rows.max_tokens.shape[0], self._table_width, self._runtime.page_size)
        began = self._now()
        self._reserve(pages, group, stretch)
        state = self._start(group, rows, options, pages.table)
        while True:
            progress, count, finish = self._collect(state, group)
            wall, compiling = np.subtract(self._now(), began).tolist()
            yield dataclasses.replace(progress, seconds=wall - compiling, compile_seconds=compiling)
            began = self._now()  # what the caller did with it is not our time
            running = [s.finish_reason is None for s in group]
            if not any(running):
                return
            if self._turn != turn:
                raise RuntimeError(
                    "another call on this model has ended this stream: take a stream to its end "
                    "before the next call, or use a second LLM"
                )
            # A sequence may have ended by a stop string, of which the device knows nothing.
            finish[: len(group)][~np.array(running)] = generation.STOP
            self._reserve(pages, group, stretch)
            state = generation.jit_advance(
                self._params,
                self._config,
                self._runtime,
                dataclasses.replace(
                    state,
                    finish=jnp.asarray(finish),
                    taken=jnp.asarray(count),
                    cache=self._cache,
                    page_table=jnp.asarray(pages.table),
                ),
                rows,
                jnp.int32(stretch),
                options=options,
            )
            self._cache = state.cache

    def _now(self) -> tuple[float, float]:
        """The time, and how much of it so far was compiling."""
        return time.perf_counter(), self._clock.seconds

    def _revive(self) -> None:
        """Makes a new cache where an interrupted call took the old one with it."""
        if any(x.is_deleted() for x in jax.tree.leaves(self._cache)):
            self._cache = make_cache(self._config.text, self._runtime, self._pages)

    def _rows(self, group: list[Sequence]) -> tuple[generation.Rows, generation.Options]:
        size = self._runtime.buckets.pick("rows", len(group))
        vocab = self._config.text.vocab_size
        settings = [_settings(s) for s in group]
        unused = [dataclasses.replace(settings[0], bias={}, allowed=None)] * (size - len(group))
        row_sampling = sampling.RowSampling.make(settings + unused, vocab)
        more = max(_STOP_IDS - row_sampling.stop_ids.shape[1], 0)
        stop_ids = np.pad(row_sampling.stop_ids, ((0, 0), (0, more)), constant_values=-1)
        row_sampling = dataclasses.replace(row_sampling, stop_ids=stop_ids)
        limits = [s.job.max_tokens for s in group] + [0] * (size - len(group))
        logprobs = most_wanted((s.job.params.logprobs for s in group), vocab)
        options = generation.Options(
            features=sampling.Features.of(row_sampling),
            new_tokens=_WIDE_BUFFER if logprobs == -1 else _BUFFER,
            logprobs=logprobs,
        )
        deltas = [s.job.vision.delta if s.job.vision else 0 for s in group]
        deltas += [0] * (size - len(group))
        max_tokens, rope_delta = (jnp.asarray(x, jnp.int32) for x in (limits, deltas))
        return generation.Rows(row_sampling, max_tokens, rope_delta), options

    def _counts(self, group: list[Sequence], size: int) -> sampling.Counts:
        prompt = np.zeros((size, self._config.text.vocab_size), bool)
        for b, sequence in enumerate(group):
            prompt[b, list(sequence.job.prompt)] = True
        return sampling.Counts(jnp.asarray(np.zeros(prompt.shape, np.int32)), jnp.asarray(prompt))

    def _reserve(self, pages: PageTable, group: list[Sequence], stretch: int) -> None:
        """Pages for what the running rows may add in one stretch; a larger cache if needed."""
        for row, sequence in enumerate(group):
            if sequence.finish_reason is None:
                new = min(len(sequence.token_ids) + stretch + 1, sequence.job.max_tokens)
                pages.reserve(row, len(sequence.job.prompt) + new)
        if pages.used > self._pages:
            while self._pages < pages.used:
                self._pages *= 2
            self._pages = min(self._pages, self._max_pages)
            self._cache = grow_cache(self._cache, self._pages)

    def _start(self, group: list[Sequence], rows, options, table) -> generation.State:
        """Prefills in chunks, and samples the first tokens."""
        prompts = [s.job.prompt for s in group]
        visions = [s.job.vision for s in group]
        features = [v and self._seen(v) for v in visions]
        wanted = [s.job.params.prompt_logprobs for s in group]
        most = most_wanted(wanted, self._config.text.vocab_size)
        found: list[list[Entry | None]] = [[None] for _ in group]
        model = (self._params, self._config, self._runtime)
        cached = [0] * len(group)
        x_BD = None
        for takes in plan_chunks([len(p) for p in prompts], self._max_prefill_tokens):
            pieces = [p[c : c + n] for p, c, n in zip(prompts, cached, takes, strict=True)]
            size = self._runtime.buckets.pick("tokens", sum(takes))
            windows = [(c, c + n) for c, n in zip(cached, takes, strict=True)]
            batch = pack(
                pieces,
                cached,
                table,
                num_tokens=size,
                positions=[positions_of(v, w) for v, w in zip(visions, windows, strict=True)],
            )
            batch = dataclasses.replace(batch, visual=visual_rows(visions, features, windows, size))
            after = None if most is None else targets(prompts, cached, takes, size)
            x_BD, self._cache, logprobs = generation.jit_prefill(
                *model, batch, self._cache, after, num_logprobs=most
            )
            if after is not None:
                self._add_prompt_logprobs(found, wanted, takes, after, logprobs)
            cached = [c + n for c, n in zip(cached, takes, strict=True)]
        self.prompt_logprobs = [
            x if k is not None else None for x, k in zip(found, wanted, strict=True)
        ]
        counts, rows_in_all = None, rows.max_tokens.shape[0]
        if options.features.penalties:
            counts = self._counts(group, rows_in_all)
        kv_lens = np.array(cached + [0] * (rows_in_all - len(group)), np.int32)
        state = generation.jit_first(
            *model, x_BD, self._cache, jnp.asarray(table), kv_lens, rows, counts, options=options
        )
        self._cache = state.cache
        return state

    def _seen(self, vision: VisionPrompt) -> Features:
        assert self._features is not None
        return self._features.of(vision.pictures)

    def _add_prompt_logprobs(self, found, wanted, takes, after, logprobs) -> None:
        host = jax.device_get(logprobs)
        start = 0
        for b, (k, take) in enumerate(zip(wanted, takes, strict=True)):
            for t in range(start, start + take):
                if k is not None and after[t] >= 0:
                    found[b].append(self._logprobs.entry(host, t, int(after[t]), k))
            start += take

    def _collect(self, state: generation.State, group: list[Sequence]):
        """Hands new tokens to their sequences; returns the state's counts and finishes too."""
        tokens, count, taken, finish, logprobs = jax.device_get(
            (state.tokens, state.count, state.taken, state.finish, state.logprobs)
        )
        texts, total, failed = [], 0, {}
        for b, sequence in enumerate(group):
            new = tokens[b, : count[b] - taken[b]].tolist()
            if finish[b] == generation.FAILED and new:
                failed[b] = new.pop()
            entries, k = None, sequence.job.params.logprobs
            if k is not None:
                entries = [self._logprobs.entry(logprobs, (b, i), t, k) for i, t in enumerate(new)]
            before = len(sequence.token_ids)
            texts.append(sequence.push(new, entries))
            total += len(sequence.token_ids) - before
        # A sequence that a stop string has ended does not mind what came after it.
        failed = {b: t for b, t in failed.items() if group[b].finish_reason is None}
        sampling.check_tokens(
            np.array(list(failed.values()), np.int32),
            [f"{group[b].job.name} at new token {count[b]}" for b in failed],
        )
        return Progress(texts, total), count, np.array(finish)


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
