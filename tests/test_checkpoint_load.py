"""What a path means, configurations as JSON, and placing on any mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny

from qwen_jax.runtime import Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights import config_json, derive, location
from qwen_jax.weights.checkpoint import Transfer, load, read_config, resolve
from qwen_jax.weights.hf_config import from_hf
from qwen_jax.weights.presets import PRESETS, preset
from qwen_jax.weights.quant import QArray, quantize

ONE_LAYER = {"num_hidden_layers": 1}  # each random leaf takes a compilation
SMALL = {**ONE_LAYER, "hidden_size": 64, "vocab_size": 96, "moe_intermediate_size": 32}


def one_device() -> Runtime:
    return Runtime.make(devices=jax.devices()[:1])


def same(one, other) -> bool:
    """Equal trees, bit for bit."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    arrays = ((np.asarray(x), np.asarray(y)) for x, y in pairs)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in arrays
    )


# ---- what a path means ---------------------------------------------------------------------------


def test_a_local_directory_wins_over_a_hub_id(tmp_path, monkeypatch):
    tiny.write(tmp_path / "Qwen" / "Qwen3-0.6B", "dense")
    monkeypatch.chdir(tmp_path)
    found = resolve("Qwen/Qwen3-0.6B")
    assert (found.form, read_config(found).text.hidden_size) == ("safetensors", 64)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ("/no/such/place", "no such directory$"),
        ("./no", "no such directory$"),
        ("Qwen3-0.6B", r"did you mean Qwen/Qwen3-0\.6B\?"),
        ("three/part/name", "no hub id owner/name"),
    ],
)
def test_a_name_of_nothing_says_so(given, match):
    with pytest.raises(FileNotFoundError, match=match):
        resolve(given)


