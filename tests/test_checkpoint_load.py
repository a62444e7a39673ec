"""Loading: random weights, any mesh, requantising on the way."""

import jax
import pytest
import tiny
from checkpoint_samples import one_device, same

from qwen_jax.runtime import Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights import derive
from qwen_jax.weights.checkpoint import Transfer, load
from qwen_jax.weights.quant import QArray, quantize

ONE_LAYER = {"num_hidden_layers": 1}  # each random leaf takes a compilation
SMALL = {**ONE_LAYER, "hidden_size": 64, "vocab_size": 96, "moe_intermediate_size": 32}


# ---- random weights ------------------------------------------------------------------------------


def test_dummy_weights_of_a_preset_have_its_shapes_cut_as_asked():
    cut = SMALL | {"num_experts": 8}
    loaded = load("Qwen3-30B-A3B", load_format="dummy", overrides=cut, runtime=one_device())
    assert loaded.directory is None
    assert loaded.generation_config == {}
    assert loaded.params.layers[0].mlp.gate_up.shape == (8, 2, 64, 32)
    assert loaded.params.layers[0].attn.q.shape == (64, 32, 128)
    assert len(loaded.params.layers) == 1


def test_dummy_weights_of_a_directory_need_only_its_config(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")
    (directory / "model.safetensors").unlink()
    loaded = load(directory, load_format="dummy", runtime=one_device(), overrides=ONE_LAYER)
    assert loaded.config.text.num_experts == 4
    assert isinstance(loaded.params.layers[0].mlp.down, QArray)
    assert loaded.directory == directory
    assert loaded.generation_config["top_k"] == 20


def test_dummy_weights_depend_on_the_seed(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    one, again, other = (
        load(directory, load_format="dummy", seed=x, runtime=one_device(), overrides=ONE_LAYER)
        for x in (1, 1, 2)
    )
    assert same(one.params, again.params)
    assert not same(one.params, other.params)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean Qwen/Qwen3-30B-A3B"):
        load("Qwen3-30B-A3", load_format="dummy", runtime=one_device())


# ---- placing -------------------------------------------------------------------------------------


MESHES = [
    ("moe", "expert=8", "ep"),
    ("moe", "expert=4,tensor=2", "auto"),
    ("moe", "expert=2,tensor=4", "ep+tp"),  # more ways than key/value heads: those are replicated
    ("moe", "data=2,expert=2,tensor=2", "tp-attention+ep"),
    ("moe_bias", "tensor=4", "tp"),
    ("dense_tied", "tensor=2", "tp"),
    ("moe_fp8", "expert=4", "ep"),
    ("moe_fp8_whole_blocks", "expert=4,tensor=2", "ep"),
]


@pytest.mark.parametrize(("variant", "mesh", "strategy"), MESHES)
def test_any_mesh_holds_the_same_weights(variant, mesh, strategy, tmp_path):
    directory = tiny.write(tmp_path, variant)
    runtime = Runtime.make(mesh=mesh, strategy=strategy)
    alone, spread = (load(directory, runtime=r) for r in (one_device(), runtime))
    assert same(alone.params, spread.params)
    expected = derive.shardings(spread.config, runtime.mesh, runtime.rules)
    assert jax.tree.map(lambda x: x.sharding, spread.params) == expected


def test_weights_that_do_not_split_are_refused_before_they_are_read(tmp_path):
    directory = tiny.write(tmp_path, "moe")
    rules = Rules.of(V=("expert", "tensor"), D="data")
    with pytest.raises(ValueError, match=r"embed.*: D=64 does not split over data=3"):
        load(directory, runtime=Runtime.make(mesh="data=3", strategy=rules))


def test_progress_counts_every_byte_on_the_devices(tmp_path):
    told: list[Transfer] = []
    loaded = load(tiny.write(tmp_path, "moe"), runtime=one_device(), progress=told.append)
    assert told[-1].done == told[-1].total == sum(x.nbytes for x in jax.tree.leaves(loaded.params))
    assert [x.done for x in told] == sorted(x.done for x in told)
    assert len(told) == len(jax.tree.leaves(loaded.params))
    assert str(Transfer(3 * 10**9, 4 * 10**9, 10**9, 2.0)) == "3.00 of 4.00 GB, 1.00 GB/s"


def test_generation_config_and_directory_come_along(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    loaded = load(str(directory), runtime=one_device())
    assert loaded.directory == directory
    assert loaded.generation_config["temperature"] == 0.6
    (directory / "generation_config.json").unlink()
    assert load(directory, runtime=one_device()).generation_config == {}


# ---- requantising --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_requantised_weights_are_the_quantised_leaves(form, tmp_path):
    directory = tiny.write(tmp_path, "moe", dtype="bfloat16")
    runtime = Runtime.make(mesh="expert=4,tensor=2")
    plain, exact = (load(directory, runtime=one_device(), quantization=q) for q in (None, form))
    spread = load(directory, runtime=runtime, quantization=form)
    assert same(exact.params, spread.params)
    assert exact.config == spread.config
    assert spread.config.quantization.form == form
    expected = derive.shardings(spread.config, runtime.mesh, runtime.rules)
    assert jax.tree.map(lambda x: x.sharding, spread.params) == expected
    down = quantize(plain.params.layers[0].mlp.down, (1, 32, 1), form)
    assert same(exact.params.layers[0].mlp.down, down)
    assert same(exact.params.layers[0].mlp.router, plain.params.layers[0].mlp.router)
    assert same(exact.params.head, plain.params.head)


def test_what_is_requantised_is_not_rounded_to_the_runtimes_dtype_first(tmp_path):
    directory = tiny.write(tmp_path, "moe")
    narrow = one_device("bfloat16")
    one, other = (load(directory, runtime=r, quantization="int8") for r in (one_device(), narrow))
    assert same(one.params.layers[0].attn.q, other.params.layers[0].attn.q)
    assert other.params.layers[0].mlp.router.dtype == "bfloat16"


def test_requantising_twice_or_to_the_unknown_is_refused(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")
    with pytest.raises(ValueError, match="quantised already"):
        load(directory, runtime=one_device(), quantization="int8")
    with pytest.raises(ValueError, match="quantization='int4' is unknown; use fp8 or int8"):
        load(directory, runtime=one_device(), quantization="int4")
