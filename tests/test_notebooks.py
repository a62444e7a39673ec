"""The notebooks run, show their pictures, and say what is so; each is paired with its .ipynb."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib", reason="the extra 'notebook'")
jupytext = pytest.importorskip("jupytext", reason="the extra 'notebook'")

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))
PAIRED = (
    "python -m jupytext --to ipynb --set-formats ipynb,py:percent notebooks/*.py   (the extra "
    "'notebook') writes the .ipynb files anew"
)


def run(name, folder, *values):
    """Runs a notebook in a process of its own; its number of figures and the values of names."""
    found = subprocess.run(
        [sys.executable, "-m", "run_notebook", f"notebooks/{name}.py", str(folder), *values],
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": "--xla_backend_optimization_level=0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        },
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    for i in range((figures := json.loads(found.stdout))["figures"]):
        assert (folder / f"{i}.png").stat().st_size > 10_000
    return figures


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_that_of_its_source(path):
    source, paired = jupytext.read(path), jupytext.read(path.with_suffix(".ipynb"))
    cells = [[(c.cell_type, c.source) for c in each.cells] for each in (source, paired)]
    assert cells[0] == cells[1], PAIRED
    assert all(not c.get("outputs") for c in paired.cells), "without outputs: they are large"
    code = [c.source for c in source.cells if c.cell_type == "code"]
    assert "pip" in code[0]
    assert "change this line" in path.read_text()


def test_mesh_and_rules(tmp_path):
    found = run("mesh_and_rules", tmp_path, "differences", "totals")
    assert found["figures"] == 2
    assert found["differences"].keys() == {"ep", "tp-attention+ep"}
    assert max(found["differences"].values()) < 1e-5
    # 30.5 B parameters in two bytes, and what an eighth of the experts and all else takes.
    assert found["totals"]["replicated"] == pytest.approx(61.06, abs=0.01)
    assert found["totals"]["ep"] == pytest.approx(10.32, abs=0.01)


def test_expert_parallelism(tmp_path):
    found = run("expert_parallelism", tmp_path, "differences", "uneven", "sent", "rows_of_a_layer")
    assert found["figures"] == 4
    assert found["rows_of_a_layer"] == [512 * 4] * 4
    assert max(found["differences"].values()) < 1e-5
    # One token's 8 experts on 128 devices: the busiest reads one, the average 1/16.
    assert found["uneven"]["128"][0] == 16
    assert found["uneven"]["4"][-1] == pytest.approx(1, abs=0.01)
    # Float32 sums of 2,048 x 2,048 over two devices, there and back: 2 * 16.8 MB / 2.
    assert found["sent"]["all-reduce"][0] == pytest.approx(16.777, abs=0.001)
    last = {form: line[-1] for form, line in found["sent"].items()}
    assert last["ragged-all-to-all"] < last["reduce-scatter"] < last["all-reduce"]


def test_cache_and_long_context(tmp_path):
    found = run(
        "cache_and_long_context", tmp_path, "per_token", "fitting", "shards", "crossings", "widths"
    )
    assert found["figures"] == 3
    assert found["per_token"]["Qwen/Qwen3-30B-A3B"] == 98_304
    assert found["shards"] == {
        "ep": [16, 16, 8, 32],
        "ep+tp": [16, 16, 2, 32],
        "dp-attention+ep": [2, 16, 8, 32],
    }
    assert found["crossings"]["8"] > found["crossings"]["32"] > found["crossings"]["128"]
    assert found["widths"] == {"bfloat16": 98_304, "int8": 48 * 2 * 4 * (128 + 4)}
    by_strategy = {name.split("\n")[0]: n for name, n in found["fitting"].items()}
    assert by_strategy["dp-attention+ep"] > 3 * by_strategy["ep"] > 0


def test_collectives_and_roofline(tmp_path):
    found = run("collectives_and_roofline", tmp_path, "bars", "fits")
    assert found["figures"] == 3
    assert found["fits"]["best"]
    # XLA for TPU adds the experts' sums in bfloat16, half of what the planner counts.
    for compiled, planned in zip(*found["bars"].values(), strict=True):
        assert 0.45 * planned < compiled < 1.01 * planned
