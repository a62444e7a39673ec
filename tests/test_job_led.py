"""One model over two processes, of which one is asked: a batch, and a server, as one process does.

A batch is killed and goes on; a server is asked, left alone in the middle, and ended.
"""

import json
import signal
import time

import httpx
import job_worker
import pytest
import serving
import tiny_llm
from batch_samples import contents, line, write
from jobs import LOST_WITHIN, job, results

import qwen_jax as qj

SMALL_CLI = ("-m", "job_cli")
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Options of the model, whose programs are kept from one job to the next."""
    programs = tmp_path_factory.mktemp("programs")
    return [
        f"--model={tiny_llm.shared_llm().name}", f"--mesh={job_worker.MESH}", "--max-model-len=256",
        "--page-size=16", "--max-num-seqs=4", f"--compilation-cache={programs}",
    ]  # fmt: skip


def completion(i, **body):
    body = {"prompt": "def f(", "max_tokens": 30, **body}
    return line(i, url=COMPLETIONS, body=body)


def lines():
    """Greedy, seeded, free and formed ones, several answers, stop strings, and wrong ones."""
    return [
        completion("greedy", temperature=0, logit_bias={"5": 2.0}),
        completion("seeded", seed=5, n=2, stop=["ing", "é"]),
        completion("free"),
        line("formed", body={"messages": HELLO, "response_format": FORM, "max_tokens": 25}),
        completion("long", prompt="x " * 400),
        b"nonsense",
        *(completion(i, prompt=[i + 1, 2, 3], temperature=0) for i in range(6)),
    ]


def test_a_batch_over_two_processes_is_killed_and_goes_on(tmp_path, model):
    llm = tiny_llm.shared_llm()
    source = write(tmp_path / "in.jsonl", lines())
    wanted = [tmp_path / name for name in ("alone.jsonl", "alone.errors.jsonl")]
    qj.run_batch(llm, source, wanted[0], model_names=[llm.name])
    found = [tmp_path / name for name in ("out.jsonl", "out.errors.jsonl")]
    command = ["batch", *model, f"--input={source}", f"--output={found[0]}", "--resume"]
    with job(*SMALL_CLI, *command) as (first, second):
        while not found[0].exists() or found[0].read_bytes().count(b"\n") < 2:
            assert first.poll() is None, first.communicate()
            time.sleep(0.002)
        first.kill()
        _, said = second.communicate(timeout=LOST_WITHIN)
    assert "process 1 of 2 ended without a word: it was killed, or has lost process 0" in said
    assert second.returncode not in (0, 1)
    assert 2 <= found[0].read_bytes().count(b"\n") < 10
    first, second = results(*SMALL_CLI, *command)
    assert (first[0], second[0], second[1]) == (1, 1, ""), (first, second)
    assert "10 answered, 2 failed, 0 left" in first[2]
    assert "of them by earlier runs" in first[2]
    assert "answered" not in second[2]
    assert contents(*found) == contents(*wanted)


ASKED = [
    (CHAT, {"messages": HELLO, "temperature": 0, "max_tokens": 20}),
    (CHAT, {"messages": HELLO, "response_format": FORM, "seed": 3, "max_tokens": 25}),
    (COMPLETIONS, {"prompt": "def f(", "seed": 3, "n": 2, "max_tokens": 20, "stop": ["ing"]}),
]


def choices(reply):
    return [choice["token_ids"] for choice in reply["choices"]]


def streamed(events):
    """The tokens of a stream's only choice."""
    pieces = [json.loads(text)["choices"][0] for text in events if text != "[DONE]"]
    return [token for piece in pieces for token in piece["token_ids"]]


def listen(stderr):
    """Reads what a server says until it can be asked; its address."""
    said = [""]
    while "startup complete" not in said[-1]:
        said.append(stderr.readline())
        assert said[-1], said
    return next(text for text in said if text.startswith("serving")).split()[3]


def ask_all(url):
    """The tokens of `ASKED` at once, and of the last one as a stream."""
    found = []
    with httpx.Client(base_url=url, timeout=120) as client:
        for path, body in ASKED:
            reply = client.post(path, json={**body, "return_token_ids": True})
            assert reply.status_code == 200, reply.text
            found.append(choices(reply.json()))
        stream = {"prompt": "def f(", "max_tokens": 200, "temperature": 0, "ignore_eos": True}
        stream |= {"stream": True, "return_token_ids": True}
        with client.stream("POST", COMPLETIONS, json=stream) as response:
            assert next(response.iter_lines()).startswith("data: ")  # and then nobody listens
        reply = client.post(COMPLETIONS, json={**stream, "max_tokens": 20})
        found.append(streamed(serving.events(reply)))
        deadline = time.monotonic() + 60
        while client.get("/health").json()["load"]["running"] and time.monotonic() < deadline:
            time.sleep(0.01)
        total = client.get("/health").json()["load"]
        assert (total["running"], total["kv_cache_usage"]) == (0, 0)
    return found


def test_a_server_over_two_processes_says_what_one_says_and_ends_when_it_is_told(model):
    llm = tiny_llm.shared_llm()
    options = ("--port=0", "--no-warmup", "--state-dir=off", "--no-access-log")
    with job(*SMALL_CLI, "serve", *model, *options) as (first, second):
        url = listen(first.stderr)
        with serving.running(llm, request_timeout=120.0) as alone:
            wanted = ask_all(alone.url)
        assert ask_all(url) == wanted
        for process in (second, first):
            process.send_signal(signal.SIGTERM)
        ended = [process.communicate(timeout=LOST_WITHIN) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), ended
    assert "error" not in ended[0][1] + ended[1][1]
    assert [len(tokens) for tokens in wanted[3:]] == [20]
