"""The directory of a server's files and batches, held by one server at a time.

Knows a directory and its two stores; knows no model and no HTTP.
"""

import dataclasses
import pathlib
from typing import BinaryIO

from qwen_jax import durable
from qwen_jax.server.batches import BatchStore
from qwen_jax.server.files import FileStore


@dataclasses.dataclass(frozen=True)
class Storage:
    """A directory that is open; closed, it is another server's to take."""

    folder: pathlib.Path
    files: FileStore
    batches: BatchStore
    _held: BinaryIO

    @classmethod
    def open(cls, folder: pathlib.Path) -> "Storage":
        """Takes a directory, which is made where it is missing.

        Raises:
            ValueError: it is in use, or a file in it is damaged.
        """
        held = durable.lock(folder)
        try:
            return cls(folder, FileStore(folder / "files"), BatchStore(folder / "batches"), held)
        except BaseException:
            held.close()
            raise

    def close(self) -> None:
        """Lets go of it."""
        self._held.close()
