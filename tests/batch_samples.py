"""Batches for tests: lines, files of them, and what is in the files that answer them."""

import json
import pathlib
import re
from typing import Any

import numpy as np

from qwen_jax.batch.inputs import Inputs, Item
from qwen_jax.batch.shard import Shard
from qwen_jax.openai.errors import ApiError

CHAT = "/v1/chat/completions"
WHOLE = Shard()


def line(i: int | str, **changes: Any) -> dict[str, Any]:
    """A request that the scripted model answers by the number in it."""
    body = {"messages": [{"role": "user", "content": f"item {i}"}]}
    return {"custom_id": f"id-{i}", "method": "POST", "url": CHAT, "body": body, **changes}


def write(path: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    """A file of lines; bytes are written as they are."""
    raw = (x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    path.write_bytes(b"".join(x + b"\n" for x in raw))
    return path


def write_parquet(path: pathlib.Path, rows: list[Any], **options: Any) -> pathlib.Path:
    """A Parquet file of rows."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, **options)
    return path


def echo(prompt: str, index: int) -> str:
    """What the scripted model says to a line."""
    return re.findall(r"item \d+", prompt)[-1]


def write_batch(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path, pathlib.Path]:
    """(input, output, errors): a file of 30 good lines and three others."""
    wrong = [b"nonsense", line(3), line("x", body={"messages": []})]
    path = write(folder / "in.jsonl", [*map(line, range(30)), *wrong])
    return path, folder / "out.jsonl", folder / "out.errors.jsonl"


def read(*paths: pathlib.Path) -> list[dict[str, Any]]:
    """The lines of files."""
    return [json.loads(x) for path in paths for x in path.read_bytes().splitlines()]


def without_times(lines: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By custom_id, and without when the batch began: all else is the same whenever it is done."""
    found = {}
    for each in lines:
        assert each["custom_id"] not in found, each
        each["response"]["body"].pop("created", None)
        found[each["custom_id"]] = each
    return found


def contents(output: pathlib.Path, errors: pathlib.Path) -> tuple[dict, dict]:
    """(answers by custom_id, errors by place)."""
    problems = {(x["file"], x["line"]): x for x in read(errors)}
    assert len(problems) == len(read(errors))
    return without_times(read(output)), problems


def items(found: Inputs, shard: Shard = WHOLE, done: np.ndarray | None = None) -> list[Item]:
    """What is read of the lines."""
    return list(found.items(shard, np.zeros(len(found), bool) if done is None else done))


def ids(found: Inputs, shard: Shard = WHOLE, done: np.ndarray | None = None) -> list[Any]:
    """Their custom_ids."""
    return [item.custom_id for item in items(found, shard, done)]


def refusals(found: Inputs) -> dict[int, str]:
    """{line number: message} of the lines that are refused."""
    return {
        found.place(item.k)["line"]: item.request.message
        for item in items(found)
        if isinstance(item.request, ApiError)
    }
