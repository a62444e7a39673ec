"""`qwen-jax plan`: what it prints, proposes, draws and refuses."""

import json

import pytest

from qwen_jax import cli
from qwen_jax.commands import plan_text

IMPOSSIBLE = ["--model", "Qwen/Qwen3-VL-235B-A22B-Thinking", "--topology", "v6e:2x2"]


def test_the_command_prints_a_plan(capsys):
    argv = ["plan", "--model", "Qwen/Qwen3-30B-A3B", "--topology", "v5e:2x4", "--batch", "8"]
    assert cli.main([*argv, "--fast"]) == 0
    out = capsys.readouterr().out
    assert "v5e:2x4, 8 devices" in out
    assert "decode" in out
    assert cli.main([*argv, "--fast", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"]
    held = found["bytes_per_device"]
    assert held["peak"] == held["weights"] + held["cache"] + held["temporary"] < held["limit"]
    assert {"op", "bytes", "count"} <= set(found["collectives"][0])
    assert found["bound"]["limited_by"] == "memory bandwidth"
    assert found["proposal"] is None


def test_the_command_says_what_would_fit(capsys):
    argv = ["plan", "--model", "Qwen3-30B-A3B", "--devices", "v5e:2x2", "--context", "32768"]
    assert cli.main([*argv, "--batch", "16", "--fast"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out
    assert "The smallest that fits:" in out


def test_the_command_ranks(capsys):
    argv = ["plan", "--model", "Qwen3-30B-A3B", "--topology", "v5e:2x4", "--search"]
    assert cli.main(argv) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["mesh", "strategy"]
    assert len(rows) > 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--topology", "v5e:2x4"], "a model is needed"),
        (["--model", "Qwen3-30B-A3B"], "a machine is needed"),
        (["--model", "Qwen3-30B-A3B", "--topology", "v9:2"], "no chip 'v9'"),
        (["--model", "Qwen3-30B-A3B", "--topology", "v5e:8", "--context", "99999"], "40,960"),
    ],
)
def test_the_command_refuses_in_one_line(capsys, argv, message):
    assert cli.main(["plan", *argv]) == 2
    assert message in capsys.readouterr().err


def test_an_impossible_plan_says_by_how_much_and_what_would_do(capsys):
    assert cli.main(["plan", *IMPOSSIBLE, "--json"]) == 0  # nothing is compiled: it cannot be
    found = json.loads(capsys.readouterr().out)
    held = found["bytes_per_device"]
    assert not found["fits"]
    assert found["source"] == "arithmetic"
    assert found["excess"] == held["peak"] - held["limit"] > 80e9  # 471 GB on four of 32 GiB
    better = found["proposal"]
    assert better["fits"]
    assert better["devices"] == 8  # 236 GB of 8 bits on 8 x 32.6 GB; bfloat16 needs twice as many
    assert better["load"]["quantization"] in ("fp8", "int8")
    out = plan_text.lines("Qwen3-VL-235B-A22B-Thinking", found)
    assert f"{found['excess'] / 1e9:,.2f} GB per device" in out
    assert out.count("DOES NOT FIT") == 1
    assert out.index("The smallest that fits:") < out.index(better["topology"])


def test_a_plot_shows_the_plan_and_what_would_fit(tmp_path):
    figure = pytest.importorskip("qwen_jax.commands.plan_plot").figure
    pytest.importorskip("matplotlib")
    parts = {"weights": 8e9, "cache": 2e9, "temporary": 1e9, "peak": 11e9, "limit": 10e9}
    bound = {
        "decode_seconds": {"memory": 0.004, "arithmetic": 0.001, "links": 0.002},
        "prefill_seconds": {"memory": 0.01, "arithmetic": 0.03, "links": 0.02},
        "decode_tokens_per_s": 2000.0,
        "prefill_tokens_per_s": 68266.0,
    }
    load = {"batch": 8, "context": 4096, "chunk": 2048, "quantization": None, "kv_dtype": "auto"}
    report = {
        "topology": "v5e:2x4",
        "mesh": {"expert": 8},
        "strategy": "ep",
        "load": load,
        "fits": False,
        "excess": 1e9,
        "bytes_per_device": parts,
        "bound": bound,
        "proposal": None,
    }
    better = {**report, "fits": True, "topology": "v5e:4x4", "excess": 0}
    drawn = figure("Qwen3-30B-A3B", {**report, "proposal": better})
    memory, decode, prefill = drawn.axes
    widths = [bar.get_width() for bar in memory.patches]
    assert widths == [8.0, 2.0, 1.0] * 2
    lefts = [bar.get_x() for bar in memory.patches]
    assert lefts == [0.0, 8.0, 10.0] * 2
    assert [line.get_xdata()[0] for line in memory.lines] == [10.0, 10.0]
    assert [label.get_text() for label in memory.get_yticklabels()] == [
        "v5e:2x4\n1.00 GB\ntoo much",
        "v5e:4x4\nfits",
    ]
    assert [bar.get_width() for bar in decode.patches] == [4.0, 1.0, 2.0]
    assert decode.get_title() == "decode of 8 rows: at most 2,000 tokens/s"
    assert decode.texts[0].get_text().strip() == "4 ms, the limit"
    assert prefill.texts[1].get_text().strip() == "30 ms, the limit"


def test_a_plot_is_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "plan.png"
    argv = ["plan", "--model", "Qwen3-30B-A3B", "--devices", "h200:1", "--plot", str(file)]
    assert cli.main(argv) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("more", [["--plot", "plan.txt"], ["--plot", "plan.png", "--search"]])
def test_a_plot_of_no_picture_or_of_many_plans_is_refused(capsys, more):
    argv = ["plan", "--model", "Qwen3-30B-A3B", "--devices", "h200:1", *more]
    assert cli.main(argv) == 2
    assert f"--plot {more[1]}" in capsys.readouterr().err
