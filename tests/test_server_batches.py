"""Files and batches: OpenAI's client, and a server that is stopped or killed in the middle."""

import contextlib
import io
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import time

import openai
import pytest
from fake_llm import FakeLLM
from serving import ask, running

from qwen_jax import durable
from qwen_jax.server import batches
from qwen_jax.server.files import FileStore

NEW_BATCH = {
    "input_file_id": "file-x",
    "endpoint": "/v1/completions",
    "completion_window": "24h",
}
HERE = pathlib.Path(__file__).parent


def line(i, **changes):
    body = {"model": "tiny", "messages": [{"role": "user", "content": f"item {i}"}]}
    whole = {"custom_id": f"id-{i}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return {**whole, **changes}


def lines(count):
    return "".join(json.dumps(line(i)) + "\n" for i in range(count)).encode()


def echo(prompt, index):
    return re.findall(r"item \d+", prompt)[-1]


def open_client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=5, timeout=20)


def start(client, data):
    file = client.files.create(file=("in.jsonl", data), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    ).id


def until(client, batch, *status, seconds=30):
    end = time.monotonic() + seconds
    while (found := client.batches.retrieve(batch)).status not in status:
        assert time.monotonic() < end, found
        time.sleep(0.02)
    return found


def results(client, id):
    return [json.loads(text) for text in client.files.content(id).text.splitlines()]


@pytest.fixture
def client(tmp_path):
    with running(FakeLLM(echo), state=tmp_path) as server, open_client(server.url) as client:
        yield client


def test_a_file_is_kept_listed_read_and_deleted(client):
    one = client.files.create(file=("a b.jsonl", b"one\n"), purpose="batch")
    two = client.files.create(file=("c.txt", io.BytesIO(b"x" * 300_000)), purpose="user_data")
    assert (one.bytes, one.filename, one.purpose, one.object) == (4, "a b.jsonl", "batch", "file")
    assert {file.id for file in client.files.list()} == {one.id, two.id}
    assert [file.id for file in client.files.list(purpose="batch")] == [one.id]
    assert len(client.files.list(limit=1).data) == 1
    assert client.files.retrieve(one.id) == one
    assert client.files.content(two.id).read() == b"x" * 300_000
    assert client.files.delete(one.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(one.id)


def test_a_batch_answers_every_line(client):
    bad = [line(90, body={"messages": []}), line(91, body={"messages": [], "stream": True})]
    data = lines(30) + "".join(json.dumps(x) + "\n" for x in bad).encode()
    found = until(client, start(client, data), "completed")
    assert found.request_counts.model_dump() == {"total": 32, "completed": 30, "failed": 2}
    output = {x["custom_id"]: x for x in results(client, found.output_file_id)}
    assert len(output) == 30
    for i in range(30):
        reply = output[f"id-{i}"]["response"]
        assert reply["status_code"] == 200
        assert reply["body"]["choices"][0]["message"]["content"] == f"item {i}"
    errors = {x["custom_id"]: x["response"] for x in results(client, found.error_file_id)}
    assert errors.keys() == {"id-90", "id-91"}
    assert errors["id-90"]["status_code"] == 400
    assert errors["id-90"]["body"]["error"]["param"] == "messages"
    assert client.batches.list().data[0].id == found.id


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "empty_file"),
        (b"nonsense\n", "invalid_json_line"),
        (b"[1]\n", "invalid_json_line"),
        ((json.dumps(line(1)) + "\n").encode() * 2, "duplicate_custom_id"),
        (json.dumps(line(1, method="GET")).encode(), "invalid_method"),
        (json.dumps(line(1, url="/v1/completions")).encode(), "mismatched_url"),
        (json.dumps(line(1, custom_id="")).encode(), "missing_required_parameter"),
        (json.dumps(line(1, body="x")).encode(), "invalid_body"),
    ],
)
def test_a_file_that_is_no_batch_fails_it(client, data, code):
    found = until(client, start(client, data), "failed")
    assert found.errors.data[0].code == code


