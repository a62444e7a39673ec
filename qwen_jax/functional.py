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
from qwen_jax.model.cache import make_cache, pack
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
        runtime = default_runtime(checkpoint.read_config(location, options.get("overrides")))
    loaded = checkpoint.load(location, runtime=runtime, **options)
    return loaded.config, loaded.params, find_tokenizer(loaded)


def default_runtime(config: ModelConfig) -> Runtime:
    """Every device, on the axis that `auto_mesh` says."""
    return Runtime.make(mesh=auto_mesh(config))


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
        ValueError: an empty row, an id out of range, or a row that got no finite logits.
    """
    runtime = runtime or default_runtime(config)
    vocab = config.text.vocab_size
    for b, row in enumerate(tokens):
        if not len(row) or min(row) < 0 or max(row) >= vocab:
            raise ValueError(f"row {b}: needs at least one token id, all of them in 0..{vocab - 1}")
    if settings is None:
        settings = sampling.RowSettings(temperature=0.0, stop_ids=config.eos_token_ids)
    per_row = [settings] * len(tokens) if isinstance(settings, sampling.RowSettings) else settings
    buckets, page_size = runtime.buckets, runtime.page_size
    size = buckets.pick("rows", len(tokens))
    rows_sampling = sampling.RowSampling.make(
        [*per_row, *[per_row[0]] * (size - len(tokens))], vocab
    )
    used = jnp.arange(size) < len(tokens)
    rows = loop.Rows(rows_sampling, jnp.where(used, max_new_tokens, 0), jnp.zeros(size, jnp.int32))
    longest = max(len(row) for row in tokens) + max_new_tokens
    width = buckets.pick("pages", -(-longest // page_size))
    table = np.arange(size * width, dtype=np.int32).reshape(size, width)
    features = sampling.Features.of(rows_sampling)
    counts = None
    if features.penalties:
        seen = np.zeros((size, vocab), bool)
        for b, row in enumerate(tokens):
            seen[b, list(row)] = True
        counts = sampling.Counts(jnp.zeros((size, vocab), jnp.int32), jnp.asarray(seen))
    flat = buckets.pick("tokens", sum(len(row) for row in tokens))
    state = loop.jit_generate(
        params,
        config,
        runtime,
        pack(tokens, [0] * len(tokens), table, num_tokens=flat),
        make_cache(config.text, runtime, size * width),
        rows,
        counts,
        options=loop.Options(
            features=features,
            new_tokens=buckets.pick("new_tokens", max_new_tokens),
            logprobs=logprobs,
        ),
    )
    finish, last = np.asarray(state.finish), np.maximum(np.asarray(state.count) - 1, 0)
    failed = [b for b in range(len(tokens)) if finish[b] == loop.FAILED]
    sampling.check_tokens(
        np.asarray(state.tokens)[failed, last[failed]], [f"row {b}" for b in failed]
    )
    return state
