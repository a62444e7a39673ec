"""Rows of a Parquet file as lines of a batch (the extra ``parquet``).

Knows columns and row groups. One row group is in memory at a time, of the columns that a line has.
"""

import hashlib
import json
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from qwen_jax.openai.batch_lines import FIELDS
from qwen_jax.openai.checks import parse_json
from qwen_jax.openai.errors import ApiError


class ParquetSource:
    """The rows of a file, from 0. Its columns are the fields of a line; ``body`` is a text of JSON,
    or a struct, whose nulls are fields that are not there.

    Attributes:
        size, digest: of the file.

    Raises:
        ValueError: a column is missing, or there is another one, or it is no Parquet file.
        ModuleNotFoundError: pyarrow is not installed.
    """

    def __init__(self, path: pathlib.Path):
        try:
            import pyarrow.parquet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"{path} needs {error.name}: pip install 'qwen-jax[parquet]'", name=error.name
            ) from None
        self.size = path.stat().st_size
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "blake2b").hexdigest()
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: {error}") from error
        columns = self._file.schema_arrow.names
        if sorted(columns) != sorted(FIELDS):
            raise ValueError(
                f"{path} has the columns {', '.join(columns)}; the lines of a batch have "
                f"{', '.join(FIELDS)}"
            )
        about = self._file.metadata
        sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._kept: tuple[int, Any] = (-1, None)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def custom_ids(self) -> Iterator[str | None]:
        """Of each row the custom_id; "" where there is none."""
        for batch in self._file.iter_batches(columns=["custom_id"]):
            for value in batch.column(0).to_pylist():
                yield value if isinstance(value, str) else ""

    def parse(self, k: int) -> dict[str, Any]:
        """A row as the object of a line; ApiError where its body is no JSON."""
        group = int(np.searchsorted(self._ends, k, side="right"))
        before = int(self._ends[group - 1]) if group else 0
        with self._lock:
            if self._kept[0] != group:
                self._kept = group, self._file.read_row_group(group, columns=list(FIELDS))
            rows = self._kept[1]
        (row,) = rows.slice(k - before, 1).to_pylist()
        body = row["body"]
        if isinstance(body, str | bytes):
            return {**row, "body": parse_json(body, "the body", "invalid_json_line")}
        row["body"] = _without_nulls(body)
        try:
            json.dumps(row)
        except TypeError as error:  # a date, a decimal number, bytes
            raise ApiError(400, f"the row is not JSON: {error}", code="invalid_json_line") from None
        return row


def _without_nulls(value: Any) -> Any:
    """Structs of one column all have the same fields: those that a row does not use are null."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
