"""What sampling should do, in float64 and plain loops, from vLLM's description of its order.

v1/sample/sampler.py (docstring), v1/sample/ops/{penalties,topk_topp_sampler}.py and
v1/sample/logits_processor/builtin.py describe it; here ties with the last kept token are kept.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.sampling import Counts, Features, RowSampling, RowSettings, set_row


@dataclasses.dataclass
class Row:
    """A row of a test: its logits, settings, and what was said so far."""

    logits: np.ndarray
    settings: RowSettings = dataclasses.field(default_factory=RowSettings)
    prompt: tuple[int, ...] = ()
    output: tuple[int, ...] = ()


def processed(row: Row) -> np.ndarray:
    """Logits after everything that comes before the temperature."""
    s = row.settings
    x = [float(v) for v in row.logits]
    for v in range(len(x)):
        if s.allowed is not None and v not in s.allowed:
            x[v] = -np.inf
        if len(row.output) < s.min_tokens and v in s.stop_ids:
            x[v] = -np.inf
        x[v] += s.bias.get(v, 0.0)
        if v in row.prompt or v in row.output:
            x[v] = x[v] / s.repetition if x[v] > 0 else x[v] * s.repetition
        x[v] -= s.frequency * row.output.count(v)
        if v in row.output:
            x[v] -= s.presence
    return np.array(x)


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def distribution(row: Row) -> tuple[np.ndarray, float]:
    """The probability of each token, and how far the nearest cutoff decision was from turning."""
    s, x, margin = row.settings, processed(row), np.inf
    if s.temperature < 1e-5:
        return np.eye(len(x))[np.argmax(x)], margin
    x = x / s.temperature
    p = softmax(x)
    if s.min_p > 0:
        margin = np.abs(p[p < p.max()] / p.max() - s.min_p).min(initial=1.0)
        x = np.where(p >= s.min_p * p.max(), x, -np.inf)
    if 0 < s.top_k < len(x):
        x = np.where(x >= sorted(x, reverse=True)[s.top_k - 1], x, -np.inf)
    if s.top_p < 1:
        p = softmax(x)
        held, edge = 0.0, np.inf
        values, which = np.unique(x, return_inverse=True)
        for value, mass in zip(values[::-1], np.bincount(which, p)[::-1], strict=True):
            if held >= s.top_p:
                break
            held, edge = held + mass, value
            margin = min(margin, abs(held - s.top_p))
        x = np.where(x >= edge, x, -np.inf)
    return softmax(x), margin


def noise(seed: int, position: int, vocab_size: int) -> np.ndarray:
    """Gumbel noise by the documented recipe."""
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position)
    bits = np.asarray(jax.random.bits(key, (vocab_size,), jnp.uint32)).astype(np.float64)
    return -np.log(-np.log1p(-(bits + 0.5) / 2**32))


def arguments(batch: list[Row]) -> dict:
    """What `sample` takes, for these rows."""
    vocab_size = len(batch[0].logits)
    rows = RowSampling.make([row.settings for row in batch], vocab_size)
    counts = Counts.empty(len(batch), vocab_size)
    longest = max(len(row.prompt) + len(row.output) for row in batch)
    ids = lambda seq: np.array([*seq] + [-1] * (longest - len(seq)), np.int32)
    for b, row in enumerate(batch):
        counts = SET_ROW(counts, b, prompt_ids=ids(row.prompt), output_ids=ids(row.output))
    return {
        "logits_BV": np.stack([row.logits for row in batch]).astype(np.float32),
        "rows": rows,
        "counts": counts,
        "position": np.array([len(row.output) for row in batch], np.int32),
        "features": Features.of(rows),
    }


SET_ROW = jax.jit(set_row)
