"""What `soak_server.py` asks of a server, well and badly. Knows HTTP; knows no process."""

import asyncio
import collections
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import httpx

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
_SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}, "b": {"enum": ["x"]}},
    "required": ["n", "b"],
    "additionalProperties": False,
}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_FORM = {"type": "json_schema", "json_schema": {"name": "s", "schema": _SCHEMA}}
_WORDS = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on"]
BAD: list[bytes] = [  # each is to be refused with 4xx
    b"{",
    b"\xff\xfe",
    b'{"messages": null}',
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": -1}',
    b'{"messages": [{"role": "user", "content": "a"}], "temprature": 1}',
    b'{"messages": [{"role": "user", "content": "a"}], "model": "gpt-4"}',
    b'{"messages": [{"role": "user", "content": "a"}], "stop": [' + b'"x",' * 5000 + b'"x"]}',
    b'{"messages": [{"role": "user", "content": "' + b"x" * 2_000_000 + b'"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "tool_choice": "required", "tools": '
    b'[{"type": "function", "function": {"name": "f", "parameters": {"type": "strin"}}}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "file:///etc/passwd"}}]}]}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": '
    b'{"url": "http://127.0.0.1/a.png"}}]}]}',
]


def good_requests(count: int) -> list[tuple[str, dict]]:
    """(route, body) of seeded requests of every kind."""
    found = []
    for i in range(count):
        rng = random.Random(i)
        text = " ".join(rng.choices(_WORDS, k=rng.randint(1, 24)))
        body: dict[str, Any] = {
            "seed": i,
            "max_tokens": rng.randint(4, 40),
            "ignore_eos": i % 2 > 0,
        }
        if i % 3 == 0:
            found.append((TEXT, body | {"prompt": text, "n": 1 + i % 2, "logprobs": 2}))
            continue
        body |= {"messages": [{"role": "user", "content": text}]}
        match i % 5:
            case 0:
                body |= {"response_format": _FORM, "max_tokens": 120, "ignore_eos": False}
            case 1:
                body |= {"tools": [_TOOL], "tool_choice": "required", "max_tokens": 120}
                body |= {"parallel_tool_calls": False, "ignore_eos": False}
            case 2:
                body |= {"n": 2, "temperature": 0.7, "top_p": 0.9, "presence_penalty": 0.5}
            case _:
                body |= {"temperature": 0}
        found.append((CHAT, body))
    return found


@dataclasses.dataclass
class Counts:
    """What has happened so far; ``wrong`` names what may not."""

    done: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)

    def must(self, condition: bool, what: str) -> None:
        """Notes what is wrong, unless the condition holds."""
        if not condition:
            self.wrong.append(what)
            print(f"WRONG: {what}", flush=True)

    def line(self) -> str:
        """How many of each kind."""
        return ", ".join(f"{count} {kind}" for kind, count in sorted(self.done.items()))


