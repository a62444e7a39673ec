"""Directories of safetensors files: the right shard for each tensor, all faults in one error."""

import json
import pathlib

import numpy as np
import pytest

from qwen_jax.weights.safetensors import INDEX_NAME, Checkpoint, save_file


def write_index(directory: pathlib.Path, weight_map) -> None:
    (directory / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def two_shards(directory: pathlib.Path) -> dict[str, np.ndarray]:
    arrays = {name: np.full(3, i, np.float32) for i, name in enumerate("abcd")}
    save_file(directory / "m-1.safetensors", {k: arrays[k] for k in "ab"})
    save_file(directory / "m-2.safetensors", {k: arrays[k] for k in "cd"})
    write_index(directory, {k: f"m-{1 + (k in 'cd')}.safetensors" for k in "abcd"})
    return arrays


def test_a_checkpoint_reads_each_tensor_from_its_shard(tmp_path):
    arrays = two_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == ("a", "b", "c", "d")
    assert "a" in checkpoint
    assert "e" not in checkpoint
    for name, array in arrays.items():
        assert np.array_equal(checkpoint.tensor(name), array)
    assert checkpoint.info("d").file == tmp_path / "m-2.safetensors"
    with pytest.raises(ValueError, match="no tensor 'e' among 4"):
        checkpoint.info("e")


def test_only_the_shards_that_are_used_are_mapped(tmp_path):
    two_shards(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "m-2.safetensors").unlink()
    np.testing.assert_array_equal(checkpoint.tensor("a"), [0, 0, 0])
    with pytest.raises(FileNotFoundError, match="m-2"):
        checkpoint.tensor("c")


def test_a_checkpoint_of_one_file_needs_no_index(tmp_path):
    save_file(tmp_path / "model.safetensors", {"a": np.arange(3)})
    assert Checkpoint(tmp_path).names == ("a",)


def test_directories_without_a_checkpoint_say_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: not a directory"):
        Checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"looked for model.safetensors.index.json and"):
        Checkpoint(tmp_path)
    save_file(tmp_path / "x.safetensors", {"a": np.arange(3)})
    save_file(tmp_path / "y.safetensors", {"b": np.arange(3)})
    with pytest.raises(FileNotFoundError, match=r"2 safetensors files \(x.safetensors …\) but no"):
        Checkpoint(tmp_path)


def test_all_missing_shards_are_listed(tmp_path):
    two_shards(tmp_path)
    for name in ("m-1.safetensors", "m-2.safetensors"):
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"2 of 2 files .* missing: m-1.*, m-2.*: download"):
        Checkpoint(tmp_path)


def test_one_error_lists_every_disagreement_of_index_and_files(tmp_path):
    two_shards(tmp_path)
    save_file(tmp_path / "m-2.safetensors", {k: np.ones(1) for k in "abz"})
    weight_map = dict.fromkeys("acz", "m-1.safetensors") | {"b": "m-2.safetensors"}
    write_index(tmp_path, weight_map)
    with pytest.raises(ValueError, match="4 problems") as e:
        Checkpoint(tmp_path)
    message = str(e.value)
    for line in (
        f"c: {INDEX_NAME} places it in m-1.safetensors, but no file holds it",
        f"z: {INDEX_NAME} places it in m-1.safetensors, but it is in m-2.safetensors",
        "a: in more than one file: m-1.safetensors, m-2.safetensors",
        "b: in more than one file: m-1.safetensors, m-2.safetensors",
    ):
        assert f"\n  {line}" in message
    write_index(tmp_path, {"z": "m-2.safetensors"})
    with pytest.raises(ValueError, match=r"a: in m-2.safetensors but not in model.safetensors.in"):
        Checkpoint(tmp_path)


def test_all_broken_shards_are_listed_in_one_error(tmp_path):
    two_shards(tmp_path)
    for name in ("m-1.safetensors", "m-2.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"2 problems(.|\n)*m-1.*1 bytes short(.|\n)*m-2.*1 bytes"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../m-1.safetensors", "/etc/passwd", "a\\b", "", ".", 3])
def test_an_index_cannot_point_outside_the_directory(tmp_path, file):
    two_shards(tmp_path)
    write_index(tmp_path, {"a": file})
    with pytest.raises(ValueError, match=r"tensor 'a': .* is not the name of a file in this dire"):
        Checkpoint(tmp_path)


def test_a_broken_or_contradicted_index_is_refused(tmp_path):
    two_shards(tmp_path)
    save_file(tmp_path / "model.safetensors", {"a": np.arange(3)})
    with pytest.raises(ValueError, match=r"both exist, and the index does not name model.safeten"):
        Checkpoint(tmp_path)
    for text, message in (
        ("{", "index is not valid JSON"),
        ("[]", "the index must be a JSON object, found list"),
        ("{}", "must hold a weight_map"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "the key 'a' occurs more than once"),
    ):
        (tmp_path / INDEX_NAME).write_text(text)
        with pytest.raises(ValueError, match=message):
            Checkpoint(tmp_path)