def test_a_batch_of_too_many_lines_fails(tmp_path):
    with (
        running(FakeLLM(echo), state=tmp_path, max_batch_lines=3) as server,
        open_client(server.url) as client,
    ):
        found = until(client, start(client, lines(4)), "failed")
        assert found.errors.data[0].code == "too_many_requests"


def test_a_cancelled_batch_keeps_what_is_done(tmp_path):
    llm = FakeLLM(echo, pause=0.02)
    with (
        running(llm, state=tmp_path, batch_concurrency=2) as server,
        open_client(server.url) as client,
    ):
        batch = start(client, lines(200))
        while client.batches.retrieve(batch).request_counts.completed < 2:
            time.sleep(0.02)
        client.batches.cancel(batch)
        found = until(client, batch, "cancelled")
        done = len(results(client, found.output_file_id))
        assert 2 <= done == found.request_counts.completed < 200
        with pytest.raises(openai.BadRequestError, match="cancelled already"):
            client.batches.cancel(batch)


def test_a_full_queue_does_not_fail_a_batch(tmp_path):
    with (
        running(FakeLLM(echo, most=1), state=tmp_path) as server,
        open_client(server.url) as client,
    ):
        found = until(client, start(client, lines(6)), "completed")
        assert found.request_counts.completed == 6


def test_a_stopped_server_goes_on_where_it_was(tmp_path):
    with (
        running(FakeLLM(echo, pause=0.02), state=tmp_path, batch_concurrency=3) as server,
        open_client(server.url) as client,
    ):
        batch = start(client, lines(40))
        while client.batches.retrieve(batch).request_counts.completed < 5:
            time.sleep(0.02)
    llm = FakeLLM(echo)
    with running(llm, state=tmp_path) as server, open_client(server.url) as client:
        found = until(client, batch, "completed")
        ids = [x["custom_id"] for x in results(client, found.output_file_id)]
    assert sorted(ids) == sorted(f"id-{i}" for i in range(40))
    assert len(llm.engine.jobs) <= 35


PROGRAM = """
import asyncio, pathlib, random, sys
from qwen_jax.server.batch_worker import BatchWorker
from qwen_jax.server.batches import BatchStore
from qwen_jax.server.files import FileStore
assert "jax" not in sys.modules
folder = pathlib.Path(sys.argv[1])
files, store = FileStore(folder / "files"), BatchStore(folder / "batches")

async def answer(request, given):
    await asyncio.sleep(random.random() / 500)
    return {"said": request.body["messages"][0]["content"]}

async def main():
    worker = BatchWorker(store, files, answer, concurrency=4, max_lines=1000)
    worker.start()
    print("started", flush=True)
    while store.unfinished():
        await asyncio.sleep(0.01)
    await worker.stop()

asyncio.run(main())
"""


def test_a_batch_killed_at_any_moment_loses_and_repeats_nothing(tmp_path):
    files, store = FileStore(tmp_path / "files"), batches.BatchStore(tmp_path / "batches")
    file = files.add([lines(400)], filename="in.jsonl", purpose="batch")
    options = {"endpoint": "/v1/chat/completions", "window": "24h", "seconds": 86400}
    batch = store.create(input_file_id=file["id"], metadata=None, **options)["id"]
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    rng, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)], env=environment, stdout=subprocess.PIPE
        )
        with process:
            process.stdout.readline()
            with contextlib.suppress(subprocess.TimeoutExpired):
                assert process.wait(rng.random() / 10 if kills < 20 else 60) == 0
                break
            process.kill()
            kills += 1
    assert kills >= 4
    found = batches.BatchStore(tmp_path / "batches").get(batch)
    assert found["status"] == "completed"
    assert found["request_counts"] == {"total": 400, "completed": 400, "failed": 0}
    output = FileStore(tmp_path / "files").path(found["output_file_id"]).read_text().splitlines()
    said = {x["custom_id"]: x["response"]["body"]["said"] for x in map(json.loads, output)}
    assert len(output) == 400
    assert said == {f"id-{i}": f"item {i}" for i in range(400)}
    assert list((tmp_path / "batches").glob("*.output")) == []


