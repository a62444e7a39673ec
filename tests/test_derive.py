import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from published import changed, fp8_storage

from qwen_jax import sharding
from qwen_jax.sharding import STRATEGIES, Rules, make_mesh
from qwen_jax.weights import derive, hf_config, params, presets, quant
from qwen_jax.weights.config import QuantConfig

PER_CHANNEL = QuantConfig(form="int8", block=None)
TINY = {
    "num_hidden_layers": 2,
    "vocab_size": 320,
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}
MOE = changed(
    "Qwen3-30B-A3B", **TINY, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
)
MIXED = {**MOE, "mlp_only_layers": [0], "intermediate_size": 256, "attention_bias": True}
MESHES = (
    "expert=8",
    "tensor=8",
    "expert=4,tensor=2",
    "expert=2,tensor=4",
    "data=2,expert=2,tensor=2",
)


def config(raw=MOE, **changes):
    return hf_config.from_hf({**raw, **changes})


def rows(of):
    return {row.name: row for row in jax.tree.leaves(params.table(of))}


def leaves(of, tree):
    """Name of a row -> leaf of a tree derived from the table."""
    structure = jax.tree.structure(params.table(of))
    return dict(zip(rows(of), structure.flatten_up_to(tree), strict=True))


# ---- abstract ----------------------------------------------------------------------------------


def test_abstract_has_the_dtypes_of_storage():
    fp8 = config(quantization_config=fp8_storage(2))
    layer = derive.abstract(fp8, "float32").layers[0]
    gate_up = layer.mlp.gate_up
    assert (gate_up.values.shape, gate_up.values.dtype) == ((8, 2, 128, 64), jnp.float8_e4m3fn)
    assert (gate_up.scale.shape, gate_up.scale.dtype) == ((8, 2, 1, 1), jnp.bfloat16)
    assert layer.mlp.router.dtype == layer.attn_norm.dtype == jnp.float32
    int8 = dataclasses.replace(
        config(), quantization=QuantConfig("int8", None, derive.KEPT_EXACT, "float32")
    )
    table = derive.abstract(int8)
    assert table.layers[0].attn.o.values.dtype == jnp.int8
    assert table.layers[0].attn.o.scale == jax.ShapeDtypeStruct((1, 1, 128), jnp.float32)
    assert table.head.dtype == table.layers[0].mlp.router.dtype == jnp.bfloat16


# ---- shardings ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "name", ["Qwen3-30B-A3B", "Qwen3-VL-235B-A22B-Instruct", "Qwen3-VL-2B-Instruct"]
)
def test_every_strategy_splits_every_published_shape_evenly(mesh, strategy, name):
    of = presets.preset(name)
    mesh, rules = make_mesh(mesh), STRATEGIES[strategy]
    places = leaves(of, derive.shardings(of, mesh, rules))
    for name, row in rows(of).items():
        for letter, size, local in zip(
            row.dims.split(), row.shape, places[name].shard_shape(row.shape), strict=True
        ):
            n = sharding.ways(mesh, rules.axes(letter))
            if letter == "K" and of.text.num_key_value_heads % n:
                n = 1  # fewer heads than ways: on every device
            assert local == size // n, (name, letter)


def test_scales_lie_with_their_values_and_single_ones_everywhere():
    of = presets.preset("Qwen3-30B-A3B-FP8")
    places = derive.shardings(of, make_mesh("expert=4,tensor=2"), STRATEGIES["ep+tp"])
    layer = places.layers[0]
    assert layer.mlp.gate_up.values.spec == PartitionSpec("expert", None, None, "tensor")
    assert layer.mlp.gate_up.scale.spec == PartitionSpec("expert", None, None, "tensor")
    assert layer.attn.o.values.spec == PartitionSpec("tensor", None, None)
    assert layer.attn.o.scale.spec == PartitionSpec("tensor", None, None)
    channel = dataclasses.replace(of, quantization=dataclasses.replace(PER_CHANNEL, skip=()))
    layer = derive.shardings(channel, make_mesh("tensor=2"), STRATEGIES["tp"]).layers[0]
    assert layer.mlp.down.values.spec == PartitionSpec(None, "tensor", None)
    assert layer.mlp.down.scale.spec == PartitionSpec(None, None, None)
    assert layer.mlp.gate_up.scale.spec == PartitionSpec(None, None, None, "tensor")


def test_cutting_a_scale_block_raises_with_the_way_out():
    of = presets.preset("Qwen3-30B-A3B-FP8")  # 768 / 4 = 192 is one block and a half
    with pytest.raises(
        ValueError, match=r"F=768 over tensor=4 cuts its scale blocks of 128.*\('F'\)"
    ):
        derive.shardings(of, make_mesh("tensor=4"), STRATEGIES["tp"])
    derive.shardings(of, make_mesh("tensor=4"), STRATEGIES["tp"].replicate("F"))


def test_a_partial_block_at_the_edge_cuts_nothing_where_it_is_not_split():
    of = config(quantization_config=fp8_storage(2), hidden_size=160, moe_intermediate_size=192)
    places = derive.shardings(of, make_mesh("expert=8"), STRATEGIES["ep"])
    assert places.layers[0].mlp.gate_up.scale.spec == PartitionSpec("expert", None, None, None)


def test_a_size_that_does_not_split_raises_with_the_tensor_of_the_checkpoint():
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: V=321 does not split over"):
        derive.shardings(config(vocab_size=321), make_mesh("tensor=2"), STRATEGIES["tp"])


# ---- init --------------------------------------------------------------------------------------


