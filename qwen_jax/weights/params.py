"""The table: what every weight of the model is, said once.

Knows names, letters and layouts; knows no file, mesh or forward pass. Each field's default is its
row: the letters of our array, the Hugging Face tensor it comes from, and that tensor's layout.
`table(config)` lays the rows out as the tree of one model; `derive.py` gets shapes, random weights,
shardings and counts from it, and `hf.py` the loading, each with one `jax.tree.map`.

    Moe().gate_up       the row               Param("E P D F", "mlp.experts.{E}.{P}_proj.weight", …)
    table(config)       the rows of a model   Weights(embed=Param, layers=(Layer(…), …), …)

To add a weight, add a row. Nothing else needs to hear of it but the function that uses it.
"""

import dataclasses
import functools
from typing import Any

import jax
from flax import struct

from qwen_jax import dims as dims_lib
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.quant import Weight


@dataclasses.dataclass(frozen=True)
class Param:
    """One row of the table.

    Attributes:
        dims: the letters of our array.
        name: the Hugging Face tensor; ``{E}`` and ``{P}`` are stacked over experts and gate/up.
        layout: the layout of one such tensor.
        over: the letters summed over when the weight is used (they set the random scale).
        init: "normal" (of variance 1 / fan-in), "ones" or "zeros".
        linear: whether it is a linear layer's matrix, which checkpoints may quantise.
        also: other forms on disk, as (name, layout).
        sizes: letter -> size, filled in by `table`.
    """

    dims: str
    name: str
    layout: str
    over: str = ""
    init: str = "normal"
    linear: bool = False
    also: tuple[tuple[str, str], ...] = ()
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def size(self) -> dict[str, int]:
        """Letter -> size."""
        return dict(self.sizes)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of our array."""
        return dims_lib.shape(self.dims, self.size)

    @property
    def forms(self) -> tuple[tuple[str, str], ...]:
        """Every form on disk, as (name, layout)."""
        return ((self.name, self.layout), *self.also)


def _matrix(dims: str, name: str, layout: str, *, over: str, also=(), linear=True) -> Any:
    return Param(dims, name, layout, over=over, also=also, linear=linear)


def _norm(name: str, dims: str = "D") -> Any:
    return Param(dims, f"{name}.weight", dims, init="ones")


def _bias(name: str, dims: str, layout: str | None = None) -> Any:
    return Param(dims, f"{name}.bias", layout or dims, init="zeros")


@struct.dataclass
class Attention:
    """Grouped-query attention with a norm per head on q and k; biases with ``attention_bias``."""

    q: Weight = _matrix("D N H", "self_attn.q_proj.weight", "(N H) D", over="D")
    k: Weight = _matrix("D K H", "self_attn.k_proj.weight", "(K H) D", over="D")
    v: Weight = _matrix("D K H", "self_attn.v_proj.weight", "(K H) D", over="D")
    o: Weight = _matrix("N H D", "self_attn.o_proj.weight", "D (N H)", over="N H")
    q_norm: jax.Array = _norm("self_attn.q_norm", "H")
    k_norm: jax.Array = _norm("self_attn.k_norm", "H")
    q_bias: jax.Array | None = _bias("self_attn.q_proj", "N H", "(N H)")
    k_bias: jax.Array | None = _bias("self_attn.k_proj", "K H", "(K H)")
    v_bias: jax.Array | None = _bias("self_attn.v_proj", "K H", "(K H)")
    o_bias: jax.Array | None = _bias("self_attn.o_proj", "D")


@struct.dataclass
class Mlp:
    """A gated MLP; gate and up are one matmul."""

    gate_up: Weight = _matrix("D P I", "mlp.{P}_proj.weight", "I D", over="D")
    down: Weight = _matrix("I D", "mlp.down_proj.weight", "D I", over="I")


@struct.dataclass
class Moe:
    """Routed experts. Text checkpoints hold one matrix per expert, vision-language ones a stack:
    the hub's files with the input first, files of transformers 5 with the output first."""

    router: Weight = _matrix("D R", "mlp.gate.weight", "R D", over="D")
    gate_up: Weight = _matrix(
        "E P D F",
        "mlp.experts.{E}.{P}_proj.weight",
        "F D",
        over="D",
        also=(("mlp.experts.gate_up_proj", "E D (P F)"), ("mlp.experts.gate_up_proj", "E (P F) D")),
    )
    down: Weight = _matrix(
        "E F D",
        "mlp.experts.{E}.down_proj.weight",
        "D F",
        over="F",
        also=(("mlp.experts.down_proj", "E F D"), ("mlp.experts.down_proj", "E D F")),
    )


@struct.dataclass
class Layer:
    """One decoder layer; ``mlp`` says by its type whether the layer is sparse."""

    attn_norm: jax.Array = _norm("input_layernorm")
    attn: Attention = Attention()
    mlp_norm: jax.Array = _norm("post_attention_layernorm")
    mlp: Mlp | Moe = Mlp()


