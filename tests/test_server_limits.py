"""Keys, sizes, times, the queue, clients that leave or are slow, and the end of the server."""

import asyncio
import json
import re
import socket
import threading
import time

import httpx
import pytest
from fake_llm import FakeLLM
from serving import ask, running

HI = {"messages": [{"role": "user", "content": "hi"}]}
CHAT = "/v1/chat/completions"


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.01)


def test_without_the_right_key_there_is_no_route():
    keys = {"settings": {"api_keys": ("one", "two")}}
    for header in ({}, {"Authorization": "Bearer thre"}, {"Authorization": "two"}):
        response = ask(FakeLLM(), "POST", CHAT, json=HI, headers=header, **keys)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
    for key in ("one", "two"):
        headers = {"Authorization": f"Bearer {key}"}
        assert ask(FakeLLM(), "POST", CHAT, json=HI, headers=headers, **keys).status_code == 200
    for path in ("/health", "/metrics", "/"):
        assert ask(FakeLLM(), "GET", path, **keys).status_code == 200


def test_a_body_over_the_limit_is_refused_announced_or_not():
    small = {"settings": {"max_body": 1000}}
    big = json.dumps({"messages": [{"role": "user", "content": "x" * 1000}]}).encode()
    headers = {"content-type": "application/json"}

    async def pieces():
        for i in range(0, len(big), 100):
            yield big[i : i + 100]

    for content in (big, pieces()):
        response = ask(FakeLLM(), "POST", CHAT, content=content, headers=headers, **small)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "too_large"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"temperature": NaN}', "NaN"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"n": ' + b"9" * 6000 + b"}", "not JSON"),
        (b'{"temperature": 1' + b"0" * 400 + b', "messages": [{"role":"user","content":"a"}]}', ""),
        (b"[" * 200_000, "nested too deep"),
        (b'{"messages":' + b'[{"content":' * 50_000 + b"1" + b"}]" * 50_000 + b"}", "nested|JSON"),
    ],
)
def test_what_is_no_request_is_told_so(content, said):
    headers = {"content-type": "application/json"}
    response = ask(FakeLLM(), "POST", CHAT, content=content, headers=headers)
    assert response.status_code == 400, response.text[:200]
    assert re.search(said, response.json()["error"]["message"])


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "hello " * 1_500_000}]},
        {"messages": [{"role": "user", "content": " " * 10_000_000}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 10_000_000}]}]},
        {"messages": [{"role": "user", "content": "a"}] * 100_000},
        {**HI, "stop_token_ids": [5] * 1_000_000},
        {**HI, "stop_token_ids": ["5"] * 1_000_000},
        {**HI, "logit_bias": {str(i): 1 for i in range(100_000)}},
        {**HI, "tools": [{"type": "function", "function": {"name": "f"}}] * 50_000},
    ],
)
def test_what_is_hopelessly_large_is_refused_without_being_worked_on(body):
    began = time.monotonic()
    response = ask(FakeLLM(), "POST", CHAT, json=body)
    assert response.status_code == 400
    assert len(response.text) < 1000
    assert time.monotonic() - began < 8, "it takes tens of seconds otherwise"


def test_json_must_be_said_to_be_json():
    response = ask(FakeLLM(), "POST", CHAT, content=json.dumps(HI).encode())
    assert response.status_code == 400
    assert "application/json" in response.json()["error"]["message"]


def test_routes_that_are_not_there_answer_in_openais_form():
    for method, path, status in (
        ("GET", "/v1/embeddings", 404), ("GET", CHAT, 405), ("GET", "/v1/models/x/y", 404),
        ("GET", "/v1/files", 404),
    ):  # fmt: skip
        response = ask(FakeLLM(), method, path)
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


def test_models_health_version_and_metrics():
    llm = FakeLLM()
    names = [m["id"] for m in ask(llm, "GET", "/v1/models").json()["data"]]
    assert names == ["tiny", "alias"]
    assert ask(llm, "GET", "/v1/models/tiny").json()["object"] == "model"
    health = ask(llm, "GET", "/health").json()
    assert health["status"] == "ok"
    assert health["kernels"] == {"paged_attention": "xla"}
    assert "version" in ask(llm, "GET", "/version").json()
    page = ask(llm, "GET", "/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")


def test_metrics_have_vllms_names_and_count():
    with running(FakeLLM()) as server, httpx.Client(base_url=server.url) as client:
        client.post(CHAT, json=HI)
        client.post(CHAT, json={**HI, "stream": True, "n": 2})
        client.post(CHAT, json={})
        client.get("/nowhere/at/all")
        text = client.get("/metrics").text
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    labels = '{engine="0",model_name="tiny"}'
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert f"vllm:{name}{labels}" in values
    assert float(values[f"vllm:prompt_tokens_total{labels}"]) == 11
    assert float(values[f"vllm:generation_tokens_total{labels}"]) == 7
    assert float(values[f"vllm:prefix_cache_hits_total{labels}"]) == 3
    assert float(values[f"vllm:num_preemptions_total{labels}"]) == 1
    assert float(values[f"vllm:time_to_first_token_seconds_count{labels}"]) == 2
    assert float(values[f"vllm:e2e_request_latency_seconds_count{labels}"]) == 2
    assert float(values[f"vllm:inter_token_latency_seconds_count{labels}"]) == 5 * 3
    assert float(values[f"vllm:request_generation_tokens_sum{labels}"]) == 6 * 3
    stop = '{engine="0",finished_reason="stop",model_name="tiny"}'
    assert float(values[f"vllm:request_success_total{stop}"]) == 3
    assert float(values[f'qwen_jax:http_responses_total{{route="{CHAT}",status="400"}}']) == 1
    assert float(values['qwen_jax:http_responses_total{route="other",status="404"}']) == 1