def test_random_weights_are_equal_on_another_mesh():
    of = config(quantization_config=fp8_storage(1), num_hidden_layers=1, moe_intermediate_size=256)
    whole = derive.init(of, 3, "bfloat16", make_mesh("expert=1"), Rules())
    mesh, rules = make_mesh("data=2,expert=2,tensor=2"), STRATEGIES["ep+tp"]
    split, places = derive.init(of, 3, "bfloat16", mesh, rules), derive.shardings(of, mesh, rules)
    for one, other, place in zip(*map(jax.tree.leaves, (whole, split, places)), strict=True):
        assert other.sharding.is_equivalent_to(place, other.ndim)
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_random_array_is_equal_on_every_mesh(mesh):
    mesh = make_mesh(mesh)

    def draw(place):
        key = jax.random.key(5)
        return derive._uniform(
            key, shape=(8, 40, 64), dtype=jnp.dtype("bfloat16"), bound=2.0, place=place
        )

    split = draw(NamedSharding(mesh, PartitionSpec("expert", None, "tensor")))
    whole = draw(NamedSharding(make_mesh("expert=1"), PartitionSpec()))
    np.testing.assert_array_equal(np.asarray(whole), np.asarray(split))


def test_drawing_in_slices_fills_everything_anew(monkeypatch):
    monkeypatch.setattr(derive, "_DRAWN_AT_ONCE", 1000)  # 7 slices of 128 at a time, of 328
    place = NamedSharding(make_mesh("expert=1"), PartitionSpec())
    shape = (8, 41, 2, 64)
    w = derive._uniform(
        jax.random.key(0), shape=shape, dtype=jnp.dtype("float32"), bound=2.0, place=place
    )
    assert w.shape == shape
    flat = np.asarray(w).reshape(-1, 64)
    assert len(np.unique(flat, axis=0)) == len(flat)
    assert np.abs(flat).max() == pytest.approx(2, rel=1e-3)
    assert flat.std() == pytest.approx(2 / 3**0.5, rel=0.01)


def test_random_fp8_weights_have_the_variance_of_plain_ones():
    of = config(quantization_config=fp8_storage(1), num_hidden_layers=1, moe_intermediate_size=256)
    down = derive.init(of, 3, "bfloat16", make_mesh("expert=1"), Rules()).layers[0].mlp.down
    w = np.asarray(down.values, np.float64) * np.asarray(down.scale[0, 0, 0], np.float64)
    assert np.isfinite(w).all()
    assert w.std() == pytest.approx(256**-0.5, rel=0.02)


def test_random_weights_keep_activations_at_unit_scale():
    of = config(MIXED)
    drawn = leaves(of, derive.init(of, 0, "float32", make_mesh("expert=1"), Rules()))
    for name, row in rows(of).items():
        w = np.asarray(drawn[name], np.float64)
        if row.init == "normal":
            fan_in = math.prod(row.size[x] for x in row.over.split())
            few = 5 / math.sqrt(w.size)  # five standard errors, about
            assert abs(w.mean()) * math.sqrt(fan_in) < few, name
            assert w.std() * math.sqrt(fan_in) == pytest.approx(1, abs=few), name
        else:
            np.testing.assert_array_equal(w, {"ones": 1, "zeros": 0}[row.init])
    kinds = {row.init for row in rows(of).values()}
    assert kinds == {"normal", "ones", "zeros"}


def test_every_weight_and_every_seed_draws_anew():
    of = config()
    first = derive.init(of, 0, "float32", make_mesh("expert=1"), Rules())
    other = derive.init(of, 1, "float32", make_mesh("expert=1"), Rules())
    a, b, c = (
        np.asarray(q).ravel() for q in (*(x.attn.q for x in first.layers), other.layers[0].attn.q)
    )
    for one, two in ((a, b), (a, c), (b, c)):
        assert abs(np.corrcoef(one, two)[0, 1]) < 0.03


# ---- counts, requantising ----------------------------------------------------------------------


def test_one_token_uses_its_active_experts_and_no_embedding():
    # Per layer: q 2048*4096, k and v 2048*512 each, o 4096*2048, two norms of 2048 and of 128,
    # router 2048*128, 8 experts of 3*2048*768; then a norm and the head.
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * (2048 + 128) + 2048 * 128 + 8 * 3 * 2048 * 768
    expected = 48 * layer + 2048 + 2048 * 151936
    assert derive.count_active(presets.preset("Qwen3-30B-A3B")) == expected
    dense = presets.preset("Qwen3-0.6B")
    assert derive.count_active(dense) == derive.count(dense)  # tied: the embedding is the head


@pytest.mark.parametrize(
    ("form", "error"),
    # Uniform weights: int8 per channel has steps of max/127, so an RMS error of 1/127/2 of theirs;
    # fp8 has 3 bits behind the leading one, so between 2**-4 and 2**-5 of each, over sqrt(3).
    [("int8", 1 / 127 / 2), ("fp8", 0.026)],
)
def test_requantising_per_channel_errs_as_the_format_says(form, error):
    attn = params.table(presets.preset("Qwen3-30B-A3B")).layers[0].attn
    storage = QuantConfig(form=form, block=None)
    for row in (attn.k, attn.o):
        w = np.random.default_rng(1).uniform(-1, 1, row.shape).astype(np.float32)
        stored = quant.quantize(jnp.asarray(w), derive.blocks(row, storage), form)
        wide = w.astype(np.float64)
        back = np.asarray(stored.values, np.float64) * np.asarray(stored.scale, np.float64)
        rms = math.sqrt(((back - wide) ** 2).mean() / (wide**2).mean())
        assert rms == pytest.approx(error, rel=0.05), row.name
