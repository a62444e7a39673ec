"""Uploaded files and results of batches, kept in a directory.

Knows OpenAI's file objects and the disk; knows no HTTP. A file exists when its description does:
that is written last, and removed first.
"""

import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Iterable
from typing import Any, BinaryIO

from qwen_jax import durable
from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.ids import new_id

PURPOSES = ("batch", "user_data", "assistants", "fine-tune", "vision", "evals")
_ID = re.compile(r"file-[0-9a-f]{32}")
_PIECE = 1 << 20


class FileStore:
    """The files in a directory, which is made where it is missing."""

    def __init__(self, folder: pathlib.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._lock = threading.Lock()
        self._known: dict[str, dict[str, Any]] = {}
        for path in sorted(folder.glob("file-*.json")):
            self._known[path.stem] = durable.load_json(
                path,
                ("id", "bytes", "created_at", "filename", "purpose"),
                f"put it back as it was, or move it away together with {path.stem}, which holds "
                "the content: there is no such file then",
            )
        for path in folder.iterdir():
            if path.suffix != ".json" and path.name not in self._known:
                path.unlink()  # its upload was cut off

    def add(
        self, pieces: Iterable[bytes], *, filename: str, purpose: str, id: str | None = None
    ) -> dict[str, Any]:
        """Keeps a file; with an ``id`` that is there already, nothing happens.

        Returns:
            its description, in OpenAI's form.
        """
        id = id or new_id("file-")
        if id in self._known:
            return self._known[id]
        with tempfile.NamedTemporaryFile(dir=self._folder, prefix=".", delete=False) as file:
            for piece in pieces:
                file.write(piece)
            durable.sync(file)  # type: ignore[arg-type]
            size = file.tell()
        os.replace(file.name, self._folder / id)
        found = {
            "id": id,
            "object": "file",
            "bytes": size,
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        durable.save_json(self._folder / f"{id}.json", found)
        with self._lock:
            self._known[id] = found
        return found

    def copy(self, file: BinaryIO, *, filename: str, purpose: str) -> dict[str, Any]:
        """Keeps what a file holds."""
        file.seek(0)
        pieces = iter(lambda: file.read(_PIECE), b"")
        return self.add(pieces, filename=filename, purpose=purpose)

    def adopt(self, path: pathlib.Path, *, filename: str, purpose: str, id: str) -> None:
        """Keeps a copy of a file under a given id; may be repeated."""
        with open(path, "rb") as file:
            pieces = iter(lambda: file.read(_PIECE), b"")
            self.add(pieces, filename=filename, purpose=purpose, id=id)

    def get(self, id: str) -> dict[str, Any]:
        """The description of a file; ApiError 404 where there is none."""
        found = self._known.get(id) if _ID.fullmatch(id) else None
        if found is None:
            raise ApiError(404, f"there is no file {id[:80]!r}", param="id")
        return found

    def path(self, id: str) -> pathlib.Path:
        """Where a file's content is; ApiError 404 where there is no such file."""
        return self._folder / self.get(id)["id"]

    def newest_first(self) -> list[dict[str, Any]]:
        """All descriptions, the newest first."""
        with self._lock:
            return sorted(self._known.values(), key=lambda f: (-f["created_at"], f["id"]))

    def delete(self, id: str) -> None:
        """Removes a file; ApiError 404 where there is none."""
        path = self.path(id)
        with self._lock:
            del self._known[id]
        (self._folder / f"{id}.json").unlink()
        durable.sync_folder(self._folder)
        path.unlink()


def page_of(items: list[dict[str, Any]], *, after: str | None, limit: int) -> dict[str, Any]:
    """A page of a list, in OpenAI's form."""
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise ApiError(400, f"after={after[:80]!r} is not in the list", param="after")
        items = items[places[0] + 1 :]
    shown = items[:limit]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(items) > len(shown),
    }


def free_space(folder: pathlib.Path) -> int:
    """Bytes that the disk has left."""
    return shutil.disk_usage(folder).free