@pytest.mark.parametrize(("status", "kept"), [("completed", False), ("failed", True)])
def test_a_start_removes_only_results_that_were_handed_over(tmp_path, status, kept):
    store = batches.BatchStore(tmp_path / "batches")
    batch = store.create(
        input_file_id="file-x", endpoint="/v1/completions", window="24h", seconds=9, metadata=None
    )
    for path in store.results(batch):
        path.write_text("{}\n")
    store.move(batch, status)
    with running(FakeLLM(echo), state=tmp_path):
        assert [path.exists() for path in store.results(batch)] == [kept, kept]


def test_a_torn_last_line_is_cut_off(tmp_path):
    path = tmp_path / "x"
    whole = [json.dumps({"custom_id": x, "response": None, "error": {}}) for x in "ab"]
    path.write_text("\n".join([*whole, '{"custom']))
    assert batches.finished([path, tmp_path / "none"]) == [["a", "b"], []]
    assert path.read_text() == "\n".join([*whole, ""])


def test_two_servers_do_not_share_a_directory(tmp_path):
    held = durable.lock(tmp_path)
    with pytest.raises(ValueError, match="in use by another process"):
        durable.lock(tmp_path)
    held.close()
    durable.lock(tmp_path).close()


def test_an_upload_that_was_cut_off_leaves_nothing(tmp_path):
    (tmp_path / "file-abc").write_bytes(b"half")
    (tmp_path / ".part").write_bytes(b"half")
    assert FileStore(tmp_path).newest_first() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("method", "path", "content", "status", "said"),
    [
        ("POST", "/v1/files", {"data": {"purpose": "batch"}}, 400, "multipart"),
        ("POST", "/v1/files", {"files": {"file": b"x"}}, 400, "purpose"),
        ("POST", "/v1/files", {"files": {"file": b"x"}, "data": {"purpose": "x"}}, 400, "purpose"),
        ("POST", "/v1/files", {"files": {"file": b"x" * 200_000}}, 413, "limit"),
        ("POST", "/v1/files", {"files": {"other": b"x"}}, 400, "unknown field"),
        (
            "POST",
            "/v1/files",
            {"content": b"--", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            400,
            "form|file",
        ),
        (
            "POST",
            "/v1/files",
            {"content": b"", "headers": {"content-type": "multipart/form-data"}},
            400,
            "form",
        ),
        ("GET", "/v1/files/file-x", {}, 404, "no file"),
        ("GET", "/v1/files/..%2f..%2fetc%2fpasswd/content", {}, 404, "no"),
        ("DELETE", "/v1/files/file-" + "0" * 32, {}, 404, "no file"),
        ("GET", "/v1/files?limit=0", {}, 400, "limit"),
        ("GET", "/v1/files?limit=²", {}, 400, "limit"),
        ("GET", "/v1/files?after=x", {}, 400, "after"),
        ("GET", "/v1/files?x=1", {}, 400, "unknown parameter"),
        ("GET", "/v1/batches/batch_x", {}, 404, "no batch"),
        ("POST", "/v1/batches/batch_x/cancel", {}, 404, "no batch"),
        ("POST", "/v1/batches", {"json": {}}, 400, "is missing"),
        (
            "POST",
            "/v1/batches",
            {"json": {"output_expires_after": {"anchor": "created_at", "seconds": 3600}}},
            400,
            "output_expires_after is not supported",
        ),
        (
            "POST",
            "/v1/batches",
            {"json": {**NEW_BATCH, "endpoint": "/v1/embeddings"}},
            400,
            "endpoint",
        ),
        (
            "POST",
            "/v1/batches",
            {"json": {**NEW_BATCH, "completion_window": "soon"}},
            400,
            "completion_window",
        ),
        (
            "POST",
            "/v1/batches",
            {"json": NEW_BATCH},
            404,
            "no file",
        ),
    ],
)  # fmt: skip
def test_bad_requests_are_told_what_is_wrong(tmp_path, method, path, content, status, said):
    changes = {"state": tmp_path, "max_upload": 10_000}
    response = ask(FakeLLM(), method, path, settings=changes, **content)
    assert response.status_code == status, response.text
    assert re.search(said, response.json()["error"]["message"]), response.text
