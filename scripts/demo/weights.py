"""Weights to Hugging Face tensors, and files that are either old or new, never half.

Knows the table of weights, read backwards: what loading reads, this writes.
"""

import json
import os
import pathlib
from collections.abc import Mapping

import jax
import ml_dtypes
import numpy as np

from qwen_jax import dims as dims_lib
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Param, Weights, table

_CODES = {"float32": "F32", "bfloat16": "BF16", "int32": "I32"}


def to_tensors(params: Weights, config: ModelConfig) -> dict[str, np.ndarray]:
    """bfloat16 tensors by their names and in their layouts on the hub."""
    found: dict[str, np.ndarray] = {}

    def one(row: Param, leaf: jax.Array) -> None:
        stacked = [form for form in row.forms if "{" not in form[0]]
        name, layout = stacked[0]  # a vision-language checkpoint holds experts in one tensor
        letters = [letter for axis in dims_lib.groups(layout) for letter in axis]
        order = [dims_lib.parse(row.dims).index(letter) for letter in letters]
        whole = np.asarray(leaf).transpose(order).reshape(dims_lib.shape(layout, row.size))
        found[name] = whole.astype(ml_dtypes.bfloat16)

    jax.tree.map(one, table(config), params)
    return found


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file beside ``path``, then puts it into its place."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        code = _CODES[x.dtype.name]
        header[name] = {"dtype": code, "shape": list(x.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for x in tensors.values():
            file.write(np.ascontiguousarray(x).tobytes())
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
