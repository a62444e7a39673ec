"""All lines of a batch as one sequence, over one or several files.

Knows which line a number is, and which custom_ids come twice. What it keeps of a line is 17 bytes:
where it begins, and a hash of its custom_id. Two ids with one hash are told apart by reading them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_jax.batch.files import find_files, short_names
from qwen_jax.batch.jsonl import JsonlSource
from qwen_jax.batch.parquet import ParquetSource
from qwen_jax.batch.shard import Shard
from qwen_jax.openai.batch_lines import BatchRequest, came_before, read_request
from qwen_jax.openai.errors import ApiError

_EMPTY, _NO_ID = 0, 1  # in place of a hash
_PREFETCHED = 16  # lines that are read before they are asked for
_SHOWN = 512  # characters of a custom_id that is refused


class Source(Protocol):
    """The lines of one file."""

    size: int
    digest: str

    def __len__(self) -> int: ...

    def custom_ids(self) -> Iterator[str | None]: ...

    def parse(self, k: int) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Item:
    """A line that was read.

    Attributes:
        k: its number.
        request: what it asks for, or what is wrong with it.
        custom_id: where it has one.
    """

    k: int
    request: BatchRequest | ApiError
    custom_id: str | None


class Inputs:
    """The lines of several files, numbered through from 0.

    Args:
        given: paths of files and directories, and patterns.
        but_not: files that must not be among them.

    Attributes:
        files: a name for each file, as short as the names are different.

    Raises:
        ValueError: there is no file, one is of no known kind, or there is no line in them.
    """

    def __init__(
        self, given: Sequence[str | os.PathLike], *, but_not: Collection[pathlib.Path] = ()
    ):
        paths = find_files(given, but_not=but_not)
        self.files = short_names(paths)
        self._sources = [_open(path) for path in paths]
        self._ends = np.cumsum([len(source) for source in self._sources], dtype=np.int64)
        self._ids = np.fromiter(
            (_hash(id) for source in self._sources for id in source.custom_ids()),
            np.uint64,
            count=len(self),
        )
        if not np.any(self._ids != _EMPTY):
            raise ValueError(f"there is no line in {', '.join(map(str, paths[:5]))}")
        self._first: dict[int, int] = {}  # of lines with an id that came before: where
        self._first = self._find_duplicates()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> int:
        """The line's number itself: grain takes those of a shard, and only what is left is read."""
        return int(index)

    def about(self) -> list[dict[str, Any]]:
        """What the files are, for a manifest."""
        pairs = zip(self.files, self._sources, strict=True)
        return [{"file": name, "bytes": s.size, "blake2b": s.digest} for name, s in pairs]

    def count(self, shard: Shard) -> int:
        """How many lines of a shard are not empty."""
        return int(np.count_nonzero(self._ids[shard.index :: shard.count]))

    def place(self, k: int) -> dict[str, Any]:
        """Where a line is: its file and its number there, from 1."""
        file, row = self._find(k)
        return {"file": self.files[file], "line": row + 1}

    def at(self, file: str, line: int) -> int:
        """The number of a line; the opposite of `place`.

        Raises:
            KeyError: there is no such line.
        """
        if file not in self.files:
            raise KeyError(file)
        index = self.files.index(file)
        if not 1 <= line <= len(self._sources[index]):
            raise KeyError(line)
        return self._before(index) + line - 1

    def read(self, k: int) -> BatchRequest:
        """What a line asks for.

        Raises:
            ApiError: it asks for nothing that can be answered.
        """
        return self._read(k, self._parse(k))

    def find(self, custom_ids: Iterable[str]) -> Iterator[int]:
        """The number of the line with each id.

        Raises:
            KeyError: no line has it.
        """
        order = np.argsort(self._ids, kind="stable")
        ordered = self._ids[order]
        for custom_id in custom_ids:
            hashed = np.uint64(_hash(custom_id))
            start, end = (int(np.searchsorted(ordered, hashed, side)) for side in ("left", "right"))
            same = [k for k in order[start:end].tolist() if k not in self._first]
            yield self._with_id(custom_id, same)

    def items(self, shard: Shard, done: np.ndarray) -> Iterator[Item]:
        """The lines of a shard in their order, read ahead; without those that are empty or done.

        Args:
            shard: which lines.
            done: [lines], bool.
        """
        import grain

        skipped = done | (self._ids == _EMPTY)
        lines = grain.MapDataset.source(self)[shard.index :: shard.count]
        left = lines.filter(lambda k: not skipped[k]).map(self._item)
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_PREFETCHED)
        return iter(left.to_iter_dataset(ahead))

    def _item(self, k: int) -> Item:
        custom_id = None
        try:
            found = self._parse(k)
            given = found.get("custom_id")
            custom_id = given[:_SHOWN] if isinstance(given, str) else None
            return Item(k, self._read(k, found), custom_id)
        except ApiError as error:
            return Item(k, error, custom_id)

    def _find(self, k: int) -> tuple[int, int]:
        """(which file, which of its lines)."""
        file = int(np.searchsorted(self._ends, k, side="right"))
        return file, k - self._before(file)

    def _before(self, file: int) -> int:
        return int(self._ends[file - 1]) if file else 0

    def _parse(self, k: int) -> dict[str, Any]:
        file, row = self._find(k)
        return self._sources[file].parse(row)

    def _read(self, k: int, found: dict[str, Any]) -> BatchRequest:
        request = read_request(found)
        if _hash(request.custom_id) != self._ids[k]:
            raise ApiError(400, "custom_id is there twice", code="invalid_json_line")
        if k in self._first:
            raise came_before(request.custom_id, **self.place(self._first[k]))
        return request

    def _with_id(self, custom_id: str, same: Sequence[int]) -> int:
        """Of lines with one hash the one with the id."""
        if len(same) == 1:
            return same[0]
        for k in same:
            try:
                if self.read(k).custom_id == custom_id:
                    return k
            except ApiError:
                continue
        raise KeyError(custom_id)

    def _find_duplicates(self) -> dict[int, int]:
        """Lines whose custom_id a line before has, which is a request: with its number."""
        ordered = np.sort(self._ids[self._ids > _NO_ID])
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        first: dict[str, int] = {}
        found: dict[int, int] = {}
        if not len(twice):
            return found
        for k in np.flatnonzero(np.isin(self._ids, twice)).tolist():
            try:
                custom_id = self.read(k).custom_id
            except ApiError:
                continue
            if custom_id in first:
                found[k] = first[custom_id]
            else:
                first[custom_id] = k
        return found


def _open(path: pathlib.Path) -> Source:
    return ParquetSource(path) if path.suffix == ".parquet" else JsonlSource(path)


def _hash(custom_id: str | None) -> int:
    """Of this process: Python salts it."""
    if custom_id is None:
        return _EMPTY
    if not custom_id:
        return _NO_ID
    found = hash(custom_id) & (2**64 - 1)
    return found if found > _NO_ID else found + 2
