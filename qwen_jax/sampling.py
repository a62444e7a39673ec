"""From logits to tokens: per-row settings, logprobs, and one stream of random numbers per row.

Knows arrays: logits [B, V], settings per row (`sampling_rows`), token counts. It knows no requests,
no text and no schedule. The order and the meaning of the steps are those of vLLM V1
(v1/sample/sampler.py):

    raw logits ──> logprobs and ranks
        │ 1. allowed ids   2. min_tokens   3. bias   4. repetition, frequency, presence
        ├──> temperature < 1e-5: the best token, exactly
        │ 5. temperature   6. min_p   7. top_k   8. top_p
        └──> one of the remaining tokens, by its probability

The draw itself, and where its random numbers come from, is `sampling_draw`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from qwen_jax import sampling_select as select
from qwen_jax.sampling_draw import draw, scale, truncate
from qwen_jax.sampling_rows import (
    GREEDY_BELOW,
    Counts,
    Features,
    RowSampling,
    RowSettings,
    pack_allowed,
    set_row,
    update_counts,
)

__all__ = [
    "NOT_FINITE",
    "NO_TOKEN_LEFT",
    "Counts",
    "Features",
    "Logprobs",
    "RowSampling",
    "RowSettings",
    "Sampled",
    "check_tokens",
    "pack_allowed",
    "probabilities",
    "prompt_logprobs",
    "sample",
    "set_row",
    "update_counts",
]

# What `sample` returns in place of a token. Never silently a token: see `check_tokens`.
NOT_FINITE = -1
NO_TOKEN_LEFT = -2


@struct.dataclass
class Logprobs:
    """Of N tokens: logprob float32 [N], rank int32 [N], top_ids int32 and top_logprobs f32 [N, k].

    All are of the unmodified distribution, log_softmax of the raw logits. rank is the number of
    tokens whose logit is not smaller: 1 for the best, 2 for each of two that tie for the best, as
    in vLLM (v1/sample/ops/logprobs.py). A negative token has logprob NaN and rank 0.
    """

    logprob: jax.Array
    rank: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


@struct.dataclass
class Sampled:
    """tokens int32 [B], and the fields of Logprobs, which are None when none were asked for.

    A token is NOT_FINITE (-1) where the logits hold NaN or +inf or are all -inf (-inf elsewhere is
    a token that cannot be chosen), and NO_TOKEN_LEFT (-2) where the settings forbid every token.
    """

    tokens: jax.Array
    logprob: jax.Array | None = None
    rank: jax.Array | None = None
    top_ids: jax.Array | None = None
    top_logprobs: jax.Array | None = None


def sample(
    logits_BV: jax.Array,
    rows: RowSampling,
    *,
    counts: Counts | None,
    position: jax.Array,
    num_logprobs: int | None,
    features: Features,
) -> Sampled:
    """One token for each row.

    logits_BV: float32, from the model. counts: needed when features.penalties. position: int32 [B],
    index of the token being generated, 0 for the first: part of the random key. num_logprobs
    (static): None for no logprobs at all, k for the k best beside the token's own, -1 for the whole
    vocabulary. features (static): `Features.of(rows)` or more. ValueError for shapes or dtypes that
    do not fit.
    """
    _check_shapes(logits_BV, rows, counts, position, features)
    # Looked at before masks: a NaN is a fault wherever it is.
    raw_max, _ = select.argmax(logits_BV)
    processed_BV = process(logits_BV, rows, counts, position, features)
    best_logit, best = select.argmax(processed_BV)
    tokens = best
    if not features.greedy_only:
        greedy = rows.temperature < GREEDY_BELOW

        def drawn() -> jax.Array:
            found = draw(processed_BV, best_logit, rows, position=position, features=features)
            return jnp.where(greedy, best, found)

        tokens = jax.lax.cond(jnp.all(greedy), lambda: best, drawn)
    tokens = jnp.where(best_logit == -jnp.inf, NO_TOKEN_LEFT, tokens)
    usable = jnp.isfinite(raw_max) & (best_logit < jnp.inf)
    tokens = jnp.where(usable, tokens, NOT_FINITE).astype(jnp.int32)
    if num_logprobs is None:
        return Sampled(tokens)
    of = prompt_logprobs(logits_BV, tokens, num_logprobs)
    return Sampled(tokens, of.logprob, of.rank, of.top_ids, of.top_logprobs)


def probabilities(
    logits_BV: jax.Array,
    rows: RowSampling,
    *,
    counts: Counts | None,
    position: jax.Array,
    features: Features,
) -> jax.Array:
    """What `sample` draws each token with: float32 [B, V], 0 for tokens that are dropped.

    Arguments as in `sample`. A greedy row holds a single 1; a row without a token holds NaN.
    """
    _check_shapes(logits_BV, rows, counts, position, features)
    processed_BV = process(logits_BV, rows, counts, position, features)
    best_logit, best = select.argmax(processed_BV)
    weights_BV = jnp.exp(truncate(scale(processed_BV, best_logit, rows), rows, features))
    drawn_BV = weights_BV / select.total(weights_BV)[:, None]
    greedy_BV = jax.nn.one_hot(best, logits_BV.shape[1]) + 0 * best_logit[:, None]
    return jnp.where(rows.temperature[:, None] < GREEDY_BELOW, greedy_BV, drawn_BV)


def prompt_logprobs(logits_TV: jax.Array, targets_T: jax.Array, num_logprobs: int) -> Logprobs:
    """Logprobs of given tokens: logits float32, of the position before each target int32 [T].

    num_logprobs (static): as in `sample`, -1 for the whole vocabulary, best first.
    """
    _check_logits(logits_TV)
    vocab_size = logits_TV.shape[1]
    if not -1 <= num_logprobs <= vocab_size:
        raise ValueError(
            f"num_logprobs={num_logprobs} must be -1 (all) or 0 .. vocabulary size {vocab_size}"
        )
    count = vocab_size if num_logprobs == -1 else num_logprobs
    best, _ = select.argmax(logits_TV)
    log_total = best + jnp.log(select.total(jnp.exp(logits_TV - best[:, None])))
    at = jnp.maximum(targets_T, 0)[:, None]
    logit = jnp.take_along_axis(logits_TV, at, -1)
    rank = (logits_TV >= logit).sum(-1, dtype=jnp.int32)
    top_logits, top_ids = select.top_k(logits_TV, count)
    is_token = targets_T >= 0
    return Logprobs(
        logprob=jnp.where(is_token, logit[:, 0] - log_total, jnp.nan),
        rank=jnp.where(is_token, rank, 0),
        top_ids=top_ids,
        top_logprobs=top_logits - log_total[:, None],
    )


def check_tokens(tokens: np.ndarray, names: list[str]) -> None:
    """Raise ValueError on the host if rows got no token, naming each and the reason."""
    reasons = {
        NOT_FINITE: "its logits hold NaN or infinity",
        NO_TOKEN_LEFT: "what it may choose from and stop ids below min_tokens leave no token",
    }
    failed = [
        f"{name}: {reasons[token]}"
        for name, token in zip(names, np.asarray(tokens).tolist(), strict=True)
        if token in reasons
    ]
    if failed:
        raise ValueError("no token could be sampled for " + "; ".join(failed))


# ---- the steps -----------------------------------------------------------------------------------


def process(
    logits_BV: jax.Array,
    rows: RowSampling,
    counts: Counts | None,
    position: jax.Array,
    features: Features,
) -> jax.Array:
    """Steps 1 to 4, everything that can change which token is the best: float32 [B, V]."""
    x = logits_BV
    batch, vocab_size = x.shape
    row = jnp.arange(batch)[:, None]

    def places(ids: jax.Array, used: jax.Array | bool = True) -> jax.Array:
        # Beyond the row, where a scatter drops it: a negative index would count from the end.
        return jnp.where((ids >= 0) & used, ids, vocab_size)

    if rows.allowed is not None:
        bits = rows.allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32) & 1
        x = jnp.where(bits.reshape(batch, -1)[:, :vocab_size] == 1, x, -jnp.inf)
    if features.min_tokens:
        early = (position < rows.min_tokens)[:, None]
        x = x.at[row, places(rows.stop_ids, early)].set(-jnp.inf, mode="drop")
    if features.bias:
        ids = places(rows.bias_ids)
        x = jax.lax.cond(
            jnp.any(ids < vocab_size),  # a scatter of nothing takes its time too
            lambda x: x.at[row, ids].add(rows.bias, mode="drop"),
            lambda x: x,
            x,
        )
    if features.penalties and counts is not None:
        seen = counts.prompt | (counts.output > 0)
        repetition = rows.repetition[:, None]
        x = jnp.where(seen, jnp.where(x > 0, x / repetition, x * repetition), x)
        x = x - rows.frequency[:, None] * counts.output
        x = x - rows.presence[:, None] * (counts.output > 0)
    return x


def _check_logits(logits: jax.Array) -> None:
    if logits.ndim != 2 or logits.dtype != jnp.float32:
        raise ValueError(f"logits must be float32 [B, V], got {logits.dtype} {logits.shape}")


def _check_shapes(
    logits_BV: jax.Array,
    rows: RowSampling,
    counts: Counts | None,
    position: jax.Array,
    features: Features,
) -> None:
    """Refuse at trace time what would broadcast to something plausible."""
    _check_logits(logits_BV)
    batch, vocab_size = logits_BV.shape
    found: dict[str, tuple[int, ...]] = {"rows": rows.temperature.shape, "position": position.shape}
    wanted: dict[str, tuple[int, ...]] = dict.fromkeys(found, (batch,))
    if rows.allowed is not None:
        found["allowed"], wanted["allowed"] = rows.allowed.shape, (batch, -(-vocab_size // 32))
        if rows.allowed.dtype != jnp.uint32:
            raise ValueError(f"allowed must be uint32, got {rows.allowed.dtype}: use .view(uint32)")
    if features.penalties:
        if counts is None:
            raise ValueError("features.penalties needs counts: pass Counts, or features without")
        found["counts"], wanted["counts"] = counts.output.shape, (batch, vocab_size)
    for name, shape in found.items():
        if shape != wanted[name]:
            raise ValueError(
                f"{name} has shape {shape}, logits {logits_BV.shape} need {wanted[name]}"
            )