class Client:
    """What clients do, well or badly."""

    def __init__(self, http: httpx.AsyncClient, address: tuple[str, int], counts: Counts):
        self.http, self.address, self.counts = http, address, counts
        self.goods = good_requests(24)
        self.answers: dict[tuple[int, bool], Any] = {}

    @property
    def faults(self) -> tuple:
        """Everything but `good`, to be done by a client each."""
        return self.bad, self.leaves_a_stream, self.leaves, self.slow, self.batch

    async def learn(self) -> None:
        """Asks everything once, one after the other."""
        for number, (route, body) in enumerate(self.goods):
            for stream in (False, True):
                self.answers[number, stream] = await self._answer(route, body, stream)

    async def good(self, rng: random.Random) -> None:
        number, stream = rng.randrange(len(self.goods)), rng.random() < 0.5
        route, body = self.goods[number]
        try:
            found = await self._answer(route, body, stream)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            self.counts.must(False, f"good request {number} failed: {error!r}")
            return
        expected = self.answers[number, stream]
        same = found == expected
        self.counts.must(same, f"good request {number} ({stream=}): {found} is not {expected}")
        self.counts.done["good"] += 1

    async def _answer(self, route: str, body: dict, stream: bool) -> Any:
        """The texts and calls of all choices, and how they ended."""
        if not stream:
            reply = (await self.http.post(route, json=body)).raise_for_status().json()
            return sorted(_shown(c.get("message") or c, c) for c in reply["choices"])
        parts: dict[int, list] = collections.defaultdict(lambda: ["", "", None])
        async with self.http.stream("POST", route, json={**body, "stream": True}) as response:
            response.raise_for_status()
            async for piece in _pieces(response):
                for choice in piece["choices"]:
                    text, call, end = _shown(choice.get("delta") or choice, choice)
                    part = parts[choice["index"]]
                    part[0], part[1], part[2] = part[0] + text, part[1] + call, end or part[2]
        return sorted(tuple(part) for part in parts.values())

    async def bad(self, rng: random.Random) -> None:
        content = rng.choice(BAD)
        headers = {"content-type": "application/json"}
        status = (await self.http.post(CHAT, content=content, headers=headers)).status_code
        self.counts.must(400 <= status < 500, f"{content[:80]!r} got {status}")
        self.counts.done["bad body"] += 1

    async def leaves_a_stream(self, rng: random.Random) -> None:
        route, body = rng.choice(self.goods)
        long = {**body, "stream": True, "max_tokens": 150, "ignore_eos": True}
        async with self.http.stream("POST", route, json=long) as response:
            lines = response.aiter_lines()
            for _ in range(rng.randint(0, 5)):
                await anext(lines)
        self.counts.done["left a stream"] += 1

    async def leaves(self, rng: random.Random) -> None:
        """Goes while its answer is made, or before its body is whole."""
        route, body = rng.choice(self.goods)
        content = json.dumps({**body, "max_tokens": 150, "ignore_eos": True}).encode()
        whole = rng.random() < 0.5
        _, writer = await self._open(route, content, len(content) if whole else 40)
        await asyncio.sleep(rng.random())
        writer.close()
        self.counts.done["left" if whole else "left within its body"] += 1

    async def slow(self, rng: random.Random) -> None:
        """A body a few bytes at a time, and an answer read so too."""
        content = json.dumps({**self.goods[0][1], "stream": True}).encode()
        reader, writer = await self._open(self.goods[0][0], content, 0)
        for start in range(0, len(content), 16):
            writer.write(content[start : start + 16])
            await asyncio.sleep(0.05)
        whole = b""
        while piece := await asyncio.wait_for(reader.read(64), 600):
            whole += piece
            await asyncio.sleep(0.01)
        writer.close()
        self.counts.must(b"[DONE]" in whole, f"a slow client got {whole[-200:]!r}")
        self.counts.done["slow"] += 1

    async def batch(self, rng: random.Random) -> None:
        """A batch to its end, or cancelled; then its files are removed."""
        lines = [
            {"custom_id": str(i), "method": "POST", "url": CHAT, "body": body}
            for i, (route, body) in enumerate(self.goods)
            if route == CHAT
        ]
        data = "".join(json.dumps(line) + "\n" for line in lines).encode()
        files = {"file": ("in.jsonl", data)}
        file = (await self.http.post("/v1/files", data={"purpose": "batch"}, files=files)).json()
        made = {"input_file_id": file["id"], "endpoint": CHAT, "completion_window": "24h"}
        batch = (await self.http.post("/v1/batches", json=made)).json()
        cancel = rng.random() < 0.5
        if cancel:
            await asyncio.sleep(rng.random() / 2)
            await self.http.post(f"/v1/batches/{batch['id']}/cancel")
        while batch["status"] not in ("completed", "cancelled", "failed"):
            await asyncio.sleep(0.5)
            batch = (await self.http.get(f"/v1/batches/{batch['id']}")).json()
        if batch["output_file_id"]:
            await self._check(batch["output_file_id"])
        counts = batch["request_counts"]
        whole = batch["status"] == "completed" and counts["completed"] == len(lines)
        self.counts.must(whole or cancel, f"a batch ended so: {batch}")
        for name in ("input_file_id", "output_file_id", "error_file_id"):
            if batch[name]:
                await self.http.delete(f"/v1/files/{batch[name]}")
        self.counts.done["cancelled batch" if cancel else "batch"] += 1

    async def _check(self, file: str) -> None:
        """Whether the lines of a batch's output are the answers that were learned."""
        output = (await self.http.get(f"/v1/files/{file}/content")).text
        for line in map(json.loads, output.splitlines()):
            choices = line["response"]["body"]["choices"]
            found = sorted(_shown(choice["message"], choice) for choice in choices)
            same = found == self.answers[int(line["custom_id"]), False]
            self.counts.must(same, f"line {line['custom_id']} of a batch: {found}")

    async def _open(self, route: str, content: bytes, sent: int):
        """A connection on which the head of a request and ``sent`` bytes of its body have gone."""
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(
            f"POST {route} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: "
            f"application/json\r\nContent-Length: {len(content)}\r\n\r\n".encode()
            + content[:sent]
        )
        await writer.drain()
        return reader, writer


def _shown(said: dict, choice: dict) -> tuple[str, str, str | None]:
    calls = "".join(
        (call["function"].get("name") or "") + (call["function"].get("arguments") or "")
        for call in said.get("tool_calls") or ()
    )
    text = said.get("content") or said.get("text") or ""
    return text, calls, choice["finish_reason"]


async def _pieces(response: httpx.Response) -> AsyncIterator[dict]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            piece = json.loads(line.removeprefix("data: "))
            if "error" in piece:
                raise ValueError(piece["error"]["message"])
            yield piece
