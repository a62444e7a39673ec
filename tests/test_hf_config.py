import copy
import dataclasses
import functools
import json

import pytest
from published import CONFIGS, changed, respelled

from qwen_jax.weights import hf_config, presets

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


text = functools.partial(changed, "Qwen3-0.6B")
moe = functools.partial(changed, "Qwen3-30B-A3B")
vl = functools.partial(changed, "Qwen3-VL-30B-A3B-Instruct")
fp8 = functools.partial(changed, "Qwen3-30B-A3B-FP8", "quantization_config")


def quiet(config):
    """A configuration without the list of what is not quantised, which presets abbreviate."""
    if config.quantization is None:
        return config
    storage = dataclasses.replace(config.quantization, skip=())
    return dataclasses.replace(config, quantization=storage)


# ---- both spellings, real files -------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spelling", [dict, respelled])
def test_both_spellings_of_every_published_config_are_its_preset(name, spelling):
    config = hf_config.from_hf(spelling(CONFIGS[name]))
    assert quiet(config) == quiet(presets.preset(name))


def test_every_real_file_is_its_preset(shared_data):
    files = sorted(shared_data.glob("*/config.json"))
    assert len(files) >= 15
    for file in files:
        config = hf_config.from_hf(json.loads(file.read_text()))
        assert quiet(config) == quiet(presets.preset(file.parent.name)), file


@pytest.mark.parity
@pytest.mark.parametrize("name", CONFIGS)
def test_what_transformers_saves_is_the_preset(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    raw = copy.deepcopy(CONFIGS[name])
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "rope_parameters" in saved.get("text_config", saved)
    assert quiet(hf_config.from_hf(saved)) == quiet(presets.preset(name))


# ---- what the keys mean ----------------------------------------------------------------------


def test_two_spellings_that_differ_raise():
    with pytest.raises(ValueError, match=r"\{'num_experts': 128, 'num_local_experts': 64\}"):
        hf_config.from_hf(moe(num_local_experts=64))
    rope = {"rope_type": "default", "rope_theta": 5e6}
    with pytest.raises(ValueError, match=r"two values of rope_theta: 5000000.0, 1000000"):
        hf_config.from_hf(text(rope_parameters=rope))


def test_two_spellings_that_agree_are_one():
    raw = moe(num_local_experts=128, dtype="bfloat16", rope_parameters={"rope_theta": 1e6})
    assert hf_config.from_hf(raw) == presets.preset("Qwen3-30B-A3B")


def test_absent_keys_have_the_defaults_of_transformers():
    config = hf_config.from_hf(
        moe(norm_topk_prob=..., head_dim=..., rms_norm_eps=..., torch_dtype=..., eos_token_id=...)
    )
    assert not config.text.norm_topk_prob
    assert config.text.head_dim == 64  # hidden_size / heads, not the published 128
    assert config.text.rms_norm_eps == 1e-6
    assert config.dtype == "float32"
    assert config.eos_token_ids == ()
    assert hf_config.from_hf(text(head_dim=...)).text.head_dim == 128


def test_the_vision_language_code_normalises_whatever_the_key_says():
    for value in (True, False, ...):
        assert hf_config.from_hf(vl("text_config", norm_topk_prob=value)).text.norm_topk_prob


def test_the_top_level_alone_ties_a_vision_language_model():
    assert not hf_config.from_hf(vl("text_config", tie_word_embeddings=True)).tie_word_embeddings
    assert hf_config.from_hf(vl(tie_word_embeddings=True)).tie_word_embeddings


def test_several_ends_of_text_are_kept():
    assert hf_config.from_hf(text(eos_token_id=[151645, 151643])).eos_token_ids == (151645, 151643)
    assert hf_config.from_hf(text(eos_token_id=0)).eos_token_ids == (0,)


def test_flags_and_numbers_arrive():
    config = hf_config.from_hf(
        moe(
            attention_bias=True,
            rms_norm_eps=1e-5,
            decoder_sparse_step=2,
            mlp_only_layers=[1, 3],
            torch_dtype="torch.float16",
        )
    )
    assert config.text.attention_bias
    assert config.text.rms_norm_eps == 1e-5
    assert [i for i in range(8) if config.text.is_moe(i)] == [5, 7]
    assert config.dtype == "float16"


def test_an_explicit_null_is_absence():
    raw = text(
        layer_types=None, rope_parameters=None, quantization_config=None, sliding_window=None
    )
    assert hf_config.from_hf(raw) == presets.preset("Qwen3-0.6B")


def test_the_given_object_is_left_alone():
    raw = fp8()
    before = copy.deepcopy(raw)
    hf_config.from_hf(raw)
    assert raw == before


# ---- rope ------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
def test_yarn_is_read_in_both_spellings(where):
    rope = hf_config.from_hf(text(**{where: YARN})).text.rope
    assert (rope.kind, rope.theta) == ("yarn", 1e6)
    assert (rope.factor, rope.original_max_position) == (4.0, 32768)
    assert rope.attention_factor is None
    assert (rope.beta_fast, rope.beta_slow, rope.truncate) == (32.0, 1.0, True)


def test_yarns_optional_keys_are_read():
    more = {"attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
    rope = hf_config.from_hf(text(rope_scaling={**YARN, **more})).text.rope
    assert (rope.attention_factor, rope.beta_fast, rope.beta_slow) == (1.5, 16.0, 2.0)
    assert not rope.truncate


def test_the_old_name_of_the_type_is_read():
    scaling = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 20480}
    assert hf_config.from_hf(text(rope_scaling=scaling)).text.rope.kind == "yarn"
    with pytest.raises(ValueError, match="'rope_type': 'default', 'type': 'yarn'"):
        hf_config.from_hf(text(rope_scaling={**scaling, "rope_type": "default"}))


def test_mscale_sets_the_attention_factor_unless_it_is_given():
    scaling = {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}
    rope = hf_config.from_hf(text(rope_scaling=scaling)).text.rope
    assert rope.attention_factor == pytest.approx(1.1386294361 / 1.0693147181, rel=1e-9)
    rope = hf_config.from_hf(text(rope_scaling={**scaling, "attention_factor": 1.25})).text.rope
    assert rope.attention_factor == 1.25


def test_without_an_original_length_yarn_stretches_the_whole_context():
    rope = hf_config.from_hf(text(rope_scaling={"rope_type": "yarn", "factor": 2.0})).text.rope
    assert rope.original_max_position == 40960


def test_yarn_keeps_the_sections_of_a_vision_language_model():
    scaling = {**YARN, "factor": 3.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    rope = hf_config.from_hf(vl("text_config", rope_scaling=scaling)).text.rope
    assert (rope.kind, rope.mrope_section) == ("yarn", (24, 20, 20))


def test_sections_follow_the_head_size():
    scaling = {"rope_type": "default", "mrope_section": [8, 4, 4]}
    raw = vl("text_config", rope_scaling=scaling, head_dim=32)
    assert hf_config.from_hf(raw).text.rope.mrope_section == (8, 4, 4)
    raw = vl("text_config", rope_scaling={"rope_type": "default"})
    assert hf_config.from_hf(raw).text.rope.mrope_section == (24, 20, 20)
