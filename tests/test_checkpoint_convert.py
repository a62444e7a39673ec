"""Conversions: equal on any mesh, readable by plain orbax, interrupted and resumed, verified."""

import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny

from qwen_jax.runtime import Runtime
from qwen_jax.weights import convert as convert_module
from qwen_jax.weights import derive, hf, manifest, orbax_io, pieces
from qwen_jax.weights.checkpoint import convert, load, resolve
from qwen_jax.weights.safetensors import Checkpoint


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


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Converted variants, made once: a function from variant to (source, conversion)."""
    found: dict[str, tuple[pathlib.Path, pathlib.Path]] = {}

    def make(variant: str) -> tuple[pathlib.Path, pathlib.Path]:
        if variant not in found:
            work = tmp_path_factory.mktemp(variant)
            source = tiny.write_text_model(work / "source", variant, dtype="bfloat16")
            found[variant] = source, convert(source, work / "out")
        return found[variant]

    return make


@pytest.fixture
def copied(made, tmp_path):
    """A conversion that a test may damage."""
    _, out = made("moe_fp8")
    return pathlib.Path(shutil.copytree(out, tmp_path / "copy"))


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


# ---- interrupted ---------------------------------------------------------------------------------


class Interrupted(Exception):
    """Raised by a test's progress callback."""


def interrupt(source: pathlib.Path, out: pathlib.Path, part: float = 0.5, **options) -> None:
    def stop(transfer):
        if transfer.done >= part * transfer.total:
            raise Interrupted

    with pytest.raises(Interrupted):
        convert(source, out, progress=stop, **options)


def content(directory: pathlib.Path) -> dict[str, bytes]:
    """All files but the one in which orbax notes the time."""
    files = (x for x in directory.rglob("*") if x.is_file() and x.name != "_CHECKPOINT_METADATA")
    return {str(x.relative_to(directory)): x.read_bytes() for x in files}


def finished(partial: pathlib.Path) -> dict[pathlib.Path, int]:
    """The array files that the journal says are finished, and when they were written."""
    lines = [json.loads(x) for x in (partial / "journal.jsonl").read_text().splitlines()[1:]]
    names = [name for kind, _, arrays in lines if kind == "leaf" for name in arrays]
    files = [x for name in names for x in (partial / "params" / name).iterdir()]
    return {x.relative_to(partial): x.stat().st_mtime_ns for x in files}


def test_an_interrupted_conversion_goes_on_where_it_was(made, tmp_path):
    source, whole = made("moe_fp8")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    interrupt(source, out)
    assert not out.exists()
    before = finished(partial)
    assert len(before) > 20
    told = []
    convert(source, out, progress=told.append)
    assert told[0].done == told[0].skipped > 0.4 * told[0].total
    assert told[-1].done == told[-1].total
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)
    assert not partial.exists()


KILLED = """
import os, signal, sys
from qwen_jax.weights.checkpoint import convert
def kill(transfer):
    if transfer.done >= 0.5 * transfer.total:
        os.kill(os.getpid(), signal.SIGKILL)
convert(sys.argv[1], sys.argv[2], progress=kill)
"""


def test_a_killed_conversion_ends_identical(made, tmp_path):
    source, whole = made("moe_fp8")
    out = tmp_path / "out"
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    assert not out.exists()
    before = finished(tmp_path / "out.partial")
    convert(source, out)
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)


def test_a_kill_before_the_directory_gets_its_name_costs_nothing(made, tmp_path, monkeypatch):
    source, whole = made("moe_fp8")
    out, partial = tmp_path / "out", tmp_path / "out.partial"

    def fail(old, new):
        if pathlib.Path(new) == out:
            raise Interrupted
        rename(old, new)

    rename = os.replace
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(Interrupted):
        convert(source, out)
    monkeypatch.undo()
    assert not out.exists()
    before = finished(partial)
    convert(source, out)
    assert {x: (out / x).stat().st_mtime_ns for x in before} == before
    assert content(out) == content(whole)


def test_a_torn_line_of_the_journal_was_not_finished(made, tmp_path):
    source, whole = made("moe_fp8")
    out = tmp_path / "out"
    interrupt(source, out)
    journal = tmp_path / "out.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-25])
    assert content(convert(source, out)) == content(whole)


def test_a_finished_leaf_that_lost_a_file_is_written_again(made, tmp_path):
    source, whole = made("moe_fp8")
    interrupt(source, tmp_path / "out")
    (tmp_path / "out.partial" / next(iter(finished(tmp_path / "out.partial")))).unlink()
    assert content(convert(source, tmp_path / "out")) == content(whole)


def test_an_unfinished_conversion_is_no_checkpoint(made, tmp_path):
    source, _ = made("moe_fp8")
    interrupt(source, tmp_path / "out")
    with pytest.raises(ValueError, match="an unfinished conversion: run the same conversion again"):
        resolve(tmp_path / "out.partial")
    with pytest.raises(FileNotFoundError, match=r"unfinished conversion is at .*out\.partial"):
        resolve(tmp_path / "out")


def test_another_conversion_does_not_go_on_from_it(made, tmp_path):
    source, _ = made("moe")
    interrupt(source, tmp_path / "out")
    with pytest.raises(FileExistsError, match="the beginning of another conversion"):
        convert(source, tmp_path / "out", quantization="int8")
    os.utime(source / "model.safetensors")
    with pytest.raises(FileExistsError, match="the beginning of another conversion"):
        convert(source, tmp_path / "out")


def test_two_conversions_do_not_write_the_same_directory(made, tmp_path):
    source, _ = made("moe")
    (tmp_path / "out.partial").mkdir()
    handle = os.open(tmp_path / "out.partial", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # even this must keep a conversion out
    with pytest.raises(FileExistsError, match="another conversion is writing it"):
        convert(source, tmp_path / "out")
    os.close(handle)
    assert convert(source, tmp_path / "out").is_dir()


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


# ---- verified ------------------------------------------------------------------------------------


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


def test_an_fp8_scale_of_float32_survives(tmp_path):
    source = tiny.write(tmp_path / "source", "dense_fp8")
    out = convert(source, tmp_path / "out")
    loaded = load(out, runtime=one_device())
    assert loaded.config.quantization.scale_dtype == "float32"
    q = loaded.params.layers[0].attn.q
    assert (q.scale.dtype, q.values.dtype) == (np.float32, ml_dtypes.float8_e4m3fn)
