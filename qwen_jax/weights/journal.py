"""What an interrupted conversion has finished: one line of JSON per finished thing.

Knows lines and disks; knows no array. A line is on the disk before anything else happens, so after
a kill everything that the journal names is complete. A torn last line was not finished.
"""

import json
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any


class Journal:
    """The journal of one conversion, opened or begun.

    Args:
        path: the file.
        task: what is being done; a journal of another task is refused.

    Raises:
        FileExistsError: the file belongs to another task.
    """

    def __init__(self, path: pathlib.Path, task: Mapping[str, Any]):
        self._lock = threading.Lock()
        self._done: dict[tuple[str, str], Any] = {}
        complete = b""
        if path.exists():
            content = path.read_bytes()
            complete = content[: content.rfind(b"\n") + 1]
        lines = [json.loads(line) for line in complete.splitlines()]
        # JSON turns tuples into lists: compare what was written with what would be.
        if lines and lines[0] != json.loads(json.dumps(task)):
            raise FileExistsError(
                f"{path.parent} holds the beginning of another conversion (of other files, or with "
                "other options): finish that one, or delete the directory"
            )
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._file.truncate(len(complete))
        self._file.seek(len(complete))
        for kind, name, what in lines[1:]:
            self._done[kind, name] = what
        if not lines:
            self._append(task)

    def get(self, kind: str, name: str) -> Any | None:
        """What `add` was told, or None."""
        return self._done.get((kind, name))

    def add(self, kind: str, name: str, what: Any) -> None:
        """Notes that something is finished; returns when the disk has it."""
        with self._lock:
            self._done[kind, name] = what
            self._append([kind, name, what])

    def close(self) -> None:
        self._file.close()

    def _append(self, value: Any) -> None:
        self._file.write(json.dumps(value).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
