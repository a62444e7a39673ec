"""Routed expert products against a row-by-row float64 oracle, with everything unread poisoned."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from pallas_kernels.ragged_dot import cases, ragged_dot, xla

# Rows M over R = 6 experts: up to 24 rows take the skinny form, more the wide one.
R = 6
SKINNY, WIDE = 22, 60
ROUTINGS = {
    "even": [1, 1, 1, 1, 1, 1],
    "ragged": [5, 0, 1, 9, 3, 2],
    "all to the first": [1, 0, 0, 0, 0, 0],
    "all to a middle one": [0, 0, 1, 0, 0, 0],
    "all to the last": [0, 0, 0, 0, 0, 1],
    "every second empty": [0, 4, 0, 3, 0, 5],
}


def split(M: int, shares) -> np.ndarray:
    """M rows in proportion to the shares, none lost, zeros kept zero."""
    ends = np.round(np.cumsum(shares) * M / np.sum(shares)).astype(np.int32)
    return np.diff(ends, prepend=0).astype(np.int32)


def inputs(M, D, F, *, E=R, activation=None, dtype="float32", seed=0):
    """Zero-mean x [M, D] and w [E, (2,) D, F], of the size that keeps outputs near 1."""
    rng = np.random.default_rng(seed)
    pair = (2,) if activation else ()
    x = oracles.round_to(rng.standard_normal((M, D)), dtype)
    w = rng.standard_normal((E, *pair, D, F)) / np.sqrt(D)
    return x, oracles.round_to(w, dtype)


@functools.partial(jax.jit, static_argnames=("blocks", "activation", "out_dtype"))
def run(x, w, sizes, scale=None, first=0, blocks=None, activation=None, out_dtype=None):
    """The operation under jit."""
    return ragged_dot(
        x,
        w,
        sizes,
        scale=scale,
        blocks=blocks,
        activation=activation,
        first_expert=first,
        out_dtype=out_dtype,
    )


def poison(x, w, sizes, first=0):
    """NaN in every row and every expert that must not be read."""
    x, w = x.copy(), w.copy()
    owner = np.repeat(np.arange(len(sizes)), sizes)
    held = (owner >= first) & (owner < first + len(w))
    x[: len(owner)][~held] = np.nan
    x[len(owner) :] = np.nan
    w[np.asarray(sizes)[first : first + len(w)] == 0] = np.nan
    return x, w


def assert_rows(got, want, dtype, terms):
    """Per-row relative error within the dtype's tolerance, and exact zeros where they belong."""
    assert oracles.row_error(got, want) < oracles.tolerance(dtype, terms)


@pytest.mark.parametrize("activation", [None, "swiglu"])
@pytest.mark.parametrize("M", [SKINNY, WIDE])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_each_row_meets_its_own_expert_only(routing, M, activation):
    x, w = inputs(M, 32, 8, activation=activation)
    sizes = split(M, ROUTINGS[routing])
    x, w = poison(x, w, sizes)
    want = oracles.ragged_dot(x, np.nan_to_num(w), sizes, activation=activation)
    assert_rows(run(x, w, sizes, activation=activation), want, "float32", 32)


