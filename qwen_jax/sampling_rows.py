"""Sampling settings of a batch, as arrays: what each row asks for, checked once on the host.

Knows settings, rows and token counts. It knows no logits (`sampling` applies the settings) and no
requests: a row is one sequence that wants one token.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

# Below this a temperature means greedy (vLLM v1/sample/sampler.py, _SAMPLING_EPS).
GREEDY_BELOW = 1e-5


def _is_integer_below(limit: int) -> Callable[[object], bool]:
    return lambda x: isinstance(x, numbers.Integral) and 0 <= int(x) < limit


_RANGES = {
    "temperature": ("a finite number >= 0", lambda x: 0 <= x < math.inf),
    "top_k": ("an integer from 0 (off) to 2147483647", _is_integer_below(2**31)),
    "top_p": ("a number with 0 < top_p <= 1", lambda x: 0 < x <= 1),
    "min_p": ("a number with 0 <= min_p <= 1", lambda x: 0 <= x <= 1),
    "repetition": ("a finite number > 0", lambda x: 0 < x < math.inf),
    "presence": ("a finite number", math.isfinite),
    "frequency": ("a finite number", math.isfinite),
    "seed": ("an integer from 0 to 4294967295", _is_integer_below(2**32)),
    "min_tokens": ("an integer from 0 to 2147483647", _is_integer_below(2**31)),
}


@dataclasses.dataclass(frozen=True)
class RowSettings:
    """What one row asks for; the defaults change nothing. Meanings are vLLM's.

    temperature: logits are divided by it; below 1e-5 the best token is taken.
    top_k: keep the k best tokens and all that tie with the last of them; 0 keeps all.
    top_p: keep the fewest best tokens that hold this probability, and ties; 1.0 keeps all.
    min_p: keep tokens at least this probable relative to the best one.
    repetition: logits of tokens in prompt or output are divided by it if positive, else multiplied.
    presence, frequency: subtracted once, and once per occurrence, for tokens in the output.
    seed: with the position it fixes the random numbers of the row.
    min_tokens: `stop_ids` are forbidden at positions below it.
    bias: token id -> what is added to its logit.
    allowed: the only ids that may be chosen; None allows all.

    Raises ValueError naming the setting, its value and its range, or that no token is left.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    allowed: Collection[int] | None = None
    stop_ids: Collection[int] = ()

    def __post_init__(self):
        for name, (wanted, is_good) in _RANGES.items():
            value = getattr(self, name)
            if not is_good(value):
                raise ValueError(f"{name}={value} must be {wanted}")
        for token, value in self.bias.items():
            if not math.isfinite(value):
                raise ValueError(f"bias of token {token} is {value}, must be a finite number")
        if self.allowed is None:
            return
        if not self.allowed:
            raise ValueError("allowed is empty: no token could be chosen; use None to allow all")
        if self.min_tokens and set(self.allowed) <= set(self.stop_ids):
            raise ValueError(
                f"every allowed token is one of stop_ids={sorted(self.stop_ids)}, which "
                f"min_tokens={self.min_tokens} forbids: allow another one or use min_tokens=0"
            )


@struct.dataclass
class RowSampling:
    """The settings of B rows as arrays (see RowSettings), from `make`.

    temperature, top_p, min_p, repetition, presence, frequency: float32 [B]. top_k, min_tokens:
    int32 [B]. seed: uint32 [B]. bias_ids, bias: int32 and float32 [B, J]; stop_ids: int32 [B, S];
    id -1 marks an unused place. allowed: uint32 [B, ceil(V/32)] or None when all rows allow all;
    token v is bit v % 32 of word v // 32.
    """

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    repetition: jax.Array
    presence: jax.Array
    frequency: jax.Array
    seed: jax.Array
    min_tokens: jax.Array
    bias_ids: jax.Array
    bias: jax.Array
    stop_ids: jax.Array
    allowed: jax.Array | None = None

    @staticmethod
    def make(settings: Sequence[RowSettings], vocab_size: int) -> "RowSampling":
        """These rows as NumPy arrays, which jit takes as they are.

        J and S are the smallest powers of two that hold the longest row, or 0, so that few shapes
        reach the compiler. Raises ValueError for a token id outside 0 .. vocab_size - 1.
        """

        def column(name: str, dtype: type) -> Any:
            return np.array([getattr(row, name) for row in settings], dtype)

        def ids(name: str) -> Any:
            for b, row in enumerate(settings):
                _check_ids(getattr(row, name) or (), vocab_size, f"row {b}: {name}")
            return _padded([list(getattr(row, name)) for row in settings], np.int32, -1)

        allowed: Any = None
        if any(row.allowed is not None for row in settings):
            everything = range(vocab_size)
            masks = [everything if r.allowed is None else r.allowed for r in settings]
            allowed = np.stack([pack_allowed(mask, vocab_size) for mask in masks])
        return RowSampling(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            repetition=column("repetition", np.float32),
            presence=column("presence", np.float32),
            frequency=column("frequency", np.float32),
            seed=column("seed", np.uint32),
            min_tokens=column("min_tokens", np.int32),
            bias_ids=ids("bias"),
            bias=_padded([list(row.bias.values()) for row in settings], np.float32, 0.0),
            stop_ids=ids("stop_ids"),
            allowed=allowed,
        )


