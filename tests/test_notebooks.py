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

# What the demo checkpoint is known to answer in the notebooks: these lines change with its weights.
ANSWERS = {
    "What is 9 + 13?": "22",
    "What is 17 - 4?": "13",
    "Where does Mira live?": "Mira lives in Dublin.",
    "What pet does Tom have?": "Tom has a goldfish.",
    "Give river, lamp and bread in reverse order.": "bread, lamp, river",
    "Give tree, door and cup as a JSON list.": '["tree", "door", "cup"]',
}
WEATHER = [[["get_weather", {"city": "Oslo"}]], "It is 3 degrees in Oslo."]
TIMER = [[["set_timer", {"minutes": 20}]], "The timer is set for 20 minutes."]
FILLED = "if price > result:"
WRITTEN = """    if len(points) < 2:
        return points
    pivot, rest = points[0], points[1:]
    small = [point for point in rest if point < pivot]
    large = [point for point in rest if point >= pivot]
    return quicksort(small) + [pivot] + quicksort(large)
"""
LEAST_SUMS = 40  # of 48
LEAST_SHOWN = 9  # of 10 answers beside two pictures
LEAST_RIGHT = {"colour": 18, "shape": 18, "place": 16, "count": 15, "digit": 18}  # of 20
TURNS = ["4.", "7.", "At the bottom."]
TOLD = (
    "I see: top left: red circle, top: nothing, top right: nothing, left: nothing, centre: blue 7, "
    "right: green cross, bottom left: nothing, bottom: orange ring, bottom right: nothing."
)
VIDEO = ["A green square.", "A blue ring.", "A red triangle.", "At 2.5 seconds."]
LEAST_BATCH = {"sum": 0.8, "picture": 0.9}  # shares of right answers


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Keeps compiled programs, most of which the demo's notebooks and their commands share."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run(name, folder, *values, env=None):
    """Runs a notebook in a process of its own; its number of figures and the values of names."""
    found = subprocess.run(
        [sys.executable, "-m", "run_notebook", f"notebooks/{name}.py", str(folder), *values],
        cwd=ROOT,
        env={
            **os.environ,
            **(env or {}),
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


def test_quickstart(tmp_path, programs):
    found = run(
        "quickstart",
        tmp_path,
        "answers",
        "sums_right",
        "pieces",
        "written",
        "filled",
        "alone",
        "conversations",
        "formed",
        "tables",
        "crowd",
        "single",
        "fits",
        "REAL",
        env=programs,
    )
    assert found["figures"] == 1
    assert {question: found["answers"][question] for question in ANSWERS} == ANSWERS
    assert found["sums_right"] >= LEAST_SUMS
    assert len(found["pieces"]) > 4
    assert "".join(found["pieces"]).startswith("I see shapes in small pictures")
    assert found["written"].startswith(WRITTEN)
    assert found["filled"] == FILLED
    assert list(found["conversations"].values()) == [WEATHER, TIMER]
    check_forms(found["formed"])
    check_alternatives(*found["tables"])
    check_fits(found["fits"], found["REAL"])
    one, two, seven = found["crowd"]
    assert seven == found["single"]
    assert len({one, two, seven}) == 3


def check_forms(formed):
    """Each form is kept, and holds what the free answer says."""
    pet = ANSWERS["What pet does Tom have?"].removeprefix("Tom has a ").removesuffix(".")
    assert formed["free"] == f"Tom has a {pet}."
    assert json.loads(formed["json"]) == {"answer": formed["free"]}
    assert formed["choice"] == formed["free"]
    assert formed["regex"] == f"Tom has a {pet}!!!"


def check_alternatives(certain, open_):
    """The likeliest token is first, and a sum leaves less doubt than code does."""
    for table in (certain, open_):
        for step in table:
            chances = [chance for _, chance in step]
            assert len(step) == 5
            assert chances == sorted(chances, reverse=True)
            assert sum(chances) < 1 + 1e-5
    assert "".join(step[0][0] for step in certain).startswith(ANSWERS["What is 9 + 13?"])
    assert certain[0][0][1] > 0.5 > min(step[0][1] for step in open_)


def check_fits(fits, real):
    """The models named for machines fit them as they are, and what cannot fit is not said to."""
    for machine, choice in real.items():
        assert fits[choice["model"]][machine].replace(",", "").isdigit()
    # 596 M parameters in two bytes and 2,048 tokens of 114,688 bytes, at 320 GB/s.
    assert int(fits["Qwen/Qwen3-0.6B"]["T4"]) == pytest.approx(224, abs=2)
    assert fits["Qwen/Qwen3-VL-8B-Instruct"]["T4"].startswith("int8 ")
    assert fits["Qwen/Qwen3-30B-A3B-FP8"]["TPU v5e-1"] == "-"


def test_images_and_video(tmp_path, programs):
    found = run(
        "images_and_video",
        tmp_path,
        "shown",
        "right",
        "turns",
        "two_pictures",
        "times",
        "video_told",
        "same_pixels",
        "picture_positions",
        "sizes",
        env=programs,
    )
    assert found["figures"] == 5
    assert len(found["shown"]) == 10
    assert sum(found["shown"]) >= LEAST_SHOWN
    for kind, least in LEAST_RIGHT.items():
        assert found["right"].get(kind, 0) >= least, found["right"]
    assert found["turns"] == [*TURNS, TOLD]
    assert found["two_pictures"] == 2 * 9
    assert found["times"] == ["0.2", "1.4", "2.5"]
    assert found["video_told"] == VIDEO
    assert found["same_pixels"]
    assert found["picture_positions"] == [[0] * 9, [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 1, 2] * 3]
    # Blocks of 32 pixels: sides to the nearest one, or down to what the limit allows.
    assert found["sizes"]["1280 x 720"] == [40 * 22, 40 * 22]
    assert found["sizes"]["1920 x 1080"] == [60 * 34, 41 * 23]
    assert found["sizes"]["8000 x 6000"] == [147 * 110, 36 * 27]


def test_batch(tmp_path, programs):
    found = run(
        "batch",
        tmp_path,
        "COUNT",
        "killed_by",
        "first_run",
        "lost",
        "repeated",
        "kept",
        "bad",
        "errors",
        "right",
        "asked",
        "same",
        "together",
        env=programs,
    )
    assert found["figures"] == 1
    assert found["killed_by"] == -9
    assert found["COUNT"] // 2 <= found["first_run"] < found["COUNT"] - 1
    assert found["lost"] == found["repeated"] == []
    assert found["kept"]
    (error,) = found["errors"]
    assert (error["custom_id"], error["line"]) == (found["bad"], 101)
    assert "did you mean 'temperature'" in error["response"]["body"]["error"]["message"]
    for kind, least in LEAST_BATCH.items():
        assert found["right"][kind] >= least * found["asked"][kind] > 0, kind
    assert found["same"]
    assert len(found["together"]) == found["COUNT"] - 1
