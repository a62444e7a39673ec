"""The manifest of a converted checkpoint: what it is, what it was made from, what must be there.

Knows JSON; touches no array. `manifest.json` is written last, beside the arrays: a directory
without one is no checkpoint. Its own digest covers the rest of it, and each array file is named
with its size and its last four bytes, which are the CRC-32C of its content: the reader of the
arrays holds the content against the CRC, and `orbax_io.verify` the CRC against the manifest. So a
damaged file, a missing one and one of another conversion are all found, without a second pass over
the data. Source files are named with their SHA-256, as the hub names them.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from collections.abc import Mapping
from typing import Any, cast

from qwen_jax.weights import config_json
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.json_keys import Keys
from qwen_jax.weights.safetensors_header import parse_json
from qwen_jax.weights.storage import Directory

NAME = "manifest.json"
FORMAT = "qwen_jax checkpoint"
VERSION = 1
_PACKAGES = ("qwen-jax", "jax", "orbax-checkpoint", "tensorstore")


@dataclasses.dataclass(frozen=True)
class ArrayFiles:
    """One array as it is stored.

    Attributes:
        shape, dtype: the array's.
        chunk: shape of the pieces it is stored in, one file each.
        files: file name -> (bytes, last four bytes in hexadecimal).
    """

    shape: tuple[int, ...]
    dtype: str
    chunk: tuple[int, ...]
    files: Mapping[str, tuple[int, str]]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: Any, where: str) -> "ArrayFiles":
        keys = Keys(raw, where)
        shape, chunk = keys.integers("shape"), keys.integers("chunk", least=1)
        dtype, files = str(keys.take("dtype")), keys.take("files")
        keys.finish()
        return cls(
            shape, dtype, chunk, {name: (size, tail) for name, (size, tail) in files.items()}
        )


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        config: of the checkpoint as it is stored.
        arrays: array name (its path in the tree of weights) -> its files.
        source: the path, and the name, bytes and SHA-256 of each file it was made from.
        versions: package -> version that wrote it.
    """

    config: ModelConfig
    arrays: Mapping[str, ArrayFiles]
    source: Mapping[str, Any]
    versions: Mapping[str, str]

    def text(self) -> str:
        """The content of `manifest.json`."""
        body = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": dict(self.versions),
            "source": dict(self.source),
            "model": config_json.to_json(self.config),
            "arrays": {name: array.to_json() for name, array in self.arrays.items()},
        }
        return json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"


def read(directory: Directory) -> Manifest:
    """The manifest of a converted checkpoint.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is of a newer version, was changed since it was written, or is no manifest.
    """
    path = directory / NAME
    if not path.exists():
        raise FileNotFoundError(f"{directory}: no {NAME}: not a finished conversion")
    raw = read_json(path, "manifest")
    if raw.get("format") != FORMAT:
        raise ValueError(f"{path}: format is {raw.get('format')!r}, expected {FORMAT!r}")
    version = raw.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{path}: version {version!r} was written by a newer qwen_jax; this one reads up to "
            f"{VERSION}: upgrade, or convert again"
        )
    digest = raw.pop("sha256", None)
    if digest != _digest(raw):
        raise ValueError(
            f"{path}: was changed after it was written (its sha256 does not fit): convert again; "
            "to run with another configuration, pass overrides instead"
        )
    return Manifest(
        config=config_json.from_json(raw["model"], f"{path}: model"),
        arrays={
            name: ArrayFiles.from_json(x, f"{path}: {name}") for name, x in raw["arrays"].items()
        },
        source=raw["source"],
        versions=raw["written_by"],
    )


def read_json(path: Directory, what: str) -> dict[str, Any]:
    """A JSON object from a file of this machine or of a bucket; ``what`` names it in an error."""
    # The path is only printed.
    return parse_json(cast(pathlib.Path, path), path.read_bytes(), what)


def versions() -> dict[str, str]:
    """The versions of the packages that decide what is written."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # qwen_jax itself, run from its source tree
    return found


def _digest(body: Mapping[str, Any]) -> str:
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