def test_a_file_is_not_a_checkpoint(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    with pytest.raises(ValueError, match="is a file: give the directory"):
        resolve(directory / "model.safetensors")


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ([], r"looked for manifest\.json .*, model\.safetensors\.index\.json and \*\.safetensors$"),
        (["config.json"], 'with load_format="dummy" config.json is enough'),
        (["config.json", "pytorch_model.bin"], r"\.bin and \.pth are not read"),
        (["_CHECKPOINT_METADATA"], "only what qwen-jax convert made is read"),
    ],
)
def test_a_directory_without_a_checkpoint_says_what_was_looked_for(files, match, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(FileNotFoundError, match=match):
        resolve(tmp_path)


def test_an_unknown_load_format_and_a_wrong_one_are_refused(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    with pytest.raises(ValueError, match="load_format 'pickle' is unknown; use auto, safetensors"):
        resolve(directory, load_format="pickle")
    with pytest.raises(
        ValueError, match="load_format='orbax', but the files there are safetensors"
    ):
        resolve(directory, load_format="orbax")
    with pytest.raises(ValueError, match="revision='main' belongs to a hub id"):
        resolve(directory, revision="main")


def test_a_bucket_of_safetensors_is_refused_and_one_of_orbax_is_not(tmp_path, monkeypatch):
    # A local directory stands for the bucket: anything that is not a `pathlib.Path` is one.
    from etils import epath

    directory = tiny.write(tmp_path, "dense")
    with pytest.raises(ValueError, match="safetensors are read from local directories"):
        location._form(epath.Path(directory))


def test_side_files_of_a_bucket_are_copied_to_this_machine(tmp_path):
    from etils import epath

    tiny.write_tokenizer(tmp_path / "bucket")
    found = location.Location("gs://x", "orbax", epath.Path(tmp_path / "bucket"))
    copied = location.local_files(found, tmp_path / "cache")
    assert copied is not None
    assert copied.parent == tmp_path / "cache"
    names = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(x.name for x in copied.iterdir()) == names


def test_a_missing_or_broken_config_is_named(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    config = directory / "config.json"
    for text, match in (
        ("{", r"config\.json: the file is not valid JSON"),
        ("[]", r"config\.json: the file must be a JSON object"),
        ('{"model_type": "llama"}', f"{directory}: .*'llama' is not supported.*qwen3_moe"),
    ):
        config.write_text(text)
        with pytest.raises(ValueError, match=match):
            load(directory, runtime=one_device())
    config.unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json is missing"):
        load(directory, runtime=one_device())


# ---- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A cache directory of the hub, with the hub itself out of reach."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home"))
    return tmp_path / "home"


def cache(hub, name: str, branch: str, commit: str, variant: str):
    """Puts a tiny checkpoint where the hub's own client would have put it."""
    repository = hub / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True, exist_ok=True)
    (repository / "refs" / branch).write_text(commit)
    tiny.write(repository / "snapshots" / commit, variant)


def test_offline_and_not_cached_says_what_to_do(hub):
    with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE.*run `hf download Qwen/Nothing`"):
        load("Qwen/Nothing", runtime=one_device())


def test_a_cached_model_loads_offline_by_branch_and_by_commit(hub, tmp_path):
    one, other = "a" * 40, "b" * 40
    cache(hub, "owner/tiny", "main", one, "dense")
    cache(hub, "owner/tiny", "next", other, "moe")
    assert load("owner/tiny", runtime=one_device()).config.model_type == "qwen3"
    assert load("owner/tiny@next", runtime=one_device()).config.model_type == "qwen3_moe"
    by_commit = load("owner/tiny", revision=other, runtime=one_device())
    assert by_commit.config.model_type == "qwen3_moe"
    assert by_commit.directory == hub / "models--owner--tiny" / "snapshots" / other
    with pytest.raises(ValueError, match="revision='main' is another one"):
        load("owner/tiny@next", revision="main", runtime=one_device())
    with pytest.raises(FileNotFoundError, match=r"owner/tiny@v9: not .* in the local cache"):
        load("owner/tiny@v9", runtime=one_device())


def test_cache_dir_stands_for_the_hubs_own(hub, tmp_path):
    cache(tmp_path / "mine", "owner/tiny", "main", "c" * 40, "dense")
    found = load("owner/tiny", cache_dir=tmp_path / "mine", runtime=one_device())
    assert found.config.text.num_hidden_layers == 2


# ---- configurations ------------------------------------------------------------------------------


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
    assert config_json.override(config, SMALL).quantization == config.quantization


# ---- random weights ------------------------------------------------------------------------------


def test_dummy_weights_of_a_preset_have_its_shapes_cut_as_asked():
    cut = SMALL | {"num_experts": 8}
    loaded = load("Qwen3-30B-A3B", load_format="dummy", overrides=cut, runtime=one_device())
    assert loaded.directory is None
    assert loaded.generation_config == {}
    assert loaded.params.layers[0].mlp.gate_up.shape == (8, 64, 2, 32)
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


def test_dummy_weights_depend_on_the_seed_and_not_on_the_mesh(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    one, again, other = (
        load(directory, load_format="dummy", seed=seed, runtime=runtime, overrides=ONE_LAYER)
        for seed, runtime in (
            (1, one_device()),
            (1, Runtime.make(mesh="tensor=2")),
            (2, one_device()),
        )
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
    narrow = dataclasses.replace(one_device(), dtype="bfloat16")
    one, other = (load(directory, runtime=r, quantization="int8") for r in (one_device(), narrow))
    assert same(one.params.layers[0].attn.q, other.params.layers[0].attn.q)
    assert other.params.layers[0].mlp.router.dtype == "bfloat16"


def test_requantising_twice_or_to_the_unknown_is_refused(tmp_path):
    directory = tiny.write(tmp_path, "moe_fp8")
    with pytest.raises(ValueError, match="quantised already"):
        load(directory, runtime=one_device(), quantization="int8")
    with pytest.raises(ValueError, match="quantization='int4' is unknown; use fp8 or int8"):
        load(directory, runtime=one_device(), quantization="int4")
