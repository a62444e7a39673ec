"""Conversions: equal on any mesh, readable by orbax, made in pieces, refused with a reason."""

import errno
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from checkpoint_samples import (
    Conversions,
    content,
    finished,
    one_device,
    same,
)

from qwen_jax.runtime import Runtime
from qwen_jax.weights import convert as convert_module
from qwen_jax.weights import hf, manifest, orbax_io, pieces
from qwen_jax.weights.checkpoint import convert, load
from qwen_jax.weights.safetensors import Checkpoint


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Conversions:
    return Conversions(tmp_path_factory)


# ---- equal ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "mesh", "strategy"),
    [
        ("moe", "expert=8", "ep"),
        ("moe", "expert=4,tensor=2", "auto"),
        ("moe", "expert=2,tensor=4", "ep+tp"),  # replicated key/value heads
        ("dense_tied_with_head", "tensor=2", "tp"),
        ("moe_dense_mix", "data=2,tensor=2", "tp"),
        ("moe_fp8", "expert=4", "ep"),
        ("moe_fp8_whole_blocks", "expert=4,tensor=2", "ep"),
        ("dense_fp8", "data=8", "replicated"),
    ],
)
def test_a_conversion_restores_on_any_mesh_what_the_source_loads(variant, mesh, strategy, made):
    source, out = made(variant)
    runtime = Runtime.make(mesh=mesh, strategy=strategy)
    direct, restored, alone = (
        load(path, runtime=r)
        for path, r in ((source, runtime), (out, runtime), (out, one_device()))
    )
    assert direct.config == restored.config
    assert direct.generation_config == restored.generation_config
    assert same(direct.params, restored.params)
    assert same(direct.params, alone.params)
    places = (jax.tree.map(lambda x: x.sharding, x.params) for x in (direct, restored))
    assert next(places) == next(places)


def test_plain_orbax_reads_a_conversion(made):
    _, out = made("moe_fp8_whole_blocks")
    runtime = Runtime.make(mesh="expert=4,tensor=2", strategy="ep")
    loaded = load(out, runtime=runtime)
    stored = manifest.read(out).arrays
    target = jax.tree.map(
        lambda x, name: jax.ShapeDtypeStruct(x.shape, stored[name].dtype, sharding=x.sharding),
        loaded.params,
        jax.tree.structure(loaded.params).unflatten(stored),
    )
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(out / "params", target)
        untyped = checkpointer.restore(out / "params")
    as_loaded = jax.tree.map(lambda x, y: x.astype(y.dtype), restored, loaded.params)
    assert same(as_loaded, loaded.params)
    embed = Checkpoint(made("moe_fp8_whole_blocks")[0]).tensor("model.embed_tokens.weight")
    assert same(untyped["embed"], np.array(embed))


def test_the_conversion_serves_alone(made, tmp_path):
    source, out = made("moe")
    names = {x.name for x in out.iterdir()}
    side = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert names == {"params", "manifest.json", "generation_config.json", *side}
    for name in side:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert load(out, runtime=one_device()).directory == out


