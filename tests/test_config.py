import dataclasses

import pytest

from qwen_jax.weights.config import QuantConfig, RopeConfig, TextConfig, VisionConfig

TEXT = TextConfig(
    vocab_size=100,
    hidden_size=64,
    num_hidden_layers=8,
    num_attention_heads=12,
    num_key_value_heads=4,
    head_dim=32,
    intermediate_size=96,
    max_position_embeddings=128,
    rope=RopeConfig(theta=1e4),
    num_experts=16,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
)


@pytest.mark.parametrize(
    ("changes", "sparse"),
    [
        ({}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"decoder_sparse_step": 2}, [1, 3, 5, 7]),
        ({"decoder_sparse_step": 3}, [2, 5]),
        ({"mlp_only_layers": (0, 5)}, [1, 2, 3, 4, 6, 7]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": (1,)}, [3, 5, 7]),
        ({"num_experts": 0}, []),
    ],
)
def test_layers_have_experts_by_step_and_list(changes, sparse):
    config = dataclasses.replace(TEXT, **changes)
    assert [i for i in range(8) if config.is_moe(i)] == sparse


def test_text_sizes_are_the_letters_of_the_config():
    expected = {"V": 100, "D": 64, "N": 12, "K": 4, "G": 3, "H": 32, "I": 96}
    assert TEXT.sizes == {**expected, "E": 16, "R": 16, "A": 2, "F": 24, "P": 2}


def test_vision_sizes_merge_blocks_of_patches():
    config = VisionConfig(2, 48, 80, 4, 64, deepstack_visual_indexes=(0, 1))
    expected = {"D": 48, "N": 4, "H": 12, "I": 80, "Q": 3, "C": 3, "Z": 2, "Y": 16, "X": 16}
    assert config.sizes == {**expected, "L": 2304, "M": 192, "W": 192, "O": 64, "J": 2}


@pytest.mark.parametrize(
    ("module", "tensor", "skipped"),
    [
        ("mlp.gate", "model.layers.0.mlp.gate.weight", True),
        ("mlp.gate", "model.layers.0.mlp.gate_proj.weight", False),
        ("lm_head", "lm_head.weight", True),
        ("head", "lm_head.weight", False),
        ("model.layers.1", "model.layers.1.self_attn.q_proj.weight", True),
        ("model.layers.1", "model.layers.11.self_attn.q_proj.weight", False),
        ("layers.1.mlp", "model.layers.1.mlp.down_proj.weight", True),
        ("visual", "model.visual.blocks.0.attn.qkv.weight", True),
        ("a.b", "axb.weight", False),
    ],
)
def test_skipping_matches_whole_dotted_parts(module, tensor, skipped):
    assert QuantConfig(skip=("other", module)).skips(tensor) is skipped


def test_nothing_is_skipped_by_an_empty_list():
    assert not QuantConfig().skips("model.layers.0.mlp.gate.weight")


def test_configs_are_hashable_and_compare_by_value():
    assert hash(TEXT) == hash(dataclasses.replace(TEXT))
    assert dataclasses.replace(TEXT, head_dim=16) != TEXT
