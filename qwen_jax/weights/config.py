"""The configuration of a checkpoint: hyperparameters and storage, and nothing about the machine.

Knows what a model is; knows no file and no key of one (`hf_config.py` reads those).
"""

import dataclasses

ARCHITECTURES = {
    "qwen3": "dense text",
    "qwen3_moe": "mixture-of-experts text",
    "qwen3_vl": "dense vision-language",
    "qwen3_vl_moe": "mixture-of-experts vision-language",
}


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding of the text decoder. Source: transformers modeling_rope_utils.py.

    Attributes:
        theta: base of the geometric frequencies.
        kind: "default" or "yarn".
        factor, original_max_position, attention_factor, beta_fast, beta_slow, truncate: YaRN's;
            an ``attention_factor`` of None is derived from ``factor``.
        mrope_section: frequencies per axis (time, height, width), interleaved; empty for text.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_position: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    mrope_section: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder. Field names are Hugging Face's."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether ``layer`` has experts. Source: Qwen3MoeDecoderLayer.__init__."""
        if not self.num_experts or layer in self.mlp_only_layers:
            return False
        return (layer + 1) % self.decoder_sparse_step == 0

    @property
    def sizes(self) -> dict[str, int]:
        """Dimension letter -> size."""
        return {
            "V": self.vocab_size,
            "D": self.hidden_size,
            "N": self.num_attention_heads,
            "K": self.num_key_value_heads,
            "G": self.num_attention_heads // self.num_key_value_heads,
            "H": self.head_dim,
            "I": self.intermediate_size,
            "E": self.num_experts,
            "R": self.num_experts,
            "A": self.num_experts_per_tok,
            "F": self.moe_intermediate_size,
            "P": 2,
        }


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower. Field names are Hugging Face's."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int = 3
    patch_size: int = 16
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """Dimension letter -> size, inside the tower."""
        merged = self.hidden_size * self.spatial_merge_size**2
        return {
            "D": self.hidden_size,
            "N": self.num_heads,
            "H": self.hidden_size // self.num_heads,
            "I": self.intermediate_size,
            "Q": 3,
            "C": self.in_channels,
            "Z": self.temporal_patch_size,
            "Y": self.patch_size,
            "X": self.patch_size,
            "L": self.num_position_embeddings,
            "M": merged,
            "W": merged,
            "O": self.out_hidden_size,
            "J": len(self.deepstack_visual_indexes),
        }


@dataclasses.dataclass(frozen=True)
class QuantConfig:
    """How linear weights are stored.

    Attributes:
        form: "fp8" or "int8".
        block: elements per scale along (output, input) of each Hugging Face matrix, or None: one
            scale per output channel (what requantising makes).
        skip: module names that stay unquantised, as in ``modules_to_not_convert``.
        scale_dtype: dtype of the scales on disk and in memory.
    """

    form: str = "fp8"
    block: tuple[int, int] | None = (128, 128)
    skip: tuple[str, ...] = ()
    scale_dtype: str = "bfloat16"

    def skips(self, tensor: str) -> bool:
        """Whether a Hugging Face tensor stays unquantised.

        Whole dotted parts must match: ``mlp.gate`` skips ``model.layers.0.mlp.gate.weight`` and
        not ``model.layers.0.mlp.gate_proj.weight``.
        """
        return any(f".{module}." in f".{tensor}." for module in self.skip)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A checkpoint: decoder, vision tower or None, storage.

    Attributes:
        model_type: a key of `ARCHITECTURES`.
        tie_word_embeddings: whether the head is the embedding.
        dtype: dtype of the unquantised weights on disk.
        eos_token_ids: ids that end a text, by config.json (generation_config.json may say more).
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: the
            placeholders of pictures in a prompt; None for text-only models.
    """

    model_type: str
    text: TextConfig
    vision: VisionConfig | None = None
    quantization: QuantConfig | None = None
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"
    eos_token_ids: tuple[int, ...] = ()
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
