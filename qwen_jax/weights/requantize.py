"""Requantising a checkpoint, explicitly asked for: which weights, and one of them at a time.

Knows rows and formats; knows no file. Linear weights get one scale per output channel. The head,
the router and the vision tower stay as they are.
"""

import dataclasses

import jax

from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig, QuantConfig
from qwen_jax.weights.params import Param
from qwen_jax.weights.quant import FORMATS, QArray, quantize


def requantized(config: ModelConfig, form: str | None) -> ModelConfig:
    """The configuration of a checkpoint after requantising it to ``form`` ("fp8", "int8").

    None leaves the checkpoint as it is.

    Raises:
        ValueError: the checkpoint is quantised already (it would be rounded twice), or ``form`` is
            unknown.
    """
    if form is None:
        return config
    if form not in FORMATS:
        raise ValueError(f"quantization={form!r} is unknown; use {' or '.join(FORMATS)}")
    if config.quantization is not None:
        raise ValueError(
            f"the checkpoint is quantised already ({config.quantization.form}): "
            f"quantization={form!r} would round twice; leave it out, or start from the original"
        )
    quant = QuantConfig(form=form, block=None, skip=derive.KEPT_EXACT, scale_dtype="float32")
    return dataclasses.replace(config, quantization=quant)


def quantize_leaf(leaf: jax.Array, row: Param, quant: QuantConfig, place: QArray | None) -> QArray:
    """One weight, or a slice of it that holds whole output channels.

    Args:
        leaf: float, in the letters of ``row.dims``.
        row: its row.
        quant: of a configuration from `requantized`.
        place: shardings of the result; None: where ``leaf`` is.
    """
    run = jax.jit(quantize, static_argnums=(1, 2), out_shardings=place)
    return run(leaf, derive.blocks(row, quant), quant.form)
