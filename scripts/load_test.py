"""Loads an OpenAI-compatible endpoint and prints what its clients feel: the time to the first
token, the time between tokens and the throughput, at several numbers of clients at once.

    python scripts/load_test.py --url http://127.0.0.1:8000 --concurrency 1,4,16 --requests 64

Each client asks, reads the stream to its end and asks again. Prompts differ from their first word
on, so that a cache of prefixes does not help, unless --shared-prefix gives them a beginning in
common. The roofline bound comes from `qwen-jax bench` or `plan`: --bound prints it beside.
Only this machine is asked unless --anywhere is given: a load test of somebody else's endpoint is an
attack.
"""

import argparse
import asyncio
import dataclasses
import ipaddress
import json
import random
import statistics
import sys
import time
import urllib.parse
from collections.abc import Sequence

import httpx

_WORDS = ["the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on"]
_HEAD = "clients    ok failed  ttft p50      p95  itl p50      p95   req/s    tok/s"


@dataclasses.dataclass
class Outcome:
    """Of one request; times in seconds, from its start.

    Attributes:
        first: of the first token; None where none came.
        gaps: between pieces that bring tokens.
        seconds: all of it.
        tokens: generated, as the endpoint counts them.
        error: what went wrong, if anything.
    """

    first: float | None = None
    gaps: list[float] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    error: str | None = None


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    _check_address(args.url, args.anywhere)
    print(_HEAD + (" of bound" if args.bound else ""))
    failed = 0
    for clients in args.concurrency:
        began = time.perf_counter()
        outcomes = asyncio.run(_run(args, clients))
        seconds = time.perf_counter() - began
        failed += _show(args, clients, outcomes, seconds)
    return 1 if failed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="without /v1")
    parser.add_argument("--model", help="default: the first that the endpoint has")
    parser.add_argument("--api-key", default="none")
    parser.add_argument("--concurrency", metavar="N,…", type=_numbers, default=[1, 4, 16])
    parser.add_argument("--requests", metavar="N", type=int, default=32, help="per concurrency")
    parser.add_argument("--prompt-words", metavar="N", type=int, default=64)
    parser.add_argument("--shared-prefix", metavar="N", type=int, default=0, help="words of it")
    parser.add_argument("--max-tokens", metavar="N", type=int, default=64)
    parser.add_argument(
        "--bound", metavar="X", type=float, help="tokens per second of the roofline"
    )
    parser.add_argument("--timeout", metavar="S", type=float, default=600.0)
    parser.add_argument("--anywhere", action="store_true", help="not only this machine")
    parser.add_argument("--json", action="store_true", help="a JSON object per line on stderr too")
    return parser.parse_args(argv)


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    if min(found) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of positive numbers: 1,4,16")
    return found


def _check_address(url: str, anywhere: bool) -> None:
    host = urllib.parse.urlsplit(url).hostname or ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local and not anywhere:
        raise SystemExit(f"{host!r} is not this machine; --anywhere if you may load it")


async def _run(args: argparse.Namespace, clients: int) -> list[Outcome]:
    """All requests of one line of the table."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    headers = {"Authorization": f"Bearer {args.api_key}"}
    async with httpx.AsyncClient(
        base_url=args.url, headers=headers, timeout=args.timeout, limits=limits
    ) as client:
        model = args.model or await _first_model(client)
        left = iter(range(args.requests))
        outcomes: list[Outcome] = []

        async def ask_until_done() -> None:
            for number in left:
                outcomes.append(await _ask(client, _body(args, model, number)))

        await asyncio.gather(*(ask_until_done() for _ in range(clients)))
    return outcomes


async def _first_model(client: httpx.AsyncClient) -> str:
    try:
        response = await client.get("/v1/models")
        return response.raise_for_status().json()["data"][0]["id"]
    except httpx.HTTPError as error:
        raise SystemExit(f"{client.base_url}v1/models: {error}") from None


def _body(args: argparse.Namespace, model: str, number: int) -> dict:
    shared = random.Random(0).choices(_WORDS, k=args.shared_prefix)
    own = random.Random(number + 1).choices(_WORDS, k=args.prompt_words)
    return {
        "model": model,
        "prompt": " ".join([*shared, *own]),
        "max_tokens": args.max_tokens,
        "ignore_eos": True,
        "seed": number,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def _ask(client: httpx.AsyncClient, body: dict) -> Outcome:
    found, began = Outcome(), time.perf_counter()
    last = began
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                text = (await response.aread()).decode(errors="replace")
                return Outcome(error=f"{response.status_code}: {text[:200]}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                piece = json.loads(line.removeprefix("data: "))
                if "error" in piece:
                    return Outcome(error=piece["error"]["message"])
                if piece.get("usage"):
                    found.tokens = piece["usage"]["completion_tokens"]
                if piece["choices"]:
                    now = time.perf_counter()
                    if found.first is None:
                        found.first = now - began
                    else:
                        found.gaps.append(now - last)
                    last = now
    except httpx.HTTPError as error:
        return Outcome(error=f"{type(error).__name__}: {error}")
    found.seconds = time.perf_counter() - began
    return found


def _show(args: argparse.Namespace, clients: int, outcomes: list[Outcome], seconds: float) -> int:
    """Prints a line; returns how many requests failed."""
    good = [o for o in outcomes if o.error is None]
    first = [o.first for o in good if o.first is not None]
    gaps = [gap for o in good for gap in o.gaps]
    rate = sum(o.tokens for o in good) / seconds
    row = {
        "clients": clients,
        "ok": len(good),
        "failed": len(outcomes) - len(good),
        "ttft_p50": _quantile(first, 0.5),
        "ttft_p95": _quantile(first, 0.95),
        "itl_p50": _quantile(gaps, 0.5),
        "itl_p95": _quantile(gaps, 0.95),
        "requests_per_s": len(good) / seconds,
        "tokens_per_s": rate,
    }
    print(
        f"{clients:7} {row['ok']:5} {row['failed']:6} {row['ttft_p50'] * 1e3:7.1f}ms "
        f"{row['ttft_p95'] * 1e3:6.1f}ms {row['itl_p50'] * 1e3:6.2f}ms "
        f"{row['itl_p95'] * 1e3:6.2f}ms {row['requests_per_s']:7.2f} {rate:8.1f}"
        + (f" {rate / args.bound:8.1%}" if args.bound else ""),
        flush=True,
    )
    if args.json:
        print(json.dumps(row), file=sys.stderr)
    for error in sorted({o.error for o in outcomes if o.error is not None})[:5]:
        print(f"        failed: {error}", file=sys.stderr)
    return row["failed"]


def _quantile(values: list[float], share: float) -> float:
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1]


if __name__ == "__main__":
    sys.exit(main())
