"""One random token per row: temperature, min_p, top_k, top_p, and the draw.

Knows processed logits and settings per row. The meaning of the cutoffs, and their order, are vLLM's
(v1/sample/sampler.py); ties with the last token kept are kept.

Random numbers: token v of a row gets 32 bits of Threefry-2x32,

    jax.random.bits(jax.random.fold_in(jax.random.key(seed), position), (V,), jnp.uint32)[v]

(under JAX's default jax_threefry_partitionable=True), u = (bits + 1/2) / 2**32, and the Gumbel
noise -log(-log(1 - u)). The kept token with the largest (logit - best logit) / temperature + noise
wins: that is a draw from the softmax of the kept tokens. It depends on the row's seed, position,
logits and settings alone: not on its neighbours, its place in the batch, or how it was computed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from qwen_jax import sampling_select as select
from qwen_jax.sampling_rows import GREEDY_BELOW, Features, RowSampling

# How many blocks of 32 logits truncated sampling looks at first. Enough for every top_k < 128.
NEAR_BLOCKS = 128


def draw(
    logits_BV: jax.Array,
    best_B: jax.Array,
    rows: RowSampling,
    *,
    position: jax.Array,
    features: Features,
) -> jax.Array:
    """A token of each row: int32 [B]; that of a greedy row means nothing.

    logits_BV: float32, after bias and penalties; best_B: their maxima. position: int32 [B].

    Truncation keeps few tokens, while noise for the whole vocabulary costs more than all the rest
    (two CPU cores, eight rows: 5 ms, for 128 blocks 0.2 ms). So the blocks with the largest maxima
    are done first. For a row whose cutoff comes out above everything outside them that is exact;
    if any row's does not (a nucleus of thousands of tokens), the whole vocabulary is done, and
    taken for such rows. The noise of a token is the same in both.
    """
    vocab_size = logits_BV.shape[1]

    def scaled(x: jax.Array) -> jax.Array:
        return scale(x, best_B, rows)

    def choose(x: jax.Array, ids: jax.Array) -> jax.Array:
        _, place = select.argmax(x + gumbel(rows.seed, position, ids))
        return jnp.take_along_axis(ids, place[:, None], -1)[:, 0]

    def draw_from_all() -> jax.Array:
        ids = jnp.broadcast_to(lax.iota(jnp.int32, vocab_size), logits_BV.shape)
        return choose(truncate(scaled(logits_BV), rows, features), ids)

    truncates = features.min_p or features.top_k or features.top_p or rows.allowed is not None
    if not truncates or vocab_size <= NEAR_BLOCKS * select.BLOCK:
        return draw_from_all()

    near = select.top_blocks(logits_BV, NEAR_BLOCKS)
    floor = scaled(near.floor[:, None])[:, 0]
    cutoff, exact = _near_cutoff(
        scaled(near.values), floor, lambda: scaled(logits_BV), rows, features
    )
    tokens = choose(_cut(scaled(near.values), cutoff), near.indices)
    settled = exact | (rows.temperature < GREEDY_BELOW)
    return lax.cond(
        jnp.all(settled),
        lambda: tokens,
        lambda: jnp.where(settled, tokens, draw_from_all()),
    )


def scale(x: jax.Array, best: jax.Array, rows: RowSampling) -> jax.Array:
    """Step 5: (x - best) / temperature for x float32 [B, C] and best [B]; greedy rows take 1."""
    temperature = jnp.where(rows.temperature < GREEDY_BELOW, 1.0, rows.temperature)
    # Relative to the best logit: in logit / 1e-4 the noise would drown.
    return (x - best[:, None]) / temperature[:, None]


def truncate(x: jax.Array, rows: RowSampling, features: Features) -> jax.Array:
    """Steps 6 to 8 on whole rows: -inf for every token that min_p, top_k or top_p drops.

    x: float32 [B, V], logits over temperature, the best of each row 0.
    """
    cutoff = _min_p_top_k(x, rows, features)
    if features.top_p:
        kept = _weights(x, cutoff)
        cutoff = _top_p(x, cutoff, kept, select.total(kept), rows)
    return _cut(x, cutoff)


def gumbel(seed: jax.Array, position: jax.Array, ids: jax.Array) -> jax.Array:
    """Gumbel noise of tokens: float32 [B, C], for ids int32 [B, C] of rows with uint32 seeds [B].

    All 32 bits go into u, since among 151,936 tokens the winner is one with u near 0: there 23
    bits, as in jax.random.uniform, would leave steps of 2 % and ties.
    """
    zero = jnp.zeros_like(seed)
    key = threefry(zero, seed, zero, position.astype(jnp.uint32))
    high, low = threefry(
        key[0][:, None], key[1][:, None], jnp.zeros(ids.shape, jnp.uint32), ids.astype(jnp.uint32)
    )
    u = ((high ^ low).astype(jnp.float32) + 0.5) * 2.0**-32
    u = jnp.minimum(u, 1 - 2.0**-24)  # rounded up to 1, the noise would be -inf
    return -jnp.log(-jnp.log1p(-u))


def threefry(
    key0: jax.Array, key1: jax.Array, count0: jax.Array, count1: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 with 20 rounds: 64 bits of key and 64 of counter to 64 random bits, uint32.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Written out here because
    jax.random makes the bits of a whole row only, and in rolled loops, 3 times slower on CPU.
    """
    keys = (key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA))
    x, y = count0 + key0, count1 + key1
    for group in range(5):
        for distance in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            x = x + y
            y = x ^ (y << distance | y >> (32 - distance))
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + jnp.uint32(group + 1)
    return x, y