@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_rows_behind_the_last_group_are_zero_and_unread(M):
    x, w = inputs(M, 32, 8)
    for sizes in ([3, 0, 4, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6):
        poisoned_x, poisoned_w = poison(x, w, sizes)
        got = np.asarray(run(poisoned_x, poisoned_w, np.asarray(sizes, np.int32)))
        assert_rows(got, oracles.ragged_dot(x, w, sizes), "float32", 32)
        assert not got[sum(sizes) :].any()


@pytest.mark.parametrize(("M", "total"), [(1, 6), (2, 6), (3, 1), (5, 1)])
def test_few_rows(M, total):
    x, w = inputs(M, 32, 8, E=total)
    sizes = np.zeros(total, np.int32)
    sizes[total // 2] = M
    assert_rows(run(x, w, sizes), oracles.ragged_dot(x, w, sizes), "float32", 32)


@pytest.mark.parametrize("D", [1, 7, 40])
def test_any_inner_size(D):
    for M in (SKINNY, WIDE):
        x, w = inputs(M, D, 5)
        sizes = split(M, ROUTINGS["ragged"])
        assert_rows(run(x, w, sizes), oracles.ragged_dot(x, w, sizes), "float32", D)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_narrow_floats_accumulate_in_float32(M, dtype):
    # 1 + 640 * 2^-12 needs an accumulator that keeps 2^-12 beside 1.
    x = np.full((M, 641), 2.0**-6).astype(getattr(ml_dtypes, dtype, dtype))
    w = np.full((R, 641, 8), 2.0**-6).astype(x.dtype)
    x[:, 0], w[:, 0] = 1, 1
    sizes = split(M, ROUTINGS["ragged"])
    if dtype == "float16":
        w = w.astype(np.float32)
    got = run(x, w, sizes, out_dtype="float32")
    assert got.dtype == jnp.float32
    assert_rows(got, oracles.ragged_dot(x, w, sizes), "float32", 641)


@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_bfloat16_rounds_once_at_the_end(M):
    x, w = inputs(M, 64, 24, activation="swiglu", dtype="bfloat16")
    sizes = split(M, ROUTINGS["ragged"])
    got = run(x, w, sizes, activation="swiglu")
    assert got.dtype == jnp.bfloat16
    want = oracles.ragged_dot(x, w, sizes, activation="swiglu")
    assert oracles.row_error(got, want) < 2.0**-8


@pytest.mark.parametrize("first", [0, 2, 4])
@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_a_shard_computes_its_experts_and_leaves_the_rest_zero(M, first):
    x, w = inputs(M, 32, 8, activation="swiglu")
    sizes = split(M, ROUTINGS["ragged"])
    shard_x, shard_w = poison(x, w[first : first + 2], sizes, first)
    want = oracles.ragged_dot(
        x, w[first : first + 2], sizes, first_expert=first, activation="swiglu"
    )
    got = run(shard_x, shard_w, sizes, first=jnp.int32(first), activation="swiglu")
    assert_rows(got, want, "float32", 32)


@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_shards_on_a_mesh_add_up_to_the_whole(M):
    x, w = inputs(M, 32, 8)
    sizes = split(M, ROUTINGS["ragged"])
    mesh = Mesh(np.array(jax.devices()[:3]), ("expert",), axis_types=(AxisType.Auto,))

    def shard(x, w, sizes):
        first = jax.lax.axis_index("expert") * w.shape[0]
        return jax.lax.psum(ragged_dot(x, w, sizes, first_expert=first), "expert")

    specs = (P(), P("expert"), P())
    sharded = jax.shard_map(shard, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    assert_rows(jax.jit(sharded)(x, w, sizes), oracles.ragged_dot(x, w, sizes), "float32", 32)


@pytest.mark.parametrize("M", [SKINNY, WIDE])
@pytest.mark.parametrize(
    ("form", "blocks"),
    [
        pytest.param("int8", (1, 1, 40, 1), id="per channel"),
        pytest.param("float8_e4m3fn", (1, 1, 16, 16), id="blocks with partial edges"),
        pytest.param("int8", (2, 2, 3, 7), id="blocks no strip fits, across experts and the pair"),
        pytest.param("float8_e4m3fn", (6, 2, 64, 64), id="one scale for all"),
    ],
)
def test_scales_multiply_their_own_block(form, blocks, M):
    shape = (R, 2, 40, 24)
    x, w = inputs(M, 40, 24, activation="swiglu")
    rng = np.random.default_rng(1)
    if form == "int8":
        values = rng.integers(-127, 128, shape).astype(np.int8)
    else:
        values = oracles.round_to(w * 50, form)
    scale = rng.uniform(0.5, 2.0, [-(-n // b) for n, b in zip(shape, blocks, strict=True)])
    scale = (scale * rng.choice([-0.01, 0.01], scale.shape)).astype(np.float32)
    sizes = split(M, ROUTINGS["ragged"])
    want = oracles.ragged_dot(
        x, oracles.dequantize(values, scale, blocks), sizes, activation="swiglu"
    )
    got = run(x, values, sizes, scale, blocks=blocks, activation="swiglu")
    assert_rows(got, want, "float32", 40)


def test_scales_of_experts_without_rows_are_not_read():
    rng = np.random.default_rng(2)
    values = rng.integers(-127, 128, (R, 32, 8)).astype(np.int8)
    scale = np.full((R, 2, 1), 0.01, np.float32)
    for M in (SKINNY, WIDE):
        x, _ = inputs(M, 32, 8)
        sizes = split(M, ROUTINGS["every second empty"])
        blocks = (1, 16, 8)
        want = oracles.ragged_dot(x, oracles.dequantize(values, scale, blocks), sizes)
        poisoned = np.where((sizes == 0)[:, None, None], np.nan, scale).astype(np.float32)
        assert_rows(run(x, values, sizes, poisoned, blocks=blocks), want, "float32", 32)


def test_runs_in_a_while_loop():
    x, w = inputs(SKINNY, 8, 8)
    sizes = split(SKINNY, ROUTINGS["ragged"])
    step = lambda _, y: ragged_dot(y, w, sizes)
    got = jax.jit(lambda y, n: jax.lax.fori_loop(0, n, step, y))(x, 3)
    want = x
    for _ in range(3):
        want = oracles.ragged_dot(want, w, sizes)
    assert_rows(got, want, "float32", 3 * 8)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), wide=st.booleans())
def test_any_routing(data, wide):
    M = WIDE if wide else SKINNY
    cuts = sorted(data.draw(st.lists(st.integers(0, M), min_size=R, max_size=R)))
    sizes = np.diff(cuts, prepend=0).astype(np.int32)
    x, w = poison(*inputs(M, 32, 8), sizes)
    want = oracles.ragged_dot(x, np.nan_to_num(w), sizes)
    assert_rows(run(x, w, sizes), want, "float32", 32)


def compiled(case: cases.Case, dtype, weight, blocks=None):
    """The case compiled for this machine from shapes alone: nothing of its size is allocated."""
    spec = jax.ShapeDtypeStruct
    w = spec(case.w_shape, weight)
    scale = None
    if blocks is not None:
        counts = [-(-n // b) for n, b in zip(case.w_shape, blocks, strict=True)]
        scale = spec(counts, jnp.float32)
    fn = functools.partial(ragged_dot, blocks=blocks, activation=case.activation)
    fn = lambda x, w, sizes, scale, fn=fn: fn(x, w, sizes, scale=scale)
    args = (spec((case.rows, case.inner), dtype), w, spec((case.total,), jnp.int32), scale)
    return jax.jit(fn).lower(*args).compile()


@pytest.mark.parametrize(
    ("model", "name", "dtype", "weight", "blocks"),
    [
        ("cpu-bench", "whole/decode-8/gate_up", "float32", "float32", None),
        ("cpu-bench", "whole/prefill-512/down", "float32", "float32", None),
        ("30B-A3B", "ep8/decode-32/gate_up", "bfloat16", "bfloat16", None),
        ("30B-A3B", "ep8/decode-8/down", "bfloat16", "bfloat16", None),
        ("30B-A3B", "whole/prefill-512/down", "bfloat16", "bfloat16", None),
        ("30B-A3B", "ep8/decode-8/down", "bfloat16", "int8", (1, 768, 1)),
        ("30B-A3B", "whole/decode-8/gate_up", "float32", "float8_e4m3fn", (1, 1, 128, 128)),
        ("480B-A35B", "whole/prefill-512/gate_up", "bfloat16", "float8_e4m3fn", (1, 1, 128, 128)),
    ],
)
def test_no_more_than_one_expert_is_ever_copied(model, name, dtype, weight, blocks):
    case = next(c for c in cases.cases(model, name.split("/")[0]) if c.name.endswith(name))
    memory = compiled(case, jnp.dtype(dtype), jnp.dtype(weight), blocks).memory_analysis()
    expert = 4 * np.prod(case.w_shape[1:])
    rows = 4 * case.rows * (case.inner + case.outer)
    assert memory.temp_size_in_bytes < 3 * expert + 2 * rows
    assert memory.temp_size_in_bytes < np.prod(case.w_shape) * jnp.dtype(weight).itemsize / 2


@pytest.mark.parametrize("M", [SKINNY, WIDE])
def test_only_experts_with_rows_are_read_and_once_per_item(M, monkeypatch):
    reads = []

    def counted(read):
        def run(self, e, argument):
            jax.debug.callback(lambda e: reads.append(int(e)), e, ordered=True)
            return read(self, e, argument)

        return run

    monkeypatch.setattr(xla._Experts, "strips", counted(xla._Experts.strips))
    monkeypatch.setattr(xla._Experts, "matrices", counted(xla._Experts.matrices))
    x, w = inputs(M, 32, 8)
    sizes = split(M, ROUTINGS["ragged"])
    jax.block_until_ready(jax.jit(lambda *args: ragged_dot(*args))(x, w, sizes))
    jax.effects_barrier()
    rows = 4 if M == SKINNY else M
    assert reads == [e for e, n in enumerate(sizes) for _ in range(0, n, rows)]


def test_what_does_not_fit_together_raises():
    x, w = inputs(8, 16, 4)
    sizes = np.full(R, 1, np.int32)
    with pytest.raises(ValueError, match=r"w has shape \(6, 16, 4\), activation=swiglu needs"):
        ragged_dot(x, w, sizes, activation="swiglu")
    with pytest.raises(ValueError, match="activation 'gelu'"):
        ragged_dot(x, w, sizes, activation="gelu")
    with pytest.raises(ValueError, match=r"x \(8, 15\) is not \[M, D=16\]"):
        ragged_dot(x[:, 1:], w, sizes)
    with pytest.raises(ValueError, match="w is float16; use one of"):
        ragged_dot(x, w.astype(np.float16), sizes)
    with pytest.raises(ValueError, match="w holds 6 experts, group_sizes only 5"):
        ragged_dot(x, w, sizes[1:])
    with pytest.raises(ValueError, match=r"experts 3 \.\. 8 of only 6"):
        ragged_dot(x, w, sizes, first_expert=3)
    with pytest.raises(ValueError, match="scale and blocks together"):
        ragged_dot(x, w, sizes, blocks=(1, 16, 1))
    with pytest.raises(ValueError, match=r"needs \(6, 2, 1\)"):
        ragged_dot(x, w, sizes, scale=np.ones((6, 1, 1)), blocks=(1, 8, 4))
    with pytest.raises(ValueError, match="one size >= 1 per axis"):
        ragged_dot(x, w, sizes, scale=np.ones((6, 1)), blocks=(1, 16))
    with pytest.raises(
        ValueError, match=r"no implementation 'cuda'; use one of .*'tpu', 'gpu', 'xla'"
    ):
        ragged_dot(x, w, sizes, impl="cuda")
