"""Configurations through JSON and back, and with keys replaced."""

import json

import pytest
import tiny

from qwen_jax.weights import config_json
from qwen_jax.weights.hf_config import from_hf
from qwen_jax.weights.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_a_presets_configuration_survives_json(name):
    text = json.dumps(config_json.to_json(preset(name)))
    assert config_json.from_json(json.loads(text), "here") == preset(name)


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_a_checkpoints_configuration_survives_json(variant):
    config = from_hf(tiny.VARIANTS[variant])
    text = json.dumps(config_json.to_json(config))
    assert config_json.from_json(json.loads(text), "here") == config


def test_overrides_replace_keys_in_both_spellings():
    config = preset("Qwen3-30B-A3B")
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    for scaling in ({"rope_scaling": yarn}, {"rope_parameters": yarn | {"rope_theta": 1e6}}):
        found = config_json.override(config, {"num_local_experts": 64, **scaling})
        assert found.text.num_experts == 64
        assert (found.text.rope.kind, found.text.rope.factor) == ("yarn", 4.0)
        assert found.text.rope.theta == 1e6
    assert config_json.override(config, {}) == config


def test_overrides_reach_into_a_vision_language_model():
    config = preset("Qwen3-VL-30B-A3B-Instruct")
    vision = {"depth": 2, "deepstack_visual_indexes": [0, 1, 1]}
    changes = {"num_hidden_layers": 3, "vision_config": vision, "text_config": {"vocab_size": 9}}
    found = config_json.override(
        config, changes | {"rope_scaling": {"factor": 3.0, "type": "yarn"}}
    )
    assert (found.text.num_hidden_layers, found.text.vocab_size) == (3, 9)
    assert (found.vision.depth, found.vision.deepstack_visual_indexes) == (2, (0, 1, 1))
    assert found.text.rope.mrope_section == (24, 20, 20)
    assert found.text.hidden_size == config.text.hidden_size


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"num_hidden_layer": 2}, "'num_hidden_layer'; did you mean 'num_hidden_layers'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 is not an integer of 1 or more"),
        ({"num_experts": 4}, "num_experts_per_tok=8 > num_experts=4"),
        ({"rope_scaling": {"factr": 2}}, "'factr'"),
        ({"quantization_config": None}, "no key 'quantization_config'"),
    ],
)
def test_an_override_of_nothing_or_to_nonsense_is_refused(overrides, match):
    with pytest.raises(ValueError, match=match):
        config_json.override(preset("Qwen3-30B-A3B"), overrides)


def test_overrides_keep_the_quantisation():
    config = preset("Qwen3-30B-A3B-FP8")
    assert (
        config_json.override(config, {"num_hidden_layers": 2}).quantization == config.quantization
    )
