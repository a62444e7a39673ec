"""What scripts/compile_kernels.py keeps of its results, with a compiler that is a function here."""

import json
import types

import compile_kernels
import pytest

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
