"""Compiling for TPUs that are not here: a sample of what scripts/compile_kernels.py compiles.

Needs libtpu (the extra "aot"). The programs run as processes of their own, because libtpu reads the
environment once.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

SCRIPTS = pathlib.Path(__file__).parents[1] / "scripts"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason='needs libtpu: pip install -e ".[aot]"'
)


def run(script: str, *args: str) -> str:
    """What a script printed; its status is 0 or the test fails with all it said."""
    command = [sys.executable, str(SCRIPTS / script), *args]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("device", ["v5e", "v7x"])
def test_kernels_compile_at_a_published_models_shapes(device):
    match = "30B-A3B/(ep8|ep2tp4)/decode-32/gate_up"
    out = run("compile_kernels.py", "--device", device, "--match", match)
    assert out.count("ep2tp4/decode-32/gate_up/") == 3
    assert out.count("skipped: width 192 of the results is not a multiple of 128") == 3
    assert "3 compiled (0 spill registers), 3 skipped, 0 failed" in out


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Qwen3-30B-A3B-FP8"])
def test_a_decode_step_calls_the_kernel_and_copies_no_experts(model):
    found = json.loads(run("compile_step.py", "--model", model, "--layers", "2"))
    assert found["kernels"]["ragged_dot"] == "tpu"
    dtype = "float8_e4m3fn" if model.endswith("FP8") else "bfloat16"
    assert found["calls"][f"ragged_dot_{dtype}"] == 2 * 2
    assert found["copies"] == found["missing"] == []
    assert found["peak_ratio"] == pytest.approx(1, abs=0.02)


def test_a_decode_step_sends_tokens_to_their_experts_alone():
    asked = ("--model", "Qwen3-30B-A3B", "--device", "v5e:2x4", "--mesh", "expert=8")
    out = run("compile_step.py", *asked, "--layers", "2", "--dispatch", "ragged-all-to-all")
    found = json.loads(out)
    assert found["ragged_exchanges"] == 2 * 2  # there and back
    assert found["copies"] == found["missing"] == []
    assert found["peak_ratio"] == pytest.approx(1, abs=0.02)


def test_plans_are_the_compilers_within_two_percent():
    asked = ("--model", "Qwen3-30B-A3B", "--topology", "v5e:2x4", "--layers", "2", "--json")
    steps = [json.loads(line) for line in run("compile_tpu.py", *asked).splitlines()]
    assert [step["step"] for step in steps] == ["decode", "prefill"]
    for step in steps:
        planned, compiled = step["planned"], step["compiled"]
        assert planned["held"] == pytest.approx(compiled["held"], rel=1e-3)
        assert planned["peak"] == pytest.approx(compiled["peak"], rel=0.02)
        assert step["off"] == pytest.approx(planned["peak"] / compiled["peak"] - 1, abs=1e-4)
        assert step["cache_donated"]
        assert step["missing"] == step["copied_like_weights_or_cache"] == []


def test_the_static_schedule_of_decode_is_near_the_bandwidth_bound():
    out = run("bench_kernels.py", "--device", "v6e", "--match", "30B-A3B/ep8/decode-32/gate_up/fp8")
    ratio = float(out.splitlines()[-1].split()[-2])
    assert 1 <= ratio < 1.2
