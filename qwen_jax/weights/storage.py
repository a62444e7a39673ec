"""Where files are: a directory of this machine, or a bucket.

Knows names and bytes. Buckets are read by tensorstore, which brings its own client, so that nothing
needs to be installed for them; ``file://`` goes the same way as ``gs://``.
"""

import dataclasses
import pathlib
from typing import Any

import tensorstore as ts

SCHEMES = ("gs://", "s3://", "file://")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A directory, or a file, of a bucket; has what is needed of `pathlib.Path`."""

    url: str

    def __truediv__(self, name: str) -> "Bucket":
        return Bucket(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        return self.url

    def exists(self) -> bool:
        """Whether there is a file of this name."""
        return self._read(slice(0, 1)).state == "value"

    def read_bytes(self) -> bytes:
        """The content of the file. Raises FileNotFoundError."""
        found = self._read(None)
        if found.state != "value":
            raise FileNotFoundError(f"{self.url}: no such file")
        return found.value

    def _read(self, part: slice | None) -> ts.KvStore.ReadResult:
        return ts.KvStore.open(self.url).result().read("", byte_range=part).result()


Directory = pathlib.Path | Bucket


def kvstore(directory: Directory) -> dict[str, Any] | str:
    """The directory as tensorstore calls it."""
    if isinstance(directory, Bucket):
        return f"{directory.url.rstrip('/')}/"
    return {"driver": "file", "path": f"{directory.absolute()}/"}
