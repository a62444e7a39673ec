"""Checks that `qwen-jax batch` loses and repeats nothing, however often it is killed.

Makes a small random checkpoint and a file of chats, completions and wrong lines; answers it once
without an interruption; then again in shards at once, with kill -9 at random moments, each time
resumed; and compares the answers line by line. Only the time in the replies may differ. Needs the
repository's tests/ on PYTHONPATH, for the checkpoint.

    PYTHONPATH=tests python scripts/check_batch.py --kills 20 --lines 400
"""

import argparse
import json
import pathlib
import random
import subprocess
import sys
import tempfile
import time

import tiny

OPTIONS = ["--max-model-len", "256", "--max-num-seqs", "8", "--page-size", "16", "--quiet"]


def write_input(path: pathlib.Path, count: int) -> int:
    """``count`` requests, greedy, seeded and neither, and one wrong line to ten; how many lines."""
    lines = []
    for i in range(count):
        body = {"max_tokens": 1 + i * 7 % 24}
        body |= [{"temperature": 0}, {"seed": i}, {}][i % 3]
        if i % 2:
            url, body["prompt"] = "/v1/completions", f"item {i} of"
        else:
            url = "/v1/chat/completions"
            body["messages"] = [{"role": "user", "content": f"say {i}"}]
        request = {"custom_id": f"id-{i}", "method": "POST", "url": url, "body": body}
        lines.append(json.dumps(request))
        if i % 10 == 0:
            lines.append(["", "nonsense", lines[0], "{}"][i // 10 % 4])
    path.write_text("\n".join(lines))
    return len(lines)


def start(work: pathlib.Path, output: str, shard: str) -> subprocess.Popen:
    """A process that answers a shard."""
    command = [sys.executable, "-m", "qwen_jax.cli", "batch", "--model", str(work / "model")]
    command += ["-i", str(work / "in.jsonl"), "-o", str(work / output), "--shard", shard]
    return subprocess.Popen([*command, "--resume", *OPTIONS])


def finish(process: subprocess.Popen) -> None:
    """Waits; 1 says that there were wrong lines, which a small shard may have none of."""
    if process.wait() not in (0, 1):
        raise SystemExit(f"the batch ended with status {process.returncode}")


def parts(path: pathlib.Path, shards: int) -> list[pathlib.Path]:
    """The files of the shards, in place of one."""
    if shards == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{i:05}-of-{shards:05}") for i in range(shards)]


def size(path: pathlib.Path) -> int:
    return path.stat().st_size if path.exists() else 0


def kill_at_random(running: dict[pathlib.Path, subprocess.Popen], most: int, rng) -> int:
    """Kills processes, each when its output has grown by up to ``most`` bytes, or, one in seven, at
    some moment from its start; returns how many were still at work."""
    now, killed = time.monotonic(), 0
    marks = {path: size(path) + rng.randrange(most) for path in running}
    ends = {path: now + (rng.random() * 10 if rng.random() < 1 / 7 else 3600) for path in running}
    while running:
        for path, process in list(running.items()):
            over = process.poll() is not None
            if over or size(path) >= marks[path] or time.monotonic() > ends[path]:
                killed += not over
                process.kill()
                process.wait()
                del running[path]
        time.sleep(0.0005)
    return killed


def read(paths: list[pathlib.Path], key) -> dict:
    """The lines of files, without the time; a line that is there twice ends the check."""
    found: dict = {}
    for line in (json.loads(x) for path in paths for x in path.read_bytes().splitlines()):
        if key(line) in found:
            raise SystemExit(f"FAILED: {key(line)} is there twice")
        if line["response"]:
            line["response"]["body"].pop("created", None)
        found[key(line)] = line
    return found


def contents(work: pathlib.Path, name: str, shards: int) -> tuple[dict, dict]:
    """(answers by custom_id, errors by line)."""
    answers = read(parts(work / f"{name}.jsonl", shards), lambda x: x["custom_id"])
    errors = read(parts(work / f"{name}.errors.jsonl", shards), lambda x: x["line"])
    return answers, errors


def check(work: pathlib.Path, *, kills: int, lines: int, shards: int, seed: int) -> int:
    """Runs the whole check; returns the exit code."""
    rng = random.Random(seed)
    (work / "model").mkdir()
    tiny.write_text_model(work / "model", "moe")
    written = write_input(work / "in.jsonl", lines)
    began = time.monotonic()
    finish(start(work, "whole.jsonl", "0/1"))
    whole = contents(work, "whole", 1)
    seconds = time.monotonic() - began
    print(f"in one go   {written} lines: {len(whole[0])} answers, {len(whole[1])} errors; "
          f"{seconds:.0f} s")  # fmt: skip
    outputs, killed = parts(work / "out.jsonl", shards), 0
    most = size(work / "whole.jsonl") // kills
    while killed < kills:
        running = {
            path: start(work, "out.jsonl", f"{i}/{shards}") for i, path in enumerate(outputs)
        }
        new = kill_at_random(running, most, rng)
        if not new:
            raise SystemExit(f"the batch was over after {killed} kills: give more --lines")
        killed += new
        left = [path.read_bytes().count(b"\n") if path.exists() else 0 for path in outputs]
        print(f"{killed:3} kills   answers on the disk: {left}", flush=True)
    for process in [start(work, "out.jsonl", f"{i}/{shards}") for i in range(shards)]:
        finish(process)
    resumed = contents(work, "out", shards)
    same = resumed == whole
    print(f"resumed     {len(resumed[0])} answers, {len(resumed[1])} errors; "
          f"{'equal' if same else 'different'}")  # fmt: skip
    print("passed" if same else "FAILED")
    return 0 if same else 1


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lines", type=int, default=400)
    parser.add_argument("--shards", type=int, default=2, help="processes at once")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to work")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="check_batch_") as work:
        return check(
            pathlib.Path(work),
            kills=options.kills,
            lines=options.lines,
            shards=options.shards,
            seed=options.seed,
        )


if __name__ == "__main__":
    sys.exit(main())
