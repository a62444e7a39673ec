"""Measuring tile sizes: real candidates, with a clock that is told what they take."""

import json
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import tuning
from pallas_kernels.device import Device
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.paged_attention import tpu_config as paged_config
from pallas_kernels.program import Program, Tunable
from pallas_kernels.ragged_dot import cases as dot_cases
from pallas_kernels.ragged_dot import tpu_config

V6E = Device("tpu", "TPU v6 lite")


@pytest.fixture
def script(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[1] / "scripts")
    monkeypatch.setattr(sys, "argv", ["tune_kernels.py", "--match", "a b"])
    import tune_kernels

    return tune_kernels


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """A directory that `tuning.lookup` reads in place of the package's."""
    monkeypatch.setattr(tuning.resources, "files", lambda package: tmp_path)
    tuning._table.cache_clear()
    yield tmp_path / "tuned"
    tuning._table.cache_clear()


def program(name, key, tiles, seconds):
    """A program whose function with some tiles *is* the time that they take, or a reason."""
    return Program(
        name, lambda x: x, (), lambda seed: (), 1, 1, 1, (), {},
        Tunable(key, tuple(tiles), lambda each: seconds[each["rows"]]),
    )  # fmt: skip


def test_the_least_sum_over_the_programs_of_a_key_wins_and_is_kept(script, tuned, capsys):
    tiles = [{"rows": n} for n in (16, 32, 64)]
    programs = [
        program("f/one", "8x8", tiles, {16: 5e-6, 32: 1e-6, 64: 2e-6}),
        program("f/two", "8x8", tiles, {16: 5e-6, 32: 9e-6, 64: 3e-6}),
        program("f/other", "8x16", tiles, {16: 4e-6, 32: "too large", 64: 8e-6}),
        program("f/none", "8x32", tiles, dict.fromkeys((16, 32, 64), "too large")),
        Program("g/fixed", lambda x: x, (), lambda seed: (), 1, 1, 1, ()),
    ]
    found = script.tune(programs, V6E, lambda program, fn: fn, tuned)
    assert tuning.lookup("f", V6E, "8x8") == {"rows": 64}
    assert tuning.lookup("f", V6E, "8x16") == {"rows": 16}
    assert tuning.lookup("f", V6E, "8x32") is None
    assert list(found) == ["f"]
    measured = json.loads((tuned / "f.json").read_text())[V6E.kind]["8x8"]["measured"]
    assert (measured["us"], measured["rule_us"]) == (5.0, 10.0)
    assert measured["programs"] == ["f/one", "f/two"]
    assert (measured["device"], measured["command"]) == (
        V6E.kind,
        "python tune_kernels.py --match 'a b'",
    )
    assert len(measured["date"]) == len("2026-01-31")
    said = capsys.readouterr().out
    assert "f/other {'rows': 32}: too large" in said
    assert "8x32: no candidate runs" in said


def test_a_later_run_replaces_its_keys_and_no_others(script, tuned):
    fast = {16: 1e-6, 32: 2e-6}
    slow = {16: 3e-6, 32: 2e-6}
    tiles = [{"rows": 16}, {"rows": 32}]
    for each in (program("f/a", "a", tiles, fast), program("f/b", "b", tiles, fast)):
        script.tune([each], V6E, lambda program, fn: fn, tuned)
    script.tune([program("f/a", "a", tiles, slow)], V6E, lambda program, fn: fn, tuned)
    assert tuning.lookup("f", V6E, "a") == {"rows": 32}
    assert tuning.lookup("f", V6E, "b") == {"rows": 16}


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_the_candidates_of_real_programs_fit_and_start_with_the_rule(kind):
    device = Device("tpu", kind)
    dots = [p for p in dot_cases.programs(device) if "/ep8/" in p.name]
    assert len(dots) > 100
    for each in dots:
        if each.name.endswith("/w8a8"):
            assert each.tunable is None, "it takes what was measured for int8"
        else:
            assert len(each.tunable.tiles) >= 2
    case = next(iter(dot_cases.cases("30B-A3B", "ep8")))
    facts = case.facts("fp8")
    found = tpu_config.candidates(facts, case.rows, case.total, device)
    assert found[0] == tpu_config.choose(facts, case.rows, case.total, device)
    assert len(set(found)) == len(found)
    assert all(tpu_config.fits(facts, each, tpu_config.tpu_info(kind)) for each in found)


def test_what_was_measured_is_what_the_attention_kernel_takes(script, tuned):
    (each,) = (
        p
        for p in paged_cases.programs(V6E)
        if p.name == "paged_attention/30B-A3B/tp4/decode-8/bf16/page-64"
    )
    assert each.tunable is not None
    wanted = {"block": 512, "longest": 512, "step": 8192, "tall_rows": 512}
    assert wanted in each.tunable.tiles
    order = list(each.tunable.tiles)

    def timer(program, fn):
        return 1e-6 if order.pop(0) == wanted else 2e-6

    script.tune([each], V6E, timer, tuned)
    tuning._table.cache_clear()  # as in a new process: naming the programs has looked it up
    facts = paged_config.Facts(8, 1, 128, 64, "bfloat16", "bfloat16", False)
    assert paged_config.choose(facts, True, V6E) == paged_config.Config(**wanted)
    assert paged_config.choose(facts, False, V6E) == paged_config.RULE


def test_the_stopwatch_times_calls_and_tells_what_does_not_run(script, monkeypatch):
    made = []

    def make(seed):
        made.append(seed)
        return (jnp.zeros(()),)

    each = Program("f/a", lambda x: x, (), make, 1, 1, 1, ())
    stopwatch = script.Stopwatch(5)
    ticks = iter(np.cumsum([0, 3, 0, 1, 0, 2, 0, 9, 0, 2]).tolist())
    # The script's clock only: JAX's own listeners read the process's.
    monkeypatch.setattr(script, "time", types.SimpleNamespace(perf_counter=lambda: next(ticks)))
    assert stopwatch(each, lambda x: x + 1) == 2

    def refused(x):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: VMEM\nmore")

    assert stopwatch(each, refused) == "RESOURCE_EXHAUSTED: VMEM"
    assert made == [0], "the inputs of a program are made once"


def test_without_an_accelerator_nothing_is_written(script, tmp_path, capsys):
    assert script.main(["--out", str(tmp_path / "tuned")]) == 1
    assert "no accelerator" in capsys.readouterr().out
    assert not (tmp_path / "tuned").exists()
