"""A key that would change the result and is not supported raises, and says what would do."""

import functools

import pytest
from published import changed

from qwen_jax.weights import hf_config

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}

text = functools.partial(changed, "Qwen3-0.6B")
moe = functools.partial(changed, "Qwen3-30B-A3B")
vl = functools.partial(changed, "Qwen3-VL-30B-A3B-Instruct")
fp8 = functools.partial(changed, "Qwen3-30B-A3B-FP8", "quantization_config")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "model_type None is not supported; this library runs qwen3 .*qwen3_vl_moe"),
        (text(model_type="llama"), "model_type 'llama' is not supported"),
        (text(architectures=["Qwen3ForSequenceClassification"]), "only .*Qwen3ForCausalLM"),
        (text(hidden_act="gelu"), "hidden_act='gelu' is not supported, only 'silu'"),
        (text(is_causal=False), "is_causal=False is not supported"),
        (text(use_sliding_window=True), "use_sliding_window=True is not supported"),
        (text(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
        (text(use_qk_norm=False), "use_qk_norm=False is not supported"),
        (text(qkv_bias=True), "qkv_bias=True is not supported"),
        (text(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported, only 1.0"),
        (text(torch_dtype="int4"), "dtype 'int4' is not one of float32, bfloat16, float16"),
        (text(head_dim=33), "head_dim=33 is odd"),
        (text(hidden_size=...), "the key 'hidden_size' is missing"),
        (text(hidden_size="1024"), "hidden_size='1024' is not an integer of 1 or more"),
        (text(rope_theta=...), "rope: the key 'rope_theta' is missing"),
        (text(tie_word_embeddings="false"), "tie_word_embeddings='false' is not true or false"),
        (text(eos_token_id=["x"]), "eos_token_id='x' is not an integer of 0 or more"),
        (text(num_key_value_heads=5), "num_attention_heads=16 is not a multiple of .*heads=5"),
        (moe(num_experts=...), "the key 'num_experts' is missing"),
        (moe(num_experts_per_tok=129), "num_experts_per_tok=129 > num_experts=128"),
        (moe(shared_expert_intermediate_size=5632), "shared_expert_intermediate_size=5632"),
        (moe(mlp_only_layers=[48]), r"mlp_only_layers \(48,\) are not all in 0..47"),
        (moe(intermediate_size=...), "the key 'intermediate_size' is missing"),
    ],
)
def test_a_text_config_that_is_not_supported_raises(raw, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(raw)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (text(norm_topk_probs=True), "'norm_topk_probs' .= True"),  # dense: no such key
        (moe(norm_topk_probs=True), "'norm_topk_probs' .*did you mean 'norm_topk_prob'"),
        (text(atention_bias=True), "'atention_bias' .*did you mean 'attention_bias'"),
        (text(num_hidden_layers=..., num_hiden_layers=28), "did you mean 'num_hiden_layers'"),
        (text(logit_softcap=30.0), r"config.json: unknown .*'logit_softcap' \(= 30.0\)"),
        (text(rope_scaling={**YARN, "beta_fsat": 16}), "rope: .*did you mean 'beta_fast'"),
        (vl("text_config", logit_softcap=30.0), "text_config: unknown .*'logit_softcap'"),
        (vl("vision_config", window_size=112), "vision_config: unknown .*'window_size'"),
        (fp8(moduls_to_not_convert=["x"]), "did you mean 'modules_to_not_convert'"),
    ],
)
def test_an_unknown_key_raises_with_the_nearest_known_one(raw, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(raw)


@pytest.mark.parametrize(
    "inert",
    [
        {"attention_dropout": 0.1, "initializer_range": 0.5, "router_aux_loss_coef": 1.0},
        {"transformers_version": "9.9", "use_cache": False, "pad_token_id": 5, "bos_token_id": 3},
        {"_name_or_path": "x", "_attn_implementation_autoset": True, "unsloth_fixed": True},
        {"pruned_heads": {}, "torchscript": False, "sep_token_id": None, "sliding_window": 4096},
        {"max_window_layers": 1, "output_router_logits": True, "id2label": {"0": "a"}},
    ],
)
def test_keys_that_no_forward_pass_reads_change_nothing(inert):
    assert hf_config.from_hf(moe(**inert)) == hf_config.from_hf(moe())


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "linear", "factor": 2.0}, "rope_type='linear' is not supported, only"),
        ({"rope_type": "default", "factor": 2.0}, "unknown .*'factor'"),
        ({**YARN, "factor": 0.5}, "factor=0.5 shortens the context"),
        ({**YARN, "factor": "4"}, "factor='4' is not a positive number"),
        ({**YARN, "attention_factor": -1.0}, "attention_factor=-1.0 is not a positive number"),
        ({**YARN, "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_type": "default", "mrope_section": [24, 20, 20]}, "unknown .*'mrope_section'"),
        ("yarn", "rope: expected a JSON object, found 'yarn'"),
    ],
)
def test_rope_scaling_that_is_not_supported_raises(scaling, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(text(rope_scaling=scaling))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (vl(vision_config=...), "the key 'vision_config' is missing"),
        (vl(image_token_id=...), "the key 'image_token_id' is missing"),
        (vl("text_config", model_type="qwen3_text"), "model_type='qwen3_text' is not supported"),
        (vl(model_type="qwen3_vl", architectures=...), "vision_config: model_type='qwen3_vl_moe'"),
        (vl("vision_config", hidden_act="silu"), "vision_config: hidden_act='silu'"),
        (vl("vision_config", depth=..., dpeth=27), "'depth' is missing, did you mean 'dpeth'"),
        (vl("vision_config", num_heads=7), "hidden_size is not a multiple of num_heads"),
        (vl("vision_config", num_position_embeddings=2305), "num_position_embeddings is no square"),
        (vl("vision_config", deepstack_visual_indexes=[27]), r"\(27,\) are not all in 0..26"),
        (vl("vision_config", out_hidden_size=4096), "out_hidden_size=4096 is not .*=2048"),
        (vl("vision_config", patch_size=[16, 16]), r"patch_size=\[16, 16\] is not an integer"),
        (vl("vision_config", rope_parameters={"rope_theta": 5e5}), "rope_theta=500000.0 is not"),
        (
            vl("text_config", rope_scaling={"mrope_section": [24, 20, 19]}),
            r"\(24, 20, 19\) is not three .* head_dim/2=64",
        ),
        (
            vl("text_config", rope_scaling={"mrope_interleaved": False}),
            "mrope_interleaved=False is not supported, only True",
        ),
    ],
)
def test_a_vision_language_config_that_contradicts_itself_raises(raw, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(raw)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "awq"}, "quant_method='awq' is not supported, only 'fp8'"),
        ({"fmt": "e5m2"}, "fmt='e5m2'"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0' is not supported, only 'float'"),
        ({"expert_dtype": "fp4"}, "expert_dtype='fp4'"),
        ({"activation_scheme": "static"}, "activation_scheme='static'"),
        ({"weight_block_size": None}, "'weight_block_size' is missing"),
        ({"weight_block_size": [128]}, r"weight_block_size \(128,\) is not two"),
        ({"weight_block_size": [128, 0]}, "weight_block_size=0 is not an integer of 1"),
        ({"modules_to_not_convert": ["lm_head", "re:.*gate"]}, r"patterns.*\['re:.\*gate'\]"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of module names.*: 'lm_head'"),
        ({"modules_to_convert": ["model.embed_tokens"]}, "unknown .*'modules_to_convert'"),
    ],
)
def test_a_quantisation_that_is_not_supported_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(fp8(**changes))


def test_the_list_of_what_is_not_quantised_has_two_names():
    listed = ["lm_head", "model.layers.0.mlp.gate"]
    raw = fp8(modules_to_not_convert=..., ignored_layers=listed, dequantize=True)
    assert hf_config.from_hf(raw).quantization.skip == tuple(listed)


def test_blocks_need_not_be_square():
    assert hf_config.from_hf(fp8(weight_block_size=[64, 32])).quantization.block == (64, 32)
