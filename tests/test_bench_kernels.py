"""What scripts/bench_kernels.py measures on an accelerator, with a tiny program on this machine."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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

    got = bench.repeated(fn, 5)(jnp.arange(4.0))
    jax.effects_barrier()
    assert len(seen) == 5
    np.testing.assert_array_equal(got, 2 * np.arange(4.0))


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
