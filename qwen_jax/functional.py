"""The functional layer for notebooks: plain pytrees in, plain arrays out, one jitted program.

Knows how to lay out a fixed batch of token ids; knows no text. `LLM` is the layer for text.
"""

import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax import generation as loop
from qwen_jax import sampling
from qwen_jax.model.cache import KVCache, RaggedBatch, make_cache, pack, row_ways
from qwen_jax.model.step import jit_step
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.runtime import Runtime
from qwen_jax.weights import checkpoint
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

_RESOLVE_OPTIONS = ("load_format", "revision", "cache_dir")

log = logging.getLogger(__name__)


def load(
    model: str, *, runtime: Runtime | None = None, **options: Any
) -> tuple[ModelConfig, Weights, Tokenizer | None]:
    """A checkpoint as plain values: its config, its weights on their devices, its tokenizer.

    Args:
        model: hub id, directory or gs:// path; see `checkpoint.load`, which takes the ``options``.
        runtime: mesh, rules and dtype; default: `default_runtime`.
    """
    resolving = {k: options.pop(k) for k in _RESOLVE_OPTIONS if k in options}
    location = checkpoint.resolve(model, **resolving)
    if runtime is None:
        config = checkpoint.read_config(location, options.get("overrides"))
        runtime = default_runtime(config, options.get("quantization"))
    loaded = checkpoint.load(location, runtime=runtime, **options)
    return loaded.config, loaded.params, find_tokenizer(loaded)


def default_runtime(config: ModelConfig, quantization: str | None = None) -> Runtime:
    """Every device, on the axis of `auto_mesh`; ``quantization`` as `Runtime.make` has it."""
    return Runtime.make(mesh=auto_mesh(config), config=config, quantization=quantization)


def auto_mesh(config: ModelConfig, devices: int | None = None) -> dict[str, int]:
    """All devices on the expert axis where they divide the experts, else on the tensor axis.

    devices: how many; default: those that are here.
    """
    n = devices or len(jax.devices())
    experts = config.text.num_experts
    return {"expert": n} if experts and experts % n == 0 else {"tensor": n}


def find_tokenizer(loaded: checkpoint.Loaded) -> Tokenizer | None:
    """The checkpoint's tokenizer, or None (said in the log) where it has none."""
    if loaded.directory is None:
        return None
    try:
        return Tokenizer.from_dir(loaded.directory, padded_size=loaded.config.text.vocab_size)
    except FileNotFoundError as error:
        log.info("token ids only: %s", error)
        return None


