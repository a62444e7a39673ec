"""Files that survive a crash at any moment. Knows files; knows nothing of what is in them."""

import fcntl
import json
import os
import pathlib
from collections.abc import Collection
from typing import Any, BinaryIO


def save(path: pathlib.Path, data: bytes) -> None:
    """Writes a file so that after a crash it is there as before, or as a whole."""
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def save_json(path: pathlib.Path, value: Any) -> None:
    """`save` of JSON."""
    save(path, json.dumps(value).encode())


def load_json(path: pathlib.Path, fields: Collection[str], remedy: str) -> dict[str, Any]:
    """An object that `save_json` wrote.

    Args:
        path: the file.
        fields: that every such object has.
        remedy: what to do about a file that is damaged, for the error.

    Raises:
        ValueError: the file is damaged, which no crash of ours can do.
    """
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): {remedy}") from None
    lacking = sorted(set(fields) - found.keys()) if isinstance(found, dict) else ["an object"]
    if lacking:
        raise ValueError(f"{path} is damaged (it lacks {', '.join(lacking)}): {remedy}")
    return found


def sync_folder(folder: pathlib.Path) -> None:
    """Makes the names in a folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync(file: BinaryIO) -> None:
    """Makes what was written to a file durable."""
    file.flush()
    os.fsync(file.fileno())


def lock(folder: pathlib.Path) -> BinaryIO:
    """Takes a folder for this process, as long as the returned file is open.

    Raises:
        ValueError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return lock_file(folder / "lock", folder)


def lock_file(path: pathlib.Path, what: pathlib.Path | None = None) -> BinaryIO:
    """Takes a file for this process, as long as the returned one is open; makes it where it is
    missing. ``what`` is what an error calls it.

    Raises:
        ValueError: another process has it.
    """
    file = open(path, "ab")  # noqa: SIM115  (open as long as it is taken)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ValueError(f"{what or path} is in use by another process") from None
    return file
