"""The Hopper kernels of paged attention on CPU: values, writes and races, under the interpreter.

The interpreter finds races between copies, stores and barriers, but multiplies at once, so that it
would not miss a wait for a product. What the compiler says of them, `compile_kernels.py` tells.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import paged_batches as batches
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from paged_batches import Shape, make

from pallas_kernels import hopper, registry, warpgroup
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import Facts, PagedOut, cases, gpu, schedule

H200 = Device("gpu", "NVIDIA H200")
newer = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="refused before jax 0.11")


def interpreted(test):
    """A test that runs the kernels."""
    return pytest.mark.usefixtures("a_small_hopper")(newer(test))


@pytest.fixture
def a_small_hopper():
    """The kernels see an H200 of few multiprocessors, so that each takes several items."""
    device = jax.sharding.AbstractDevice(device_kind=H200.kind, platform="gpu", num_cores=6)
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    small = dataclasses.replace(hopper.info(H200.kind), multiprocessors=6)
    with pytest.MonkeyPatch.context() as patch, jax.sharding.use_abstract_mesh(mesh):
        patch.setattr(hopper, "info", lambda kind: small)
        yield


@functools.cache
def jitted(sm_scale):
    """The kernels as the interpreter runs them; batches of the same shapes share a program."""
    how = {"sm_scale": sm_scale, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    return jax.jit(functools.partial(gpu.paged_attention, **how))


def run(q, k, v, pages, scales, row_starts, kv_lens, page_table, sm_scale=0.25):
    """The kernels under the race detector."""
    from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

    arrays = (None if x is None else jnp.asarray(x) for x in (q, k, v, pages, scales))
    rows = {"row_starts": row_starts, "kv_lens": kv_lens, "page_table": page_table}
    out = jax.block_until_ready(jitted(sm_scale)(*arrays, **rows))
    assert not interpret_pallas_call.get_races().races_found
    return PagedOut(*out)


def check(batch, **how):
    """As `paged_batches.check`."""
    return batches.check(batch, run, **how)


Wide = functools.partial(Shape, H=128, dtype="bfloat16", K=1)
CACHES = {
    "bfloat16, ratio 8, page 16": Wide(N=8, cache="bfloat16", page=16),
    "bfloat16, 2 x ratio 3, page 128": Wide(N=6, K=2, cache="bfloat16", page=128),
    "fp8, ratio 12, page 32": Wide(N=12, cache="float8_e4m3fn", scaled=True, page=32),
    "fp8 without scales, ratio 16, page 64": Wide(N=16, cache="float8_e4m3fn", page=64),
    "int8, ratio 1, page 256": Wide(N=1, cache="int8", page=256),
}


@interpreted
@pytest.mark.parametrize("cache", CACHES)
def test_short_rows_end_around_pages_and_blocks(cache):
    page = CACHES[cache].page
    lens = [1, page - 1, page, page + 1] + ([63, 64, 65, 127, 129, 200] if page == 16 else [])
    check(make([1] * len(lens), lens, CACHES[cache], width=-(-max(lens) // page)))


@interpreted
@pytest.mark.parametrize("cache", ["bfloat16, ratio 8, page 16", "fp8, ratio 12, page 32"])
def test_short_and_tall_rows_in_one_call(cache):
    # Tiles of 16 tokens (10 of ratio 12): chunks with context, whole prompts, rows of one token.
    lens = [1, 0, 20, 1, 33, 2], [130, 5, 141, 1, 33, 65]
    check(make(*lens, CACHES[cache], T=60, width=-(-141 // CACHES[cache].page)))


@interpreted
def test_a_long_row_is_shared_by_all_multiprocessors():
    # 20 blocks in 5 parts of two halves: more than `gpu_combine` takes at once.
    check(make([1], [1270], CACHES["bfloat16, ratio 8, page 16"], width=80))


@interpreted
@pytest.mark.parametrize("cache", ["bfloat16, ratio 8, page 16", "fp8, ratio 12, page 32"])
def test_slots_are_filled_again_and_again(cache, monkeypatch):
    # One multiprocessor: 11 steps of the short row in 4 slots, and of the tall one 5 in 2 slots (of
    # 8 bits 10 in 3).
    alone = dataclasses.replace(hopper.info(H200.kind), multiprocessors=1)
    monkeypatch.setattr(hopper, "info", lambda kind: alone)
    page = CACHES[cache].page
    check(make([1, 3], [700, 600], CACHES[cache], T=12, width=-(-700 // page)))


@interpreted
def test_nothing_behind_the_page_table_is_read():
    # The last row ends with the table, and a block takes twice as many pages.
    check(
        make([1] * batches.ROWS, [32] * batches.ROWS, Wide(N=8, cache="bfloat16", page=16), width=2)
    )


@interpreted
def test_the_parts_of_a_row_are_more_exact_than_its_result():
    # Queries of 0 make all weights 1: a mean, of which only the rounding is left to be seen.
    batch = make([1], [200], CACHES["bfloat16, ratio 8, page 16"], width=13)
    batch.q[:1] = 0
    got = check(batch)
    values = got.pages[batch.page_table[0]].reshape(-1, 2, 128)[:200, 1]
    mean = oracles.round_to(oracles.exact(values).mean(0), "bfloat16")
    assert np.mean(np.asarray(got.out_TNH)[0] == mean) > 0.98


@interpreted
def test_peaked_scores_stay_exact():
    # Scores of hundreds: a score of size s carries s roundoffs of float32 into the exponent.
    batch = make([1, 1], [200, 100], CACHES["bfloat16, ratio 8, page 16"], width=13)
    batch.q *= 64
    check(batch, slack=2.0)


def test_parts_cover_every_context_once_and_are_of_equal_size():
    kv_lens = jnp.asarray([1, 64, 65, 5000, 0, 129], jnp.int32)
    start = jnp.asarray([0, 1, 2, 3, 4, 4, 5], jnp.int32)
    _, tiles = schedule.Rows(start, kv_lens).one_token(6)
    parts = tiles.parts(64, 2, 20)
    # 86 blocks in 20 parts: 5 blocks each.
    np.testing.assert_array_equal(parts.count, [1, 1, 1, 16, 1, 0])
    seen = [set() for _ in range(6)]
    for tile, begin, end in zip(parts.tile, parts.begin, parts.end, strict=True):
        assert int(end) - int(begin) <= 5 * 64
        assert int(begin) % 64 == 0
        here = set(range(int(begin), int(end)))
        assert not here & seen[int(tile)]
        seen[int(tile)] |= here
    assert [len(x) for x in seen] == [1, 64, 65, 5000, 129, 0]
    for tile, (first, count) in enumerate(zip(parts.first, parts.count, strict=True)):
        assert (np.asarray(parts.tile)[int(first) : int(first + count)] == tile).all()


def test_a_million_positions_need_no_more_than_31_bits():
    B, length = 256, 2**20
    rows = schedule.Rows(jnp.arange(B + 1, dtype=jnp.int32), jnp.full(B, length, jnp.int32))
    _, tiles = rows.one_token(B)
    parts = tiles.parts(64, 2, 33)
    np.testing.assert_array_equal(parts.count, 1)
    np.testing.assert_array_equal(parts.end[:B], length)
    # The largest numbers that the kernel makes of them: positions ahead of a row times heads.
    assert length * warpgroup.ROWS < 2**31
    one = jax.tree.map(lambda x: x[:1], tiles).parts(64, 2, 33)
    assert int(one.count[0]) == 33
    assert int(one.end.max()) == length


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float8_e4m3fn", "int8"])
def test_shared_memory_fits(kv_dtype):
    facts = Facts(32, 4, 128, 128, "bfloat16", kv_dtype, kv_dtype != "bfloat16")
    for make_shape in (gpu.short_shape, gpu.tall_shape):
        shape = make_shape(facts, 1.0)
        assert not shape.split or shape.stages % shape.multipliers == 0
        line = 2 * shape.head_dim * shape.block
        bytes_ = 2 * line * shape.stages + shape.cache.itemsize * line * shape.narrow_stages
        bytes_ += 2 * warpgroup.ROWS * shape.head_dim * shape.multipliers
        # Scales, sums, barriers and what the compiler takes for reductions.
        assert bytes_ + 12 * 1024 <= hopper.info(H200.kind).shared_bytes


@newer
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"kv_heads": 8, "query_heads": 96}, None),
        ({"kv_heads": 1, "query_heads": 4, "page_size": 16}, None),
        ({"kv_dtype": "float8_e4m3fn", "page_size": 32, "scaled": True}, None),
        ({"kv_dtype": "int8", "scaled": True}, None),
        ({"head_dim": 64}, "use head_dim 128"),
        ({"dtype": "float32"}, "use bfloat16"),
        ({"kv_dtype": "float32"}, "pages are float32"),
        ({"kv_heads": 1, "query_heads": 65}, "use 64 at most"),
        ({"page_size": 8}, "a power of two from 16"),
        ({"kv_dtype": "int8", "scaled": True, "page_size": 16}, "a power of two from 32"),
    ],
)
def test_what_cannot_run_is_refused_with_what_can(changes, reason):
    plain = Facts(32, 4, 128, 64, "bfloat16", "bfloat16", False)
    got = gpu.supports(H200, dataclasses.replace(plain, **changes))
    assert (got is None) if reason is None else (reason in got)


@newer
def test_auto_takes_the_kernel_on_hopper_alone():
    plain = Facts(32, 4, 128, 64, "bfloat16", "bfloat16", False)
    assert registry.choose("paged_attention", "auto", H200, [plain]).name == "gpu"
    ampere = Device("gpu", "NVIDIA A100-SXM4-80GB")
    choice = registry.choose("paged_attention", "auto", ampere, [plain])
    assert choice.name == "xla"
    assert "no Hopper GPU" in choice.reasons["gpu"]


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the CUDA plugin: pip install -e ".[gpu]"',
)
@pytest.mark.parametrize("form", ["bf16/page-64", "fp8/page-128"])
def test_an_h200_updates_the_cache_in_place(form):
    mesh = Mesh(np.array(hopper.h200().devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    wanted = f"paged_attention/30B-A3B/whole/decode-8/{form}"
    (program,) = (p for p in cases.programs(H200) if p.name == wanted)
    place = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.args
    )
    with jax.set_mesh(mesh):
        made = jax.jit(program.fn, donate_argnums=tuple(program.carried)).lower(*args).compile()
    memory = made.memory_analysis()
    cache = jax.tree.leaves(program.args[3:5])
    assert memory.alias_size_in_bytes == sum(x.size * x.dtype.itemsize for x in cache)
    # The parts of rows: far less than a copy of the cache.
    assert memory.temp_size_in_bytes < 2 * 2**20
