import jax
import pytest
from published import CONFIGS, TOTALS, changed, fp8_storage

from qwen_jax.weights import derive, hf_config, params, presets


def test_presets_cover_every_model_with_published_totals():
    assert set(TOTALS) <= {name.removeprefix("Qwen/") for name in presets.PRESETS}


def test_the_owner_may_be_left_out():
    assert presets.preset("Qwen3-0.6B") is presets.preset("Qwen/Qwen3-0.6B")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("Qwen3-30B-A3", "Qwen/Qwen3-30B-A3B"), ("Qwen/Qwen3-Coder-480B", "Qwen3-Coder-480B-A35B")],
)
def test_an_unknown_name_raises_with_the_nearest(name, nearest):
    with pytest.raises(ValueError, match=f"no preset is named '{name}'; did you mean .*{nearest}"):
        presets.preset(name)


def test_a_name_like_none_raises_with_all_of_them():
    with pytest.raises(ValueError, match=r"known: .*Qwen/Qwen3-0.6B.*Qwen/Qwen3-VL-235B"):
        presets.preset("x")


@pytest.mark.parametrize("name", ["Qwen3-30B-A3B", "Qwen3-Coder-480B-A35B-Instruct"])
def test_an_fp8_preset_quantises_what_the_published_list_leaves(name):
    storage = fp8_storage(CONFIGS[name]["num_hidden_layers"])
    published = hf_config.from_hf(changed(name, quantization_config=storage))
    preset = presets.preset(f"{name}-FP8")
    rows = jax.tree.leaves(params.table(preset))
    for row in rows:
        by_list = derive.quantization(row, published)
        assert (by_list is None) == (derive.quantization(row, preset) is None), row.name
    quantised = {row.name.split(".", 3)[-1] for row in rows if derive.quantization(row, preset)}
    assert quantised == {
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.experts.{E}.{P}_proj.weight",
        "mlp.experts.{E}.down_proj.weight",
    }
