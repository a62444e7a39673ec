"""Hours of mixed load with faults against a server that it starts: nothing may leak or fail.

    PYTHONPATH=tests python -m tiny tiny-moe
    python scripts/soak_server.py --model tiny-moe --minutes 30 -- --max-num-seqs 8 --page-size 16

Some clients ask for what a server must answer: each request is seeded, was first answered while the
server had nothing else to do, and must get the same answer every time. Others do what goes wrong:
they leave, send half a body or a bad one, read slowly, cancel batches. Once a minute a line says
how many requests there were, the server's memory (RSS, of Linux) and the cache in use. At the end,
with all clients gone, no page may be in use, and memory may not have grown since a quarter of the
time by more than --growth.
"""

import argparse
import asyncio
import contextlib
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import httpx
from soak_clients import Client, Counts

_GOOD, _START = 4, 600.0  # clients that ask well; seconds for the server to start


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    with tempfile.TemporaryDirectory() as state, _serving(args, state) as (process, address):
        return asyncio.run(_soak(args, process.pid, address))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", metavar="M", type=float, default=30.0)
    parser.add_argument("--pause", metavar="S", type=float, default=0.5, help="between requests")
    parser.add_argument("--growth", metavar="MIB", type=float, default=32.0, help="at most")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of who does what when")
    parser.add_argument("options", nargs="*", help="of qwen-jax serve, after --")
    return parser.parse_args(argv)


@contextlib.contextmanager
def _serving(
    args: argparse.Namespace, state: str
) -> Iterator[tuple[subprocess.Popen, tuple[str, int]]]:
    """The server as a process, which must end when it is told to; and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
    command = [sys.executable, "-m", "qwen_jax.cli", "serve", "--model", args.model, "--quiet"]
    command += ["--port", str(address[1]), "--state-dir", state, "--no-access-log", *args.options]
    process = subprocess.Popen(command)
    try:
        yield process, address
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        print(f"the server ended with {code}", flush=True)


async def _soak(args: argparse.Namespace, pid: int, address: tuple[str, int]) -> int:
    counts = Counts()
    async with httpx.AsyncClient(
        base_url=f"http://{address[0]}:{address[1]}", timeout=600
    ) as client:
        await _started(client, pid)
        clients = Client(client, address, counts)
        await clients.learn()
        grown = await _load(args, clients, pid)
        await _empty(client, counts)
    counts.must(grown <= args.growth, f"memory grew by {grown:.1f} MiB")
    print(f"{counts.line()}; {len(counts.wrong)} wrong; memory grew by {grown:+.1f} MiB")
    return 1 if counts.wrong else 0


async def _started(client: httpx.AsyncClient, pid: int) -> None:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        _rss(pid)  # raises when the process is gone
        with contextlib.suppress(httpx.TransportError):
            (await client.get("/health")).raise_for_status()
            return
        await asyncio.sleep(0.5)
    raise SystemExit(f"the server did not start within {_START:g} seconds")


async def _load(args: argparse.Namespace, clients: Client, pid: int) -> float:
    """All clients at once; returns by how much memory grew after a quarter of the time."""
    began = time.monotonic()
    end = began + 60 * args.minutes
    tasks = [
        asyncio.create_task(_again(do, clients.counts, random.Random(args.seed + i), end, args))
        for i, do in enumerate((clients.good,) * _GOOD + clients.faults)
    ]
    quarter = None
    while time.monotonic() < end:
        now = time.monotonic()
        rss = _rss(pid)
        if quarter is None and now - began >= (end - began) / 4:
            quarter = rss
        usage = await _gauge(clients.http, "kv_cache_usage_perc")
        running = await _gauge(clients.http, "num_requests_running")
        print(
            f"{(now - began) / 60:5.1f} min  {rss:7.1f} MiB  cache {usage:6.1%}  "
            f"running {running:2.0f}  {clients.counts.line()}",
            flush=True,
        )
        await asyncio.sleep(min(60.0, args.minutes * 3, max(end - time.monotonic(), 0)))
    await asyncio.gather(*tasks)
    return _rss(pid) - (_rss(pid) if quarter is None else quarter)


async def _again(
    do: Callable[[random.Random], Awaitable[None]],
    counts: Counts,
    rng: random.Random,
    end: float,
    args: argparse.Namespace,
) -> None:
    """One client, until the time is over. A connection that breaks on it is the server's fault."""
    while time.monotonic() < end:
        try:
            await do(rng)
        except (httpx.HTTPError, OSError, EOFError, StopAsyncIteration) as error:
            counts.must(False, f"{do.__name__}: {error!r}")
        await asyncio.sleep(args.pause * 2 * rng.random())


async def _empty(client: httpx.AsyncClient, counts: Counts) -> None:
    """With nobody there, no request runs and no page is in use."""
    left = {}
    for _ in range(100):
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        left = {name: await _gauge(client, name) for name in names}
        if not any(left.values()):
            return
        await asyncio.sleep(0.1)
    counts.must(False, f"nobody is there, and yet {left}")


async def _gauge(http: httpx.AsyncClient, name: str) -> float:
    text = (await http.get("/metrics")).text
    found = re.search(rf"^vllm:{name}\{{.*\}} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else -1.0


def _rss(pid: int) -> float:
    """MiB of a process in memory."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


if __name__ == "__main__":
    sys.exit(main())
