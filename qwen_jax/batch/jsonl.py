"""Lines of a JSON Lines file, by their number, however many there are.

Knows bytes and ends of lines; of what is in a line only how to find its custom_id. The file is
mapped, not read: a line costs 8 bytes of memory, for where it begins.
"""

import gzip
import hashlib
import mmap
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from qwen_jax.openai.batch_lines import parse_line
from qwen_jax.openai.errors import ApiError

MAX_LINE = 64 << 20  # bytes; as much as a body may have that is sent to the server
_PIECE = 4 << 20
_BOM = b"\xef\xbb\xbf"
# Most lines begin with their custom_id: a line with a picture in it need not be parsed to tell it.
_FIRST = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"([^"\\\x00-\x1f]+)"\s*,')


class JsonlSource:
    """The lines of a file, from 0.

    Args:
        path: of the file; what ends in .gz is unpacked into a temporary file.

    Attributes:
        size, digest: of the file.
    """

    def __init__(self, path: pathlib.Path):
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "blake2b").hexdigest()
            file.seek(0)
            if path.suffix == ".gz":
                with tempfile.TemporaryFile() as unpacked:  # what is mapped of it stays
                    self._data = _map(_unpack(file, unpacked))
            else:
                self._data = _map(file)
        self._starts = _starts(self._data)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def custom_ids(self) -> Iterator[str | None]:
        """Of each line what is probably its custom_id; "" where there is none, None for a line
        that is empty."""
        for k in range(len(self)):
            start, end = self._place(k)
            found = _FIRST.match(self._data, start, end)
            if found is not None:
                yield found[1].decode(errors="replace")
            elif end - start > MAX_LINE:
                yield ""
            else:
                line = self._data[start:end]
                yield _custom_id(line) if line.strip() else None

    def parse(self, k: int) -> dict[str, Any]:
        """The object in a line; ApiError where there is none."""
        start, end = self._place(k)
        if end - start > MAX_LINE:
            raise ApiError(
                400,
                f"the line has {end - start:,} bytes, which exceeds {MAX_LINE:,}",
                code="line_too_large",
            )
        return parse_line(self._data[start:end])

    def _place(self, k: int) -> tuple[int, int]:
        return int(self._starts[k]), int(self._starts[k + 1])


def _custom_id(line: bytes) -> str:
    try:
        found = parse_line(line).get("custom_id")
    except ApiError:
        return ""
    return found if isinstance(found, str) else ""


def _unpack(file: IO[bytes], unpacked: IO[bytes]) -> IO[bytes]:
    with gzip.open(file) as packed:
        shutil.copyfileobj(packed, unpacked, _PIECE)
    unpacked.flush()
    return unpacked


def _map(file: IO[bytes]) -> mmap.mmap | bytes:
    file.seek(0, 2)
    if not file.tell():
        return b""  # which cannot be mapped
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _starts(data: mmap.mmap | bytes) -> np.ndarray:
    """[lines + 1], uint64: where each line begins, and the end."""
    first = len(_BOM) if data[: len(_BOM)] == _BOM else 0
    found = [np.array([first], np.uint64)]
    for at in range(0, len(data), _PIECE):
        piece = np.frombuffer(data[at : at + _PIECE], np.uint8)
        found.append(np.flatnonzero(piece == ord("\n")).astype(np.uint64) + np.uint64(at + 1))
    starts = np.concatenate(found)
    if starts[-1] < len(data):  # a last line without its end
        starts = np.append(starts, np.uint64(len(data)))
    return starts
