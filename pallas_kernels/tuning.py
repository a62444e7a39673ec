"""Tile sizes that were measured, device by device: what stands before every kernel's heuristic.

Knows files, devices and keys; knows no operation and no tile's meaning. `tuned/<op>.json` maps a
device kind to keys, which the operation forms of its dtypes and sizes, and those to tile sizes with
the measurement they come from:

    {"TPU v6 lite": {"bfloat16 bfloat16 2x2048x768 mean<=1":
        {"tiles": {"rows": 16, "columns": 384}, "measured": {"us": 41.2, "command": "…"}}}}
"""

import functools
import json
import pathlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

from pallas_kernels.device import Device


def bucket(n: int) -> int:
    """``n`` rounded up to a power of two, so that near sizes share an entry."""
    return 1 << max(0, n - 1).bit_length()


def lookup(op: str, device: Device, key: str) -> Mapping[str, int] | None:
    """The tile sizes measured for ``key`` on this kind of device, or None."""
    entry = _table(op).get(device.kind, {}).get(key)
    return None if entry is None else entry["tiles"]


@functools.cache
def _table(op: str) -> Mapping[str, Any]:
    file = resources.files("pallas_kernels") / "tuned" / f"{op}.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def store(
    directory: pathlib.Path, op: str, kind: str, entries: Mapping[str, Mapping[str, Any]]
) -> pathlib.Path:
    """Puts measured entries into ``directory / <op>.json``, in place of older ones of their keys.

    Args:
        directory: `tuned` of this package, or another one to look at first.
        op: the operation.
        kind: of the device that was measured.
        entries: key -> ``{"tiles": …, "measured": …}``.

    Returns:
        The file. A process that has looked up ``op`` before keeps what it found then.
    """
    file = directory / f"{op}.json"
    table = json.loads(file.read_text()) if file.is_file() else {}
    table[kind] = dict(sorted({**table.get(kind, {}), **entries}.items()))
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(dict(sorted(table.items())), indent=1) + "\n")
    return file
