"""Checkpoints: find one, load it, convert it.

    loaded = load("Qwen/Qwen3-Coder-30B-A3B-Instruct")     a hub id, a directory, a bucket
    loaded = load("Qwen3-30B-A3B", load_format="dummy", overrides={"num_hidden_layers": 2})
    convert("Qwen/Qwen3-Coder-30B-A3B-Instruct", "coder")  safetensors -> orbax, in pieces
    loaded = load("coder")                                 equal, bit for bit, on any mesh

This is the public face; how it is done stands in `location.py` (what a path means), `load.py`
(slices onto devices), `convert.py`, `hf.py` (safetensors), `orbax_io.py` and `manifest.py`.
"""

from qwen_jax.weights.convert import convert
from qwen_jax.weights.load import Loaded, load
from qwen_jax.weights.location import Location, read_config, resolve
from qwen_jax.weights.progress import Progress, Transfer

__all__ = [
    "Loaded",
    "Location",
    "Progress",
    "Transfer",
    "convert",
    "load",
    "read_config",
    "resolve",
]
