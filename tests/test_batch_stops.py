"""Batches that are stopped: by ctrl-C, by faults, by kill -9; nothing is lost or repeated."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
from batch_samples import contents, echo, read, without_times, write_batch
from fake_llm import FakeLLM

import qwen_jax as qj
from qwen_jax import durable
from qwen_jax.batch.run import Interrupted

HERE = pathlib.Path(__file__).parent


@pytest.fixture
def files(tmp_path):
    return write_batch(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an uninterrupted run writes."""
    files = write_batch(tmp_path_factory.mktemp("whole"))
    qj.run_batch(FakeLLM(echo), *files[:2])
    return contents(*files[1:])


def interrupted_run(llm, files, *, after, kind=signal.SIGINT, **options):
    """A signal when some answers are there; gives the summary."""

    def press():
        while not files[1].exists() or files[1].read_bytes().count(b"\n") < after:
            time.sleep(0.005)
        os.kill(os.getpid(), kind)

    thread = threading.Thread(target=press)
    thread.start()
    with pytest.raises(Interrupted) as caught:
        qj.run_batch(llm, *files[:2], in_flight=4, **options)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    return caught.value.summary


def test_an_interrupt_finishes_what_runs(files, whole):
    slow, heard = FakeLLM(echo, pause=0.05), []
    summary = interrupted_run(
        slow, files, after=3, grace=30, on_stop=lambda: heard.append(len(slow.engine.jobs))
    )
    assert len(heard) == 1
    assert summary.completed >= 3 < summary.left
    assert len(slow.engine.jobs) == summary.completed <= heard[0] + 4
    assert len(read(files[1])) == summary.completed
    qj.run_batch(FakeLLM(echo), *files[:2], resume=True)
    assert contents(*files[1:]) == whole


def test_an_interrupt_without_grace_drops_what_runs(files, whole):
    slow = FakeLLM(echo, pause=0.1)
    summary = interrupted_run(slow, files, after=2, kind=signal.SIGTERM, grace=0.0)
    assert len(slow.engine.jobs) > summary.completed == len(read(files[1]))
    qj.run_batch(FakeLLM(echo), *files[:2], resume=True)
    assert contents(*files[1:]) == whole


def test_faults_of_ours_are_errors_that_may_be_tried_again(files, whole):
    broken = FakeLLM(echo, fails=RuntimeError("the device is hot"))
    summary = qj.run_batch(broken, *files[:2])
    assert (summary.completed, summary.failed) == (0, 33)
    statuses = [x["response"]["status_code"] for x in read(files[2]) if x["response"]]
    assert sorted(statuses) == [400] + [500] * 30
    llm = FakeLLM(echo)
    assert qj.run_batch(llm, *files[:2], resume=True).completed == 0
    summary = qj.run_batch(llm, *files[:2], resume=True, retry_errors=True)
    assert (summary.completed, summary.failed) == (30, 3)
    assert contents(*files[1:]) == whole


def test_an_engine_that_has_stopped_ends_the_batch(files, whole):
    closed = FakeLLM(echo)
    closed.engine.close()
    with pytest.raises(RuntimeError, match="the engine has stopped"):
        qj.run_batch(closed, *files[:2])
    assert read(files[1]) == []
    qj.run_batch(FakeLLM(echo), *files[:2], resume=True)
    assert contents(*files[1:]) == whole


def test_a_full_disk_ends_the_batch(files, whole, monkeypatch):
    writes = []

    def full(file):
        writes.append(file)
        if len(writes) > 2:
            raise OSError(28, "No space left on device")
        file.flush()

    monkeypatch.setattr(durable, "sync", full)
    with pytest.raises(OSError, match="No space left"):
        qj.run_batch(FakeLLM(echo), *files[:2])
    monkeypatch.undo()
    qj.run_batch(FakeLLM(echo), *files[:2], resume=True)
    assert contents(*files[1:]) == whole


# ---- a process that is killed --------------------------------------------------------------------

PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
import qwen_jax as qj
from fake_llm import FakeLLM
from batch_samples import echo
summary = qj.run_batch(FakeLLM(echo, pause=0.004), *sys.argv[1:3], shard=sys.argv[3], resume=True)
print(summary.left)
"""


def start(files, shard):
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, files[:2]), shard],
        env=environment, stdout=subprocess.PIPE,
    )  # fmt: skip


def size(path):
    return path.stat().st_size if path.exists() else 0


def test_two_processes_killed_and_resumed_lose_and_repeat_nothing(files, whole):
    parts = {f"{i}/2": files[1].with_name(f"out-0000{i}-of-00002.jsonl") for i in (0, 1)}
    rng = random.Random(1)
    for kills in range(2):
        running = {shard: start(files, shard) for shard in parts}
        grown = {shard: size(path) + rng.randrange(1, 1500) for shard, path in parts.items()}
        for shard, process in running.items():
            while size(parts[shard]) < grown[shard] and process.poll() is None:
                time.sleep(0.001)
            process.kill()
            process.wait()
            process.stdout.close()
        assert any(len(path.read_bytes().splitlines()) < 15 for path in parts.values()), kills
    running = [start(files, shard) for shard in parts]
    assert [process.communicate(timeout=120)[0] for process in running] == [b"0\n", b"0\n"]
    assert without_times(read(*parts.values())) == whole[0]
    errors = [path.with_name(path.name.replace("out-", "out.errors-")) for path in parts.values()]
    assert {(x["file"], x["line"]): x for x in read(*errors)} == whole[1]
