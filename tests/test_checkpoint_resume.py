"""Conversions that were interrupted: killed, resumed, refused, and never taken for finished."""

import fcntl
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from checkpoint_samples import (
    Conversions,
    Interrupted,
    content,
    finished,
    interrupt,
)

from qwen_jax.weights.checkpoint import convert, resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Conversions:
    return Conversions(tmp_path_factory)


def test_an_interrupted_conversion_goes_on_where_it_was(made, tmp_path):
    source, whole = made("moe_fp8")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt(source, out)
    assert not out.exists()
    before = finished(partial)
    assert len(before) > 20
    told = []
    convert(source, out, progress=told.append)
    assert told[0].done == told[0].skipped > 0.4 * told[0].total
    assert told[-1].done == told[-1].total
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)
    assert not partial.exists()


KILLED = """
import os, signal, sys
from qwen_jax.weights.checkpoint import convert
def kill(transfer):
    if transfer.done >= 0.5 * transfer.total:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=kill)
"""


def test_a_killed_conversion_ends_identical(made, tmp_path):
    source, whole = made("moe_fp8")
    out = tmp_path / "out"
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not out.exists()
    before = finished(tmp_path / "out.partial")
    convert(source, out)
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)


def test_a_kill_before_the_directory_gets_its_name_costs_nothing(made, tmp_path, monkeypatch):
    source, whole = made("moe_fp8")
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(old, new):
        if pathlib.Path(new) == out:
            raise Interrupted
        rename(old, new)

    rename = os.replace
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Interrupted):
        convert(source, out)
    monkeypatch.undo()
    assert not out.exists()
    before = finished(partial)
    convert(source, out)
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)


def test_a_torn_line_of_the_journal_was_not_finished(made, tmp_path):
    source, whole = made("moe_fp8")
    out = tmp_path / "out"
    interrupt(source, out)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-25])
    assert content(convert(source, out)) == content(whole)


def test_a_finished_leaf_that_lost_a_file_is_written_again(made, tmp_path):
    source, whole = made("moe_fp8")
    interrupt(source, tmp_path / "out")
    (tmp_path / "out.partial" / next(iter(finished(tmp_path / "out.partial")))).unlink()
    assert content(convert(source, tmp_path / "out")) == content(whole)


def test_an_unfinished_conversion_is_no_checkpoint(made, tmp_path):
    source, _ = made("moe_fp8")
    interrupt(source, tmp_path / "out")
    with pytest.raises(ValueError, match="an unfinished conversion: run the same conversion again"):
        resolve(tmp_path / "out.partial")
    with pytest.raises(FileNotFoundError, match=r"unfinished conversion is at .*out\.partial"):
        resolve(tmp_path / "out")


def test_another_conversion_does_not_go_on_from_it(made, tmp_path):
    source, _ = made("moe")
    interrupt(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="the beginning of another conversion"):
        convert(source, tmp_path / "out", quantization="int8")
    os.utime(source / "model.safetensors")
    with pytest.raises(FileExistsError, match="the beginning of another conversion"):
        convert(source, tmp_path / "out")


def test_two_conversions_do_not_write_the_same_directory(made, tmp_path):
    source, _ = made("moe")
    (tmp_path / "out.partial").mkdir()
    handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # even this must keep a conversion out
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(source, tmp_path / "out")
    os.close(handle)
    assert convert(source, tmp_path / "out").is_dir()
