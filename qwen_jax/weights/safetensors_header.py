"""The header of a safetensors file: what it may say, and every way in which it can be wrong.

Knows the format (https://github.com/huggingface/safetensors, README "Format") and opens a file only
to read its header; it never touches the data:

    8 bytes   N, the length of the header, unsigned little endian
    N bytes   JSON: {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {…}},
              padded with spaces
    the rest  the tensors, row-major and little endian; offsets count from here; they cover every
              byte exactly once
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping

import ml_dtypes
import numpy as np

MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
    "U32": np.dtype("<u4"),
    "I32": np.dtype("<i4"),
    "U64": np.dtype("<u8"),
    "I64": np.dtype("<i8"),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "F64": np.dtype("<f8"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how to read it; `offset` counts from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    file: pathlib.Path
    offset: int
    nbytes: int


def read_header(path: pathlib.Path) -> tuple[dict[str, TensorInfo], dict[str, str], int]:
    """Every tensor in the order of its bytes, the metadata, and the size of the file.

    Raises FileNotFoundError, or ValueError naming the file, the tensor, what was expected and what
    was found.
    """
    size = path.stat().st_size
    header, data_start = _read_json(path, size)
    metadata = check_metadata(path, header.pop("__metadata__", None))
    infos = {name: _check_entry(path, name, e, data_start) for name, e in header.items()}
    # An empty tensor may share its place with the next one: it comes first.
    in_order = sorted(infos, key=lambda name: (infos[name].offset, infos[name].nbytes))
    infos = {name: infos[name] for name in in_order}
    _check_coverage(path, infos, data_start, size)
    return infos, metadata, size


def _read_json(path: pathlib.Path, size: int) -> tuple[dict, int]:
    """The parsed header and where the data start."""
    with open(path, "rb") as f:
        start = f.read(8)
        if start == b"version ":
            raise ValueError(
                f"{path}: is a Git LFS pointer, not the file itself: run `git lfs pull`"
            )
        length = int.from_bytes(start, "little")
        if size < 8 or (length <= MAX_HEADER_BYTES and 8 + length > size):
            needed = 8 if size < 8 else 8 + length
            raise ValueError(
                f"{path}: is at least {needed - size:,} bytes short: its header ends at byte "
                f"{needed:,} and the file has {size:,}: download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(
                f"{path}: header length is {length:,} bytes, the limit is {MAX_HEADER_BYTES:,}: "
                "this is no safetensors file, or it is damaged: download it again"
            )
        text = f.read(length)
    if not text.startswith(b"{"):
        raise ValueError(f"{path}: the header must start with '{{', found {text[:1]!r}")
    return parse_json(path, text, "header"), 8 + length


def parse_json(path: pathlib.Path, text: bytes, what: str) -> dict:
    """A JSON object without repeated keys at any level."""

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ValueError(f"the key {twice!r} occurs more than once")
        return found

    try:
        parsed = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: the {what} is not valid JSON: {e}") from e
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: the {what} must be a JSON object, found {type(parsed).__name__}")
    return parsed


def check_metadata(path: pathlib.Path, metadata: object) -> dict[str, str]:
    """The metadata if they map strings to strings, empty if there are none, else ValueError."""
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise ValueError(f"{path}: __metadata__ must map strings to strings, found {metadata!r}")
    for key, value in metadata.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise ValueError(
                f"{path}: __metadata__ must map strings to strings, found {key!r}: {value!r}"
            )
    return metadata


def _check_entry(path: pathlib.Path, name: str, entry: object, data_start: int) -> TensorInfo:
    """One header entry, checked by itself."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise ValueError(
            f"{where}: the entry must hold dtype, shape and data_offsets, found {entry!r}"
        )
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise ValueError(f"{where}: dtype {code!r} is not known; known are {', '.join(DTYPES)}")
    if not _is_sizes(shape):
        raise ValueError(f"{where}: shape must be a list of integers >= 0, found {shape!r}")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f"{where}: data_offsets must be [begin, end] with 0 <= begin <= end, found {offsets!r}"
        )
    begin, end = offsets
    dtype = DTYPES[code]
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes != end - begin:
        raise ValueError(
            f"{where}: {code} {shape} takes {nbytes:,} bytes, data_offsets {offsets} hold "
            f"{end - begin:,}: the file is damaged: download it again"
        )
    return TensorInfo(dtype, tuple(shape), path, data_start + begin, nbytes)


def _is_sizes(value: object) -> bool:
    # type(), not isinstance(): JSON true would pass for the integer 1.
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_coverage(
    path: pathlib.Path, infos: Mapping[str, TensorInfo], data_start: int, size: int
) -> None:
    """Tensors in the order of their bytes must touch each other and end with the file."""
    end, before = data_start, "the header"
    for name, info in infos.items():
        if info.offset < end:
            raise ValueError(
                f"{path}: tensor {name!r} begins at byte {info.offset:,}, inside {before}, which "
                f"ends at byte {end:,}: tensors may not overlap"
            )
        if info.offset > end:
            raise ValueError(
                f"{path}: {info.offset - end:,} bytes between {before} and tensor {name!r} belong "
                "to no tensor: the format allows no holes"
            )
        end, before = info.offset + info.nbytes, f"tensor {name!r}"
    if end > size:
        cut = next(name for name, info in infos.items() if info.offset + info.nbytes > size)
        raise ValueError(
            f"{path}: is {end - size:,} bytes short: expected {end:,} bytes, found {size:,}; "
            f"tensor {cut!r} is cut off: download it again"
        )
    if end < size:
        raise ValueError(
            f"{path}: {size - end:,} bytes lie behind the last tensor: expected {end:,} bytes, "
            f"found {size:,}: download it again"
        )
