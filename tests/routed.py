"""Routed products for the tests of `ragged_dot`'s kernels, with NaN wherever nothing may look.

Knows the oracle and what all kernels have in common; which kernel runs, and where, a `Kernel` says.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles

from pallas_kernels.ragged_dot import Facts, ragged_dot

GATE_UP = Facts(128, 2048, 768, "swiglu", "bfloat16", "bfloat16", "bfloat16")
FP8 = {"w_dtype": "float8_e4m3fn", "scale_dtype": "bfloat16"}


def product(**changes) -> Facts:
    """The facts of 30B-A3B's gate and up in bfloat16, but for these."""
    return dataclasses.replace(GATE_UP, **changes)


def weights(form, shape, *, scale_dtype="bfloat16", seed=0):
    """Values, scale and blocks of w [E, (2,) D, F] in float32, bfloat16, fp8 or int8 form."""
    rng = np.random.default_rng(seed)
    inner = shape[-2]
    w = rng.standard_normal(shape) / np.sqrt(inner)
    if form in ("float32", "bfloat16"):
        return oracles.round_to(w, form), None, None
    blocks = (1,) * (len(shape) - 2) + ((128, 128) if form == "fp8" else (inner, 1))
    scale_shape = [-(-n // b) for n, b in zip(shape, blocks, strict=True)]
    scale = rng.uniform(0.5, 2.0, scale_shape).astype(np.float32) / 64
    if form == "int8":
        return rng.integers(-127, 128, shape).astype(np.int8), scale / np.sqrt(inner), blocks
    # Subnormal numbers, both zeros and the largest number are among the values.
    values = w * 64 * rng.choice([1, 2.0**-7, -0.0], shape)
    values.flat[:2] = 448, -448
    return oracles.round_to(values, "float8_e4m3fn"), oracles.round_to(scale, scale_dtype), blocks


def rows(M, inner, dtype="bfloat16", *, seed=1):
    """Zero-mean x [M, D]."""
    return oracles.round_to(np.random.default_rng(seed).standard_normal((M, inner)), dtype)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An implementation, the sizes it is tested at, and where it is interpreted.

    Attributes:
        fn: `ragged_dot` of its module.
        config: its tiles, unless a test has others.
        here: the context of the chip; it fails the test if there was a race.
        experts, inner, outer: E, D and F.
        reads: what it makes of the rows before it multiplies them.
    """

    fn: Callable[..., jax.Array]
    config: Any
    here: Callable[[], contextlib.AbstractContextManager[None]]
    experts: int
    inner: int
    outer: int
    reads: Callable[[np.ndarray], np.ndarray] = oracles.exact

    def weights(self, form, *, pair=True, E=None, **more):
        """`weights` of E experts of the kernel's sizes."""
        dims = (2, self.inner, self.outer) if pair else (self.inner, self.outer)
        return weights(form, (E or self.experts, *dims), **more)

    def rows(self, M, dtype="bfloat16"):
        """`rows` of the kernel's width."""
        return rows(M, self.inner, dtype)

    def check(
        self, form, sizes, M, *, first=0, E=None, pair=True, out="float32", config=None, **more
    ):
        """One case against the oracle, with NaN wherever the kernel has nothing to look for."""
        w, scale, blocks = self.weights(form, pair=pair, E=E, **more)
        x = self.rows(M, "float32" if form == "float32" else "bfloat16")
        plain = w if blocks is None else oracles.dequantize(w, scale, blocks)
        activation = "swiglu" if pair else None
        read = self.reads(x)
        want = oracles.ragged_dot(read, plain, sizes, first_expert=first, activation=activation)
        owner = np.repeat(np.arange(len(sizes)), sizes)
        unread = np.ones(M, bool)
        unread[: len(owner)] = (owner < first) | (owner >= first + len(w))
        x[unread] = np.nan
        empty = np.asarray(sizes)[first : first + len(w)] == 0
        (w if scale is None else scale)[empty] = np.nan
        how = {"blocks": blocks, "activation": activation, "out_dtype": jnp.dtype(out)}
        fn = functools.partial(self.fn, config=config or self.config, **how)
        run = jax.jit(lambda x, w, s, n, first: fn(x, w, n, scale=s, first_expert=first))
        with self.here():
            got = np.asarray(run(x, w, scale, np.asarray(sizes, np.int32), np.int32(first)))
        assert got.dtype == jnp.dtype(out)
        assert not got[unread].any()
        # The sum is in float32; the result is rounded once.
        assert oracles.row_error(got, want) < (1e-5 if out == "float32" else 2.0**-8)

    def check_by_name(self, name: str, sizes):
        """The operation finds it by its name; it chooses tiles itself, and rounds to x's dtype."""
        w, scale, blocks = self.weights("fp8")
        x, sizes = self.rows(sum(sizes) + 5), np.asarray(sizes, np.int32)
        fn = functools.partial(ragged_dot, blocks=blocks, activation="swiglu", impl=name)
        with self.here():
            got = np.asarray(jax.jit(lambda x, w, n, s: fn(x, w, n, scale=s))(x, w, sizes, scale))
        want = oracles.ragged_dot(
            x, oracles.dequantize(w, scale, blocks), sizes, activation="swiglu"
        )
        assert got.dtype == jnp.bfloat16
        assert oracles.row_error(got, want) < 2.0**-8
