"""The files that a batch's answers are appended to, so that no crash loses or repeats one.

Knows lines and the disk; knows nothing of what was asked. A line counts when it is on the disk as a
whole, with its end.
"""

import asyncio
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from qwen_jax import durable
from qwen_jax.openai.batch_lines import has_failed
from qwen_jax.openai.errors import encode


class Results:
    """Appends answers to files; lines that come together are made durable together.

    Args:
        paths: of the output and of the error file.
        count: is told of each line that is on the disk, on some thread: whether it is an error.
    """

    def __init__(
        self, paths: tuple[pathlib.Path, pathlib.Path], count: Callable[[bool], None] | None = None
    ):
        self._paths, self._count = paths, count
        self._lock = asyncio.Lock()
        self._new: list[dict[str, Any]] = []
        self._writing: asyncio.Future[None] | None = None
        self._failure: OSError | None = None

    async def __aenter__(self) -> "Results":
        self._files = [open(path, "ab") for path in self._paths]  # noqa: SIM115
        for folder in {path.parent for path in self._paths}:
            durable.sync_folder(folder)
        return self

    async def __aexit__(self, *error: object) -> None:
        if self._writing is not None:
            await asyncio.wait((self._writing,))
        for file in self._files:
            file.close()

    async def add(self, line: dict[str, Any]) -> None:
        """Returns when the line is on the disk.

        Raises:
            OSError: it cannot be written, or one before it could not: of that one a piece may be in
                the file, which nothing must follow.
        """
        self._new.append(line)
        async with self._lock:
            if self._failure is not None:
                raise self._failure
            if self._new:
                new, self._new = self._new, []
                self._writing = asyncio.ensure_future(asyncio.to_thread(self._write, new))
                # A stop does not cut it off in the middle.
                await asyncio.shield(self._writing)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        try:
            self._append(lines)
        except OSError as error:
            self._failure = error
            raise

    def _append(self, lines: list[dict[str, Any]]) -> None:
        for index, file in enumerate(self._files):
            own = [line for line in lines if has_failed(line) == bool(index)]
            if own:
                file.write(b"".join(encode(line) + b"\n" for line in own))
                durable.sync(file)
            if self._count is not None:
                for _ in own:
                    self._count(bool(index))


def read_results(path: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The answers in a file that was appended to, none where there is no file.

    What a crash left torn at the end is cut off: a last line without its end, and lines that are
    none, which a disk may show where it lost power before they were on it.

    Raises:
        ValueError: a line that is none stands before one that is whole.
    """
    if not path.exists():
        return
    whole = size = 0
    torn: int | None = None
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            size += len(line)
            found = _parse(line)
            if found is None:
                torn = torn or number
                continue
            if torn is not None:
                raise ValueError(
                    f"{path}: line {torn:,} is no answer of a batch, and others follow it: delete "
                    "the line, and what it answered is done again"
                )
            whole = size
            yield found
    if torn is not None:
        os.truncate(path, whole)
        with open(path, "rb+") as file:
            durable.sync(file)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    is_answer = isinstance(found, dict) and {"custom_id", "response", "error"} <= found.keys()
    return found if is_answer and line.endswith(b"\n") else None
