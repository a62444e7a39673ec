"""What the kernels are told of a model: the facts that decide which implementation can run.

Knows the configuration, the mesh and the rules; knows no implementation and no number of tokens.
A size that does not divide over its mesh axes is rounded up here, because loading raises about it
with the parameter's name.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from pallas_kernels import paged_attention, ragged_dot, segment_attention
from qwen_jax import dims as dims_lib
from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules
from qwen_jax.weights import derive
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Moe, table
from qwen_jax.weights.quant import FORMATS


def of(
    config: ModelConfig, *, mesh: Mesh, rules: Rules, dtype: str, kv_dtype: Any, page_size: int
) -> dict[str, Sequence[Any]]:
    """Operation -> its facts in every form in which the model uses it; empty where it never does.

    Args:
        config: as the weights will be, requantised if they will be.
        mesh, rules, dtype, page_size: as `Runtime` has them.
        kv_dtype: of the cache's pages.
    """

    def part(letter: str, size: int) -> int:
        return -(-size // sharding_lib.ways(mesh, rules.axes(letter)))

    text, vision = config.text, config.vision
    pages = jnp.dtype(kv_dtype)
    # Where the tensor axis is wider than K, every device keeps a copy of the head that it needs.
    attention = paged_attention.Facts(
        query_heads=part("N", text.num_attention_heads),
        kv_heads=part("K", text.num_key_value_heads),
        head_dim=text.head_dim,
        page_size=page_size,
        dtype=dtype,
        kv_dtype=pages.name,
        scaled=pages.itemsize == 1,
    )
    tower = () if vision is None else (_tower(vision.sizes, part, dtype),)
    return {
        "ragged_dot": _expert_products(config, part, dtype),
        "paged_attention": (attention,),
        "segment_attention": tower,
    }


def _tower(sizes: dims_lib.Sizes, part, dtype: str) -> segment_attention.Facts:
    return segment_attention.Facts(part("N", sizes["N"]), sizes["H"], dtype)


def _expert_products(config: ModelConfig, part, dtype: str) -> tuple[ragged_dot.Facts, ...]:
    """Both products of every sparse layer, without repetition: most layers are alike."""
    found = {}
    for layer in table(config).layers:
        if isinstance(layer.mlp, Moe):
            found[_product(layer.mlp.gate_up, config, part, dtype, "swiglu", dtype)] = None
            found[_product(layer.mlp.down, config, part, dtype, None, "float32")] = None
    return tuple(found)


def _product(row: Any, config: ModelConfig, part, dtype, activation, out_dtype):
    """``row`` is a `Param`, which the tree of rows types as the weight it stands for."""
    shape = tuple(part(x, row.size[x]) for x in dims_lib.parse(row.dims))
    quant = derive.quantization(row, config)
    values = dtype if quant is None else FORMATS[quant.form][0]
    scale = None if quant is None else jax.ShapeDtypeStruct((), jnp.dtype(quant.scale_dtype))
    return ragged_dot.Facts.of(
        jax.ShapeDtypeStruct((), jnp.dtype(dtype)),
        jax.ShapeDtypeStruct(shape, values),
        scale,
        None if quant is None else derive.blocks(row, quant),
        activation,
        out_dtype,
    )
