"""What scripts/bench_kernels.py measures on an accelerator, with a tiny program on this machine."""

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct

from pallas_kernels.device import Device
from pallas_kernels.program import Program
from pallas_kernels.ragged_dot import cases, ragged_dot
from qwen_jax import roofline

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import bench_kernels

    return bench_kernels


def test_calls_follow_each_other_inside_of_one_program(bench):
    seen = []

    def fn(x):
        jax.debug.callback(lambda: seen.append(1))
        return 2 * x

    kept, got = bench.repeated(fn, {}, 5)(jnp.arange(4.0))
    jax.effects_barrier()
    assert len(seen) == 5
    assert not kept
    np.testing.assert_array_equal(got, 2 * np.arange(4.0))


@struct.dataclass
class Stepped:
    """A result with a cache."""

    out: jax.Array
    cache: jax.Array | None


def step(x, cache):
    """Counts the call in the first of the cache."""
    return Stepped(x + 1, cache.at[0].add(1))


def test_a_cache_goes_from_call_to_call_in_place(bench):
    run = bench.repeated(step, {1: "cache"}, 5)
    x, cache = jnp.zeros(3), jnp.zeros(4096)
    compiled = run.lower(x, cache).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == cache.nbytes
    assert not re.search(r"f32\[4096\]\S* copy\(", compiled.as_text())
    kept, got = run(x, cache)
    assert list(kept) == [1]
    assert float(kept[1][0]) == 5
    np.testing.assert_array_equal(got.out, np.ones(3))
    assert got.cache is None


def test_a_measurement_leaves_its_inputs_to_the_next_one(bench):
    inputs = (jnp.zeros(3), jnp.zeros(8))
    for _ in range(2):
        assert 0 < bench.fastest(step, inputs, {1: "cache"}, 3) < 1
    np.testing.assert_array_equal(inputs[1], np.zeros(8))


def test_what_cannot_run_has_its_reason_in_its_row_and_the_others_run(bench, capsys, monkeypatch):
    def broken(x):
        raise NotImplementedError("no cuDNN here")

    program = Program(
        "f/tiny", broken, (), lambda seed: (jnp.ones(4),), 1e3, 1e3, 0.0, (),
        {"cudnn": broken, "lax": lambda x: 2 * x},
    )  # fmt: skip
    rows = list(bench.measure(program, roofline.Machine(1e12, 1e9), repeats=2))
    assert [row["what"] for row in rows if "seconds" in row] == ["lax"]
    errors = {row["what"]: row["error"] for row in rows if "error" in row}
    assert errors == dict.fromkeys(["kernel", "cudnn"], "NotImplementedError: no cuDNN here")
    assert capsys.readouterr().out.count("no cuDNN here") == 2
    for names, status in ((["kernel", "cudnn"], 1), (["cudnn"], 0)):
        table = [row for row in rows if row["what"] in names]
        monkeypatch.setattr(bench, "measured", lambda args, table=table: table)
        assert bench.main([]) == status


def test_a_program_and_its_baselines_have_a_row_each_beside_the_limit(bench, capsys):
    spec = jax.ShapeDtypeStruct
    args = (spec((8, 64), jnp.float32), spec((4, 64, 32), jnp.float32), spec((4,), jnp.int32))
    make = lambda seed: (*(jnp.ones(a.shape) for a in args[:2]), jnp.full(4, 2, jnp.int32))
    program = Program(
        "ragged_dot/tiny", ragged_dot, args, make, 2e6, 1e3, 0.0, (), {"lax": jax.lax.ragged_dot}
    )
    rows = list(bench.measure(program, roofline.Machine(1e12, 1e9), repeats=2))
    assert [row["what"] for row in rows] == ["kernel", "lax"]
    # 2 MB at 1 TB/s take longer than 1,000 operations at 1 GFLOP/s.
    assert all(row["bound"] == pytest.approx(2e-6) for row in rows)
    assert all(0 < row["seconds"] < 1 for row in rows)
    assert capsys.readouterr().out.count("of the limit") == 2


def test_no_kernel_for_a_device_is_said(bench):
    with pytest.raises(ValueError, match="no kernel for cpu has a name with 'decode-1/'"):
        bench.main(["--match", "decode-1/"])


def test_an_h200_has_its_own_programs_and_others_to_compare_with():
    found = {p.name: p for p in cases.programs(Device("gpu", "NVIDIA H200"))}
    plain = found["ragged_dot/30B-A3B/whole/decode-8/down/bf16"]
    assert {"xla", "lax"} <= set(plain.baselines)
    assert set(found["ragged_dot/30B-A3B/ep8/decode-8/down/bf16"].baselines) == {"xla"}
    # 52 of 128 experts have rows, of 768 x 2048 weights in 2 bytes.
    assert plain.moved == pytest.approx(51 * 768 * 2048 * 2, rel=0.05)
    assert not [name for name in found if name.endswith("int8")]
