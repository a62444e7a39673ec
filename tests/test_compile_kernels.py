"""What scripts/compile_kernels.py keeps of its results, with a compiler that is a function here."""

import json
import types

import compile_kernels
import pytest
import tabulate_kernels

NOW = {"source": "5", "compiler": "c"}


@pytest.fixture(autouse=True)
def constant_identity(monkeypatch):
    monkeypatch.setattr(compile_kernels, "identity", lambda device, op: NOW)


class Pretence:
    """A context of `multiprocessing` whose processes send what a script says, and are gone."""

    def __init__(self, script):
        self.script, self.starts = iter(script), []

    def Pipe(self):
        messages = iter(next(self.script))

        def recv():
            for message in messages:
                return message
            raise EOFError

        ours = types.SimpleNamespace(poll=lambda timeout: True, recv=recv)
        return ours, types.SimpleNamespace(close=lambda: None)

    def Process(self, *, args, **_):
        self.starts.append(args[-1])
        nothing = lambda: None
        return types.SimpleNamespace(start=nothing, kill=nothing, join=nothing)


def run(monkeypatch, out, script):
    """Status of a run for v6e whose worker processes send these messages."""
    processes = Pretence(script)
    monkeypatch.setattr(compile_kernels.multiprocessing, "get_context", lambda how: processes)
    monkeypatch.setattr(compile_kernels.os, "environ", {})
    return compile_kernels.main(["--device", "v6e", "--out", str(out)]), processes.starts


def done(name, **more):
    return "result", {"name": name, "seconds": 2.0, "temporary": 0, "kernels": [], **more}


def test_each_outcome_is_counted_and_a_failure_costs_only_its_own_program(
    monkeypatch, tmp_path, capsys
):
    spill = {"kernel": "k", "registers": 168, "spilled": 8, "shared": 64, "serialized": False}
    refused = ("result", {"name": "ragged_dot/c", "seconds": 0.0, "refused": "too wide"})
    first = [refused, ("start", "ragged_dot/a"), done("ragged_dot/a"), ("start", "ragged_dot/b")]
    script = [
        [*first, ("error", "MosaicError: no")],
        [("start", "ragged_dot/d")],  # and the process is gone
        [("start", "ragged_dot/e"), done("ragged_dot/e", kernels=[spill]), ("done", None)],
    ]
    out = tmp_path / "out.jsonl"
    status, starts = run(monkeypatch, out, script)
    assert status == 1
    said = capsys.readouterr().out
    assert "v6e ragged_dot/c: skipped: too wide" in said
    assert "failed: v6e ragged_dot/b: MosaicError: no" in said
    assert "failed: v6e ragged_dot/d: the compiler's process died of it" in said
    assert "k: 168 registers, 8 B spilled" in said
    assert "2 compiled (1 spill registers), 1 skipped, 2 failed" in said
    assert starts[1] == {"ragged_dot/a", "ragged_dot/b", "ragged_dot/c"}
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"][-1] for line in lines] == list("cabde")
    assert all(NOW.items() <= line.items() for line in lines)


def test_what_a_file_has_of_the_same_sources_is_not_compiled_again(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    lines = [
        {"device": "v6e", "name": "ragged_dot/same", **NOW},
        {"device": "v6e", "name": "ragged_dot/older", **NOW, "source": "4"},
        {"device": "v6e", "name": "ragged_dot/other-compiler", **NOW, "compiler": "b"},
        {"device": "v6e", "name": "ragged_dot/failed", **NOW, "error": "no"},
        {"device": "v5e", "name": "ragged_dot/elsewhere", **NOW},
    ]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, starts = run(monkeypatch, out, [[("done", None)]])
    assert (status, starts) == (0, [{"ragged_dot/same"}])
    assert "0 failed, 0 s; 1 were done before" in capsys.readouterr().out
    assert len(out.read_text().splitlines()) == len(lines)


def test_a_table_counts_each_program_once_and_lists_what_is_odd(tmp_path):
    kernel = {"spilled": 0, "shared": 64, "serialized": False}
    common = {"device": "h200", "seconds": 1.5, **NOW}
    lines = [
        {"name": "f/8B/a", **common, "error": "an older try"},
        {"name": "f/8B/a", **common, "kernels": [kernel, {**kernel, "spilled": 8}]},
        {"name": "f/8B/b", **common, "kernels": [{**kernel, "serialized": True, "shared": 96}]},
        {"name": "f/8B/c", **common, "error": "Mosaic\nhas no idea"},
        {"name": "f/8B/d", **common, "seconds": 0.0, "refused": "too wide"},
        {"name": "f/8B/e", **common, "seconds": 0.0, "refused": "too wide"},
        {"name": "f/0.6B/a", **common, "kernels": [kernel]},
    ]
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    for file, part in zip(files, (lines[:3], lines[3:]), strict=True):
        file.write_text("".join(json.dumps(line) + "\n" for line in part))
    tabulate_kernels.main([*map(str, files), "--out", str(tmp_path / "table.json")])
    found = json.loads((tmp_path / "table.json").read_text())
    assert found["total"] == {"compiled": 3, "skipped": 2, "failed": 1, "seconds": 6.0}
    assert found["sources"] == ["h200 f 5"]
    small, large = found["programs"]
    assert small == {
        "device": "h200", "op": "f", "model": "0.6B", "compiled": 1, "skipped": 0, "failed": 0,
        "seconds": 1.5, "shared_bytes": 64,
    }  # fmt: skip
    assert large["refused"] == {"too wide": 2}
    assert large["errors"] == {"f/8B/c": "Mosaic"}
    assert large["spilled_bytes"] == {"f/8B/a": 8}
    assert large["serialized"] == ["f/8B/b"]
    assert large["shared_bytes"] == 96