def generate(
    params: Weights,
    config: ModelConfig,
    tokens: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    runtime: Runtime | None = None,
    settings: sampling.RowSettings | Sequence[sampling.RowSettings] | None = None,
    logprobs: int | None = None,
) -> loop.State:
    """Continues each row of token ids; prefill and the decode loop are one jitted program.

    Args:
        params, config: the model, as from `load`.
        tokens: token ids of each row; rows may have any lengths.
        max_new_tokens: limit for every row.
        runtime: where the params were placed; default: `default_runtime`, as for `load`.
        settings: for all rows or one for each; None: greedy, until one of the config's eos ids.
        logprobs: how many best tokens to report with each new token.

    Returns:
        The final state: ``tokens`` int32 [B, >= max_new_tokens] of which row b has ``count[b]``;
        rows behind ``len(tokens)`` are padding up to a declared bucket.

    Raises:
        ValueError: no rows, an empty row, an id out of range, a context longer than the model's,
            settings for another number of rows, or a row that got no finite logits.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: must be at least 1")
    runtime = runtime or default_runtime(config)
    _check(config, tokens, max_new_tokens)
    batch, cache = _laid_out(config, runtime, tokens, max_new_tokens)
    size = batch.kv_lens.shape[0]
    rows = _rows(config, settings, len(tokens), size, max_new_tokens)
    features = sampling.Features.of(rows.sampling)
    state = loop.jit_generate(
        params,
        config,
        runtime,
        batch,
        cache,
        rows,
        _counts(config, tokens, size) if features.penalties else None,
        options=loop.Options(
            features=features,
            new_tokens=runtime.buckets.pick("new_tokens", max_new_tokens),
            logprobs=logprobs,
        ),
    )
    finish, last = np.asarray(state.finish), np.maximum(np.asarray(state.count) - 1, 0)
    failed = [b for b in range(len(tokens)) if finish[b] == loop.FAILED]
    sampling.check_tokens(
        np.asarray(state.tokens)[failed, last[failed]], [f"row {b}" for b in failed]
    )
    return state


def routing(
    params: Weights,
    config: ModelConfig,
    tokens: Sequence[Sequence[int]],
    *,
    runtime: Runtime | None = None,
) -> list[np.ndarray]:
    """The experts that every token goes to: of prompts, or of prompts with their answers.

    Args:
        params, config, tokens, runtime: as for `generate`.

    Returns:
        For each row of T tokens int32 [layers, T, A], the best expert first; in a dense layer
        among sparse ones every entry is the number of experts, which is no expert.

    Raises:
        ValueError: the model is dense; or as `generate`.
    """
    runtime = runtime or default_runtime(config)
    _check(config, tokens, 0)
    batch, cache = _laid_out(config, runtime, tokens, 0)
    out = jit_step(params, config, runtime, batch, cache, logits="none", return_routing=True)
    ends = np.cumsum([len(row) for row in tokens])
    return np.split(np.asarray(out.routing)[:, : ends[-1]], ends[:-1], axis=1)


def _laid_out(
    config: ModelConfig, runtime: Runtime, tokens: Sequence[Sequence[int]], max_new_tokens: int
) -> tuple[RaggedBatch, KVCache]:
    """The rows in declared shapes, and an empty cache with room for them and what follows."""
    size = runtime.buckets.pick("rows", len(tokens))
    longest = max(map(len, tokens)) + max_new_tokens
    width = runtime.buckets.pick("pages", -(-longest // runtime.page_size))
    # Where rows are split over devices, neighbours share one, with all of their pages.
    table, ways = np.arange(size * width, dtype=np.int32).reshape(size, width), row_ways(runtime)
    flat = runtime.buckets.pick("tokens", sum(map(len, tokens)))
    batch = pack(tokens, [0] * len(tokens), table, num_tokens=flat)
    return batch, make_cache(config.text, runtime, -(-size // ways) * ways * width)


def _check(config: ModelConfig, tokens: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    vocab, limit = config.text.vocab_size, config.text.max_position_embeddings
    if not len(tokens):
        raise ValueError("0 rows: at least one is needed")
    for b, row in enumerate(tokens):
        if not len(row) or min(row) < 0 or max(row) >= vocab:
            raise ValueError(f"row {b}: needs at least one token id, all of them in 0..{vocab - 1}")
        if len(row) + max_new_tokens > limit:
            raise ValueError(
                f"row {b}: {len(row):,} tokens and max_new_tokens={max_new_tokens:,} exceed the "
                f"model's {limit:,} positions"
            )


def _rows(config: ModelConfig, settings, count: int, size: int, max_new_tokens: int) -> loop.Rows:
    """Settings of ``count`` rows, and of unused ones up to ``size``."""
    if settings is None:
        settings = sampling.RowSettings(temperature=0.0, stop_ids=config.eos_token_ids)
    if isinstance(settings, sampling.RowSettings):
        settings = [settings] * count
    if len(settings) != count:
        raise ValueError(f"{len(settings)} settings for {count} rows; give 1 or {count}")
    padded = [*settings, *[settings[0]] * (size - count)]
    limits = [max_new_tokens] * count + [0] * (size - count)
    return loop.Rows(
        sampling.RowSampling.make(padded, config.text.vocab_size),
        jnp.asarray(limits, jnp.int32),
        jnp.zeros(size, jnp.int32),
    )


def _counts(config: ModelConfig, tokens: Sequence[Sequence[int]], size: int) -> sampling.Counts:
    seen = np.zeros((size, config.text.vocab_size), bool)
    for b, row in enumerate(tokens):
        seen[b, list(row)] = True
    return sampling.Counts(jnp.zeros(seen.shape, jnp.int32), jnp.asarray(seen))