def test_a_conversion_in_a_bucket_loads_like_one_here(made, tmp_path):
    # file:// goes the way of gs://: tensorstore reads all of it.
    source, out = made("moe_fp8")
    runtime = Runtime.make(mesh="expert=4", strategy="ep")
    here, there = (
        load(out, runtime=runtime),
        load(f"file://{out}/", runtime=runtime, cache_dir=tmp_path),
    )
    assert here.config == there.config
    assert here.generation_config == there.generation_config
    assert same(here.params, there.params)
    assert there.directory is not None
    assert there.directory.parent == tmp_path
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (there.directory / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize(("stored", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_is_the_files_unless_another_is_asked_for(stored, wanted, tmp_path):
    source = tiny.write(tmp_path / "source", "moe", dtype=stored)
    kept, changed = convert(source, tmp_path / "a"), convert(source, tmp_path / "b", dtype=wanted)
    assert {x.dtype for x in manifest.read(kept).arrays.values()} == {stored}
    assert {x.dtype for x in manifest.read(changed).arrays.values()} == {wanted}
    assert manifest.read(changed).config.dtype == wanted
    weight = Checkpoint(source).tensor("model.norm.weight").astype(wanted).astype(np.float32)
    assert same(load(changed, runtime=one_device()).params.norm, weight)


@pytest.mark.parametrize("form", ["int8", "fp8"])
def test_quantising_in_pieces_is_quantising_on_load(form, tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST", 4096)  # so that leaves have several pieces
    source = tiny.write(tmp_path / "source", "moe_dense_mix", dtype="bfloat16")
    out = convert(source, tmp_path / "out", quantization=form)
    files = manifest.read(out).arrays["layers.3.mlp.gate_up.values"].files
    assert len(files) > 2
    direct, restored = (
        load(source, runtime=one_device(), quantization=form),
        load(out, runtime=one_device()),
    )
    assert direct.config == restored.config
    assert same(direct.params, restored.params)


def test_a_conversion_can_be_requantised_on_load(made):
    source, out = made("moe")
    one, other = (load(x, runtime=one_device(), quantization="int8") for x in (source, out))
    assert same(one.params, other.params)


def test_an_fp8_scale_of_float32_survives(tmp_path):
    source = tiny.write(tmp_path / "source", "dense_fp8")
    out = convert(source, tmp_path / "out")
    loaded = load(out, runtime=one_device())
    assert loaded.config.quantization.scale_dtype == "float32"
    q = loaded.params.layers[0].attn.q
    assert (q.scale.dtype, q.values.dtype) == (np.float32, ml_dtypes.float8_e4m3fn)


# ---- in pieces -----------------------------------------------------------------------------------


def test_nothing_larger_than_a_piece_is_read_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "_SMALLEST", 1024)
    source = tiny.write(tmp_path / "source", "moe_many_experts", vocab_size=4096)
    sizes = []
    original = hf.read_values

    def watched(*arguments):
        sizes.append(original(*arguments).nbytes)
        return original(*arguments)

    monkeypatch.setattr(hf, "read_values", watched)
    out = convert(source, tmp_path / "out")
    largest = 4096 * 64 * 4
    assert max(sizes) <= largest / 8
    arrays = manifest.read(out).arrays
    assert sum(sizes) == sum(np.prod(x.shape) * 4 for x in arrays.values())
    assert len(arrays["embed"].files) == 1 + 8
    assert load(out, runtime=one_device()).params.embed.nbytes == largest


@pytest.mark.parametrize(
    ("length", "most", "step"),
    [(128, 9, 8), (160, 10, 10), (151936, 4000, 2374), (7, 5, 5), (3, 0, 1)],
)
def test_pieces_divide_a_letter_where_they_can(length, most, step):
    assert pieces._step(length, most) == step


# ---- what cannot be done -------------------------------------------------------------------------


def test_an_existing_output_is_left_alone(made, tmp_path):
    source, out = made("moe")
    with pytest.raises(FileExistsError, match="exists and is a finished conversion"):
        convert(source, out)
    with pytest.raises(FileExistsError, match="exists and is something else"):
        convert(source, tmp_path)
    with pytest.raises(ValueError, match="convert to a local directory"):
        convert(source, "gs://bucket/out")


def test_a_conversion_is_not_converted_again(made, tmp_path):
    with pytest.raises(ValueError, match="is converted already"):
        convert(made("moe")[1], tmp_path / "out")


def test_bad_options_leave_nothing(made, tmp_path):
    source, _ = made("moe")
    with pytest.raises(ValueError, match="dtype='float8' is unknown; use bfloat16 or float32"):
        convert(source, tmp_path / "out", dtype="float8")
    with pytest.raises(ValueError, match="quantization='int4' is unknown"):
        convert(source, tmp_path / "out", quantization="int4")
    with pytest.raises(ValueError, match="quantised already"):
        convert(made("moe_fp8")[0], tmp_path / "out", quantization="int8")
    assert list(tmp_path.iterdir()) == []


def test_bad_weights_leave_nothing(tmp_path):
    source = tiny.write(tmp_path / "source", "moe")
    whole = (source / "model.safetensors").read_bytes()
    (source / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="1 bytes short"):
        convert(source, tmp_path / "out")
    checkpoint = Checkpoint(tiny.write(source, "moe"))
    info = checkpoint.info("model.layers.1.mlp.experts.3.down_proj.weight")
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(info.offset + 40)
        file.write(np.float32(np.inf).tobytes())
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.3\.down_proj.*infinite"):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [source]


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(
    made, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=70 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(convert_module, "_SPARE", 70 << 20)
    with pytest.raises(OSError, match=r"the disk is full: .* GB are needed") as caught:
        convert(made("moe")[0], tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_is_finished(made, tmp_path, monkeypatch):
    source, whole = made("moe")
    writes = []
    original = orbax_io.ArrayWriter.write

    def fail(self, index, piece):
        writes.append(index)
        if len(writes) == 15:
            raise OSError("params/x: RESOURCE_EXHAUSTED: No space left on device")
        original(self, index, piece)

    monkeypatch.setattr(orbax_io.ArrayWriter, "write", fail)
    with pytest.raises(OSError, match=r"what is finished stays in .*out\.partial: make room"):
        convert(source, tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert len(finished(tmp_path / "out.partial")) >= 2
    assert content(convert(source, tmp_path / "out")) == content(whole)


def test_a_failed_write_of_the_file_system_is_an_os_error(tmp_path):
    shape = (4, 4)
    writer = orbax_io.ArrayWriter(tmp_path, "x", shape, np.float32, (4, 4))
    shutil.rmtree(tmp_path / "x")
    (tmp_path / "x").write_text("a file where a directory was")
    with pytest.raises(OSError, match=f"{tmp_path}/x: "):
        writer.write((slice(0, 4), slice(0, 4)), np.ones(shape, np.float32))