def test_a_full_queue_says_when_to_come_back():
    server = running(FakeLLM(pause=0.05), max_requests=2)
    with server as server, httpx.Client(base_url=server.url) as client:
        with (
            client.stream("POST", CHAT, json={**HI, "stream": True}) as one,
            client.stream("POST", CHAT, json={**HI, "stream": True}) as two,
        ):
            assert (one.status_code, two.status_code) == (200, 200)
            third = client.post(CHAT, json=HI)
            assert third.status_code == 429
            assert third.headers["retry-after"] == "1"
            assert third.json()["error"]["code"] == "queue_full"
            one.read()
            two.read()
        assert client.post(CHAT, json=HI).status_code == 200
    response = ask(FakeLLM(most=0), "POST", CHAT, json=HI)  # the engine's own queue
    assert response.status_code == 429
    # Of several prompts either all are taken or none.
    llm = FakeLLM(lambda prompt, i: "x" * 100, most=2, pause=0.01)
    response = ask(llm, "POST", "/v1/completions", json={"prompt": ["a", "b", "c"]})
    assert response.status_code == 429
    assert [job.cancelled for job in llm.engine.jobs] == [True, True]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request(stream):
    llm = FakeLLM(lambda prompt, i: "x" * 2000, pause=0.01)
    with running(llm) as server:

        async def leave():
            async with httpx.AsyncClient(base_url=server.url) as client:
                sending = client.stream("POST", CHAT, json={**HI, "stream": stream})
                task = asyncio.create_task(sending.__aenter__())
                while not llm.engine.jobs:
                    await asyncio.sleep(0.01)
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

        asyncio.run(leave())
        wait_for(lambda: llm.engine.jobs[0].cancelled)
        wait_for(lambda: httpx.get(f"{server.url}/health").json()["load"]["in_progress"] == 0)


def test_a_client_that_takes_nothing_is_given_up():
    llm = FakeLLM(lambda prompt, i: "x" * 1500)
    body = json.dumps({**HI, "stream": True, "n": 64, "logprobs": True, "top_logprobs": 20})
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with running(llm, send_timeout=0.3) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            wait_for(lambda: llm.engine.jobs and llm.engine.jobs[0].cancelled, 20)
        assert httpx.post(f"{server.url}{CHAT}", json={**HI, "max_tokens": 1}).status_code == 200


def test_a_body_that_does_not_come_is_given_up():
    with running(FakeLLM(), body_timeout=0.2) as server:
        port = int(server.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as client:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            client.settimeout(10)
            answer = client.recv(4096)
        assert b" 400 " in answer.split(b"\r\n")[0]


def test_a_request_that_takes_too_long_is_cancelled():
    llm = FakeLLM(lambda prompt, i: "x" * 2000, pause=0.01)
    response = ask(llm, "POST", CHAT, json=HI, settings={"request_timeout": 0.2})
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "timeout"
    assert llm.engine.jobs[0].cancelled


def test_a_stop_finishes_what_runs_and_refuses_what_comes():
    llm = FakeLLM(lambda prompt, i: "x" * 60, pause=0.01)
    found = {}

    def call(name, url):
        found[name] = httpx.post(f"{url}{CHAT}", json=HI, timeout=30)

    with running(llm) as server:
        thread = threading.Thread(target=call, args=("running", server.url))
        thread.start()
        wait_for(lambda: llm.engine.jobs)
        server.should_exit = True
        wait_for(lambda: httpx.get(f"{server.url}/health").status_code == 503)
        call("late", server.url)
    thread.join()
    assert found["running"].json()["choices"][0]["message"]["content"] == "x" * 60
    assert found["late"].status_code == 503
    assert found["late"].json()["error"]["code"] == "shutting_down"


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_fails_what_takes_too_long(stream):
    llm = FakeLLM(lambda prompt, i: "x" * 2000, pause=0.02)
    found = []
    with running(llm, shutdown_timeout=0.2) as server:
        url = f"{server.url}{CHAT}"
        ask_it = lambda: found.append(httpx.post(url, json={**HI, "stream": stream}, timeout=30))
        thread = threading.Thread(target=ask_it)
        thread.start()
        wait_for(lambda: llm.engine.jobs)
    thread.join()
    assert llm.engine.jobs[0].cancelled
    if stream:
        assert '"code":"shutting_down"' in found[0].text
        assert found[0].text.endswith("data: [DONE]\n\n")
    else:
        assert found[0].status_code == 503