@dataclasses.dataclass(frozen=True)
class Features:
    """Which kinds of work a batch needs; static under jit, so that the rest is not compiled in.

    A setting whose feature is off is ignored: take `Features.of(rows)`, or a superset of it.
    """

    greedy_only: bool = False
    penalties: bool = True
    bias: bool = True
    min_tokens: bool = True
    top_k: bool = True
    top_p: bool = True
    min_p: bool = True

    @staticmethod
    def of(rows: RowSampling) -> "Features":
        """What these concrete (not traced) rows need."""
        samples = np.asarray(rows.temperature) >= GREEDY_BELOW

        def differs(name: str, neutral: float, *, where: np.ndarray | bool = True) -> bool:
            return bool(np.any((np.asarray(getattr(rows, name)) != neutral) & where))

        return Features(
            greedy_only=not samples.any(),
            penalties=differs("repetition", 1) or differs("presence", 0) or differs("frequency", 0),
            bias=bool(np.any(np.asarray(rows.bias_ids) >= 0)),
            min_tokens=differs("min_tokens", 0) and bool(np.any(np.asarray(rows.stop_ids) >= 0)),
            top_k=differs("top_k", 0, where=samples),
            top_p=differs("top_p", 1, where=samples),
            min_p=differs("min_p", 0, where=samples),
        )


@struct.dataclass
class Counts:
    """What each row has seen, for penalties: output int32 [B, V], prompt bool [B, V]."""

    output: jax.Array
    prompt: jax.Array

    @staticmethod
    def empty(batch: int, vocab_size: int) -> "Counts":
        shape = (batch, vocab_size)
        return Counts(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, bool))


def set_row(
    counts: Counts, row: jax.Array | int, *, prompt_ids: jax.Array, output_ids: jax.Array
) -> Counts:
    """Counts with one row replaced by a sequence: ids int32 [n], -1 marks an unused place."""
    vocab_size = counts.output.shape[1]
    output = jnp.zeros(vocab_size, jnp.int32).at[_or_dropped(output_ids, vocab_size)]
    prompt = jnp.zeros(vocab_size, bool).at[_or_dropped(prompt_ids, vocab_size)]
    return Counts(
        counts.output.at[row].set(output.add(1, mode="drop")),
        counts.prompt.at[row].set(prompt.set(True, mode="drop")),
    )


def update_counts(counts: Counts, tokens: jax.Array) -> Counts:
    """Counts after each row produced its token: int32 [B], negative for rows without one."""
    rows = jnp.arange(tokens.shape[0])
    columns = _or_dropped(tokens, counts.output.shape[1])
    return Counts(counts.output.at[rows, columns].add(1, mode="drop"), counts.prompt)


def pack_allowed(ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """A set of token ids as bits: uint32 [ceil(V/32)]. ValueError for an id outside the range."""
    ids = np.fromiter(ids, np.int64)
    _check_ids(ids, vocab_size, "allowed")
    mask = np.zeros(-(-vocab_size // 32) * 32, bool)
    mask[ids] = True
    return np.packbits(mask, bitorder="little").view("<u4").astype(np.uint32)


def _or_dropped(ids: jax.Array, vocab_size: int) -> jax.Array:
    """Ids for a scatter that drops what lies beyond the row: a negative id would wrap around."""
    return jnp.where(ids < 0, vocab_size, ids)


def _check_ids(ids: Iterable[int], vocab_size: int, what: str) -> None:
    bad = [int(i) for i in ids if not 0 <= i < vocab_size]
    if bad:
        raise ValueError(f"{what}: token {bad[0]} is outside the vocabulary 0 .. {vocab_size - 1}")


def _padded(rows: Sequence[Sequence[float]], dtype: type, fill: float) -> Any:
    longest = max((len(row) for row in rows), default=0)
    width = 1 << (longest - 1).bit_length() if longest else 0
    table = np.full((len(rows), width), fill, dtype)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = values
    return table
