"""What a path means: directories, hub ids, buckets, and everything that is none of them."""

import pytest
import tiny
from checkpoint_samples import one_device

from qwen_jax.weights.checkpoint import load, read_config, resolve

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


def test_a_bucket_without_a_conversion_says_what_is_read(tmp_path):
    directory = tiny.write(tmp_path, "dense")
    with pytest.raises(FileNotFoundError, match="from buckets converted checkpoints are read"):
        resolve(f"file://{directory}")


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