@struct.dataclass
class VisionBlock:
    """One block of the vision tower; every linear layer has a bias."""

    norm1: jax.Array = _norm("norm1")
    norm1_bias: jax.Array = _bias("norm1", "D")
    qkv: Weight = _matrix("D Q N H", "attn.qkv.weight", "(Q N H) D", over="D")
    qkv_bias: jax.Array = _bias("attn.qkv", "Q N H", "(Q N H)")
    o: Weight = _matrix("N H D", "attn.proj.weight", "D (N H)", over="N H")
    o_bias: jax.Array = _bias("attn.proj", "D")
    norm2: jax.Array = _norm("norm2")
    norm2_bias: jax.Array = _bias("norm2", "D")
    fc1: Weight = _matrix("D I", "mlp.linear_fc1.weight", "I D", over="D")
    fc1_bias: jax.Array = _bias("mlp.linear_fc1", "I")
    fc2: Weight = _matrix("I D", "mlp.linear_fc2.weight", "D I", over="I")
    fc2_bias: jax.Array = _bias("mlp.linear_fc2", "D")


@struct.dataclass
class Merger:
    """Patches of a merge block -> one text-width row. DeepStack's mergers norm merged rows (M)."""

    norm: jax.Array = _norm("norm")
    norm_bias: jax.Array = _bias("norm", "D")
    fc1: Weight = _matrix("M W", "linear_fc1.weight", "W M", over="M")
    fc1_bias: jax.Array = _bias("linear_fc1", "W")
    fc2: Weight = _matrix("W O", "linear_fc2.weight", "O W", over="W")
    fc2_bias: jax.Array = _bias("linear_fc2", "O")


@struct.dataclass
class Vision:
    """The vision tower."""

    patch: jax.Array = _matrix(
        "C Z Y X D", "patch_embed.proj.weight", "D C Z Y X", over="C Z Y X", linear=False
    )
    patch_bias: jax.Array = _bias("patch_embed.proj", "D")
    positions: jax.Array = _matrix("L D", "pos_embed.weight", "L D", over="D", linear=False)
    blocks: tuple[VisionBlock, ...] = ()
    merger: Merger = Merger()
    deepstack: tuple[Merger, ...] = ()


@struct.dataclass
class Weights:
    """All of a model. ``head`` is None where the embedding is the head too."""

    embed: jax.Array = _matrix("V D", "embed_tokens.weight", "V D", over="D", linear=False)
    layers: tuple[Layer, ...] = ()
    norm: jax.Array = _norm("norm")
    head: Weight | None = _matrix("D V", "lm_head.weight", "V D", over="D")
    vision: Vision | None = None


@functools.lru_cache(maxsize=16)
def table(config: ModelConfig) -> Weights:
    """The rows of one model: a `Weights` whose leaves are `Param`s with full names and sizes."""
    text, prefix = config.text, "model.language_model." if config.vision else "model."
    attention = Attention() if text.attention_bias else _without_bias(Attention())
    layers = tuple(
        _bind(
            Layer(attn=attention, mlp=Moe() if text.is_moe(i) else Mlp()),
            f"{prefix}layers.{i}.",
            text.sizes,
        )
        for i in range(text.num_hidden_layers)
    )
    rows = _bind(Weights(head=None), prefix, text.sizes)
    head = None if config.tie_word_embeddings else _bind(Weights().head, "", text.sizes)
    return rows.replace(layers=layers, head=head, vision=_vision_table(config))


def _vision_table(config: ModelConfig) -> Vision | None:
    if config.vision is None:
        return None
    sizes, prefix = config.vision.sizes, "model.visual."
    deep = Merger(norm=_norm("norm", "M"), norm_bias=_bias("norm", "M"))
    return Vision(
        **{
            name: _bind(getattr(Vision(), name), prefix, sizes)
            for name in ("patch", "patch_bias", "positions")
        },
        blocks=tuple(
            _bind(VisionBlock(), f"{prefix}blocks.{i}.", sizes) for i in range(config.vision.depth)
        ),
        merger=_bind(Merger(), f"{prefix}merger.", sizes),
        deepstack=tuple(
            _bind(deep, f"{prefix}deepstack_merger_list.{j}.", sizes) for j in range(sizes["J"])
        ),
    )


def _without_bias(rows: Attention) -> Attention:
    return dataclasses.replace(rows, q_bias=None, k_bias=None, v_bias=None, o_bias=None)


def _bind(rows, prefix: str, sizes: dims_lib.Sizes):
    """Puts the prefix before every name of a tree of rows and gives each letter its size."""

    def one(row: Param) -> Param:
        letters = {x for _, layout in row.forms for axis in dims_lib.groups(layout) for x in axis}
        letters |= set(dims_lib.parse(row.dims))
        return dataclasses.replace(
            row,
            name=prefix + row.name,
            also=tuple((prefix + name, layout) for name, layout in row.also),
            sizes=tuple((x, sizes[x]) for x in sorted(letters)),
        )

    return jax.tree.map(one, rows)