# ---- cutoffs: the smallest scaled logit that is kept ---------------------------------------------


def _min_p_top_k(x: jax.Array, rows: RowSampling, features: Features) -> jax.Array:
    """The cutoff [B] of min_p and top_k among scaled logits [B, C]; -inf keeps all.

    The k best of those that min_p keeps are the k best of all, or all that it keeps.
    """
    cutoff = jnp.full(x.shape[0], -jnp.inf)
    if features.min_p:
        # probability >= min_p * best probability; the best scaled logit is 0
        cutoff = jnp.log(rows.min_p)
    if features.top_k:
        wanted = jnp.maximum(rows.top_k, 1).astype(jnp.float32)
        kth = select.threshold(x, jnp.ones_like(x), wanted)
        cutoff = jnp.where(rows.top_k > 0, jnp.maximum(cutoff, kth), cutoff)
    return cutoff


def _near_cutoff(
    x: jax.Array,
    floor: jax.Array,
    everything: Callable[[], jax.Array],
    rows: RowSampling,
    features: Features,
) -> tuple[jax.Array, jax.Array]:
    """The cutoff [B] found among near tokens, and bool [B]: whether it is that of the whole row.

    x: float32 [B, C], scaled logits of the near blocks; none outside is above floor [B], which is
    -inf if nothing outside can be chosen. everything() makes the scaled logits of the whole rows.
    """

    def holds_all_above(cutoff: jax.Array) -> jax.Array:
        return (cutoff > floor) | (floor == -jnp.inf)

    cutoff = _min_p_top_k(x, rows, features)
    inside = holds_all_above(cutoff)
    # A top_k that reaches below the floor has counted too few tokens.
    counted = inside | (rows.top_k == 0)
    if features.top_p:
        kept = _weights(x, cutoff)
        mass = lax.cond(
            jnp.all(inside | (rows.top_p >= 1)),
            lambda: select.total(kept),
            lambda: jnp.where(
                inside, select.total(kept), select.total(_weights(everything(), cutoff))
            ),
        )
        cutoff = _top_p(x, cutoff, kept, mass, rows)
    return cutoff, counted & holds_all_above(cutoff)


def _cut(x: jax.Array, cutoff: jax.Array) -> jax.Array:
    return jnp.where(x >= cutoff[:, None], x, -jnp.inf)


def _weights(x: jax.Array, cutoff: jax.Array) -> jax.Array:
    """Probabilities of the kept tokens relative to the best one, 0 for the others."""
    return jnp.exp(_cut(x, cutoff))


def _top_p(
    x: jax.Array, cutoff: jax.Array, weights: jax.Array, mass: jax.Array, rows: RowSampling
) -> jax.Array:
    """The cutoff [B] raised to the edge of the nucleus; mass [B] is what all kept tokens weigh."""
    # The best token weighs 1, so it stays however small top_p is, even if float32 makes it 0.
    target = jnp.maximum(rows.top_p * mass, jnp.finfo(jnp.float32).tiny)
    edge = select.threshold(x, weights, target)
    return jnp.where(rows.top_p < 1, jnp.maximum(cutoff, edge), cutoff)
