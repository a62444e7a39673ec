"""What a conversion says about itself, and that every change of its files is found."""

import hashlib
import json
import pathlib
import shutil

import jax
import orbax.checkpoint as ocp
import pytest
from checkpoint_samples import Conversions, one_device

from qwen_jax.weights import derive, manifest, orbax_io
from qwen_jax.weights.checkpoint import load, resolve


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Conversions:
    return Conversions(tmp_path_factory)


@pytest.fixture
def copied(made, tmp_path):
    """A conversion that a test may damage."""
    _, out = made("moe_fp8")
    return pathlib.Path(shutil.copytree(out, tmp_path / "copy"))


def change_manifest(out: pathlib.Path, change, seal: bool) -> None:
    """Changes manifest.json; ``seal`` makes its digest fit again."""
    path = out / "manifest.json"
    body = json.loads(path.read_text())
    digest = body.pop("sha256")
    change(body)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    body["sha256"] = hashlib.sha256(canonical).hexdigest() if seal else digest
    path.write_text(json.dumps(body))


def test_the_manifest_says_what_was_converted(made):
    source, out = made("moe")
    found = manifest.read(out)
    assert found.config == load(source, runtime=one_device()).config
    digest = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    size = (source / "model.safetensors").stat().st_size
    files = [{"name": "model.safetensors", "bytes": size, "sha256": digest}]
    assert found.source == {"path": str(source), "files": files}
    assert found.versions["jax"] == jax.__version__
    assert found.versions["orbax-checkpoint"] == ocp.__version__
    shapes = orbax_io.names(derive.abstract(found.config))
    assert {name: x.shape for name, x in found.arrays.items()} == {
        name: x.shape for name, x in shapes.items()
    }


def test_a_flipped_bit_is_found(copied):
    path = copied / "params" / "layers.1.mlp.down.values" / "c.0.0.0"
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down\.values: damaged: .*digest"):
        load(copied, runtime=one_device())


def test_missing_cut_grown_and_foreign_files_come_in_one_error(copied):
    params = copied / "params"
    (params / "embed" / "c.0.0").unlink()
    (params / "norm" / "zarr.json").unlink()
    q = params / "layers.0.attn.q.values" / "c.0.0.0"
    q.write_bytes(q.read_bytes()[:-3])
    k = params / "layers.0.attn.k.scale" / "c.0.0.0"
    k.write_bytes(k.read_bytes() + b"more")
    # Another layer's file: of the same size, and whole in itself.
    down = params / "layers.0.mlp.down.values" / "c.0.0.0"
    shutil.copyfile(params / "layers.1.mlp.down.values" / "c.0.0.0", down)
    with pytest.raises(ValueError) as caught:
        load(copied, runtime=one_device())
    message = str(caught.value)
    assert f"{params}: 5 files are not those that manifest.json names" in message
    for line in (
        "embed/c.0.0: missing",
        "norm/zarr.json: missing",
        f"layers.0.attn.q.values/c.0.0.0: shorter than {3 * 64 * 192 + 4:,} bytes",
        r"layers.0.attn.k.scale/c.0.0.0: longer than",
        r"layers.0.mlp.down.values/c.0.0.0: another content than was written",
    ):
        assert line in message


def test_a_missing_array_directory_is_found(copied):
    shutil.rmtree(copied / "params" / "norm")
    with pytest.raises(ValueError, match=r"norm/c\.0: missing"):
        load(copied, runtime=one_device())


def test_an_array_of_another_form_than_the_manifest_says_is_found(copied):
    path = copied / "params" / "norm" / "zarr.json"
    text = path.read_text()
    changed = text.replace("192", "191")
    assert changed != text
    path.write_text(changed)
    with pytest.raises(ValueError, match="norm: damaged: shape, dtype and chunk are"):
        load(copied, runtime=one_device())


def test_a_changed_manifest_is_found(copied):
    def other_theta(body):
        body["model"]["config"]["rope_theta"] = 5e6

    change_manifest(copied, other_theta, seal=False)
    with pytest.raises(ValueError, match=r"was changed after it was written .*pass overrides"):
        load(copied, runtime=one_device())


def test_overrides_work_on_a_conversion(made):
    loaded = load(made("moe")[1], runtime=one_device(), overrides={"rope_theta": 5e6})
    assert loaded.config.text.rope.theta == 5e6


@pytest.mark.parametrize("overrides", [{"num_hidden_layers": 1}, {"vocab_size": 77}])
def test_arrays_of_another_model_are_found(overrides, made):
    with pytest.raises(ValueError, match=r"arrays do not fit the configuration"):
        load(made("moe")[1], runtime=one_device(), overrides=overrides)


def test_a_newer_format_is_refused(copied):
    def newer(body):
        body["version"] = 2

    change_manifest(copied, newer, seal=True)
    with pytest.raises(ValueError, match="version 2 was written by a newer qwen_jax"):
        load(copied, runtime=one_device())


def test_another_programs_manifest_is_refused(copied):
    (copied / "manifest.json").write_text('{"format": "docker"}')
    with pytest.raises(ValueError, match="format is 'docker', expected 'qwen_jax checkpoint'"):
        load(copied, runtime=one_device())
    (copied / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: the manifest is not valid JSON"):
        load(copied, runtime=one_device())


def test_the_inside_of_a_conversion_points_to_it(made):
    _, out = made("moe")
    with pytest.raises(
        FileNotFoundError, match=f"the inside of a converted checkpoint: give {out}"
    ):
        resolve(out / "params")


def test_damage_in_a_bucket_is_found(copied):
    (copied / "params" / "norm" / "c.0").unlink()
    with pytest.raises(ValueError, match=r"norm/c\.0: missing"):
        load(f"file://{copied}", runtime=one_device())
