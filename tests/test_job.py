"""One job of two real processes with four virtual devices each, held against one with eight.

Loads, converts, generates; and what is said when a process is lost, fails or has other options.
"""

import json
import time
from unittest import mock

import job_worker
import pytest
import tiny_llm
from jobs import CLI, LOST_WITHIN, job, results

from qwen_jax.weights import pieces
from qwen_jax.weights.checkpoint import convert

WORKER = ("-m", "job_worker")


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The small checkpoint with a file for each expert."""
    path = tmp_path_factory.mktemp("job") / "converted"
    with mock.patch.multiple(pieces, _SMALLEST=1 << 12, _LARGEST=1 << 12):
        return convert(tiny_llm.directory(), path)


@pytest.fixture(scope="module")
def found(converted):
    """What two processes say that load and generate, by task."""
    model = tiny_llm.directory()
    tasks = (f"load={model}", f"load={converted}", f"generate={converted}")
    ended = results(*WORKER, *tasks)
    assert [status for status, _, _ in ended] == [0, 0], ended
    return [json.loads(out) for _, out, _ in ended]


def test_two_processes_say_what_one_says(found, converted):
    expected = json.loads(json.dumps(job_worker.texts(tiny_llm.shared_llm())))
    assert len(expected[-1]) > 10
    said = [own[f"generate={converted}"] for own in found]
    assert [own["texts"] for own in said] == [expected, expected]
    assert said[0]["kv_tokens"] == said[1]["kv_tokens"]


def test_a_process_reads_the_bytes_of_its_own_shards(found, converted):
    for own in found:
        files, arrays = own[f"load={tiny_llm.directory()}"], own[f"load={converted}"]
        for each in (files, arrays):
            assert each["equal"]
            assert each["shards"] > 4 * 10
            assert each["mine"] < 0.8 * each["all"]
        assert files["read"] == files["mine"]
        # Beside the arrays: a description of each, and a checksum of each file.
        assert arrays["mine"] <= arrays["read"] < arrays["mine"] + 20_000


def test_a_conversion_is_done_once(tmp_path):
    model, out = tiny_llm.directory(), tmp_path / "out"
    first, second = results(*CLI, "convert", f"--model={model}", f"--out={out}")
    assert (first[0], second[0]) == (0, 0), (first, second)
    assert f"done: qwen-jax chat --model {out}" in first[2]
    assert "done" not in second[2]
    both = [
        json.loads((p / "manifest.json").read_text()) for p in (out, convert(model, tmp_path / "x"))
    ]
    assert both[0]["arrays"] == both[1]["arrays"]


def test_process_0_alone_reads_stdin_and_writes():
    command = ["generate", f"--model={tiny_llm.directory()}", "--prompt=-", "--json"]
    command += [
        "--max-tokens=5",
        "--temperature=0",
        f"--mesh={job_worker.MESH}",
        "--max-num-seqs=1",
    ]
    command += ["--max-model-len=64", "--compilation-cache=off", "--max-num-batched-tokens=16"]
    first, second = results(*CLI, *command, stdin=("def f(", "something else"))
    assert (first[0], second[0], second[1]) == (0, 0, ""), (first, second)
    said = json.loads(first[1])
    llm = tiny_llm.shared_llm()
    expected = llm.generate("def f(", job_worker.STREAMED, use_tqdm=False)[0].outputs[0]
    assert said["prompt"] == "def f("
    assert said["outputs"][0]["token_ids"] == expected.token_ids[:5]
    assert "Generation: 5 tokens" in first[2]
    assert "Generation" not in second[2]


@pytest.mark.parametrize(
    ("victim", "first", "message"),
    [
        (1, "works", "process 0 of 2 ends: process 1 was lost: no sign of it for 3 s\n"),
        (1, "done", "process 0 of 2 ends: process 1 was lost: no sign of it for 3 s\n"),
        (0, "works", "process 1 has lost process 0\n"),
    ],
)
def test_a_lost_process_ends_the_other_with_a_word(victim, first, message):
    with job(*WORKER, f"wait={first}") as started:
        for one in started:
            assert any(line == "ready\n" for line in one.stderr)
        began = time.monotonic()
        started[victim].kill()
        survivor = started[1 - victim]
        _, said = survivor.communicate(timeout=LOST_WITHIN)
        assert said.endswith(message)
        assert survivor.returncode not in (0, None)
        assert time.monotonic() - began < LOST_WITHIN


def test_a_process_with_other_options_ends_the_job():
    command = (
        *CLI,
        "info",
        "--model=Qwen3-0.6B",
        "--load-format=dummy",
    )
    first, second = results(*command, each=((), ("--json",)))
    why = "process 1 was started with json=True, process 0 with json=False"
    assert (first[0], second[0]) == (1, 2), (first, second)
    assert f"process 0 of 2 ends: process 1 has failed: {why}" in first[2]
    assert f"qwen-jax: error: {why}" in second[2]
