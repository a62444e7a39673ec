"""safetensors reading and writing: right values, and an error for each way a file can be wrong."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.weights.safetensors import INDEX_NAME, Checkpoint, SafetensorsFile, save_file
from qwen_jax.weights.safetensors_header import DTYPES, MAX_HEADER_BYTES

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path: pathlib.Path, header, data: bytes = b"", length: int | None = None):
    """A file from a header (object, text or bytes), written without any help from the code."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


def every_dtype() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        code: rng.integers(0, 2, (3, 5)).astype(dtype) if code == "BOOL" else
        rng.integers(0, 60, (3, 5)).astype(dtype)
        for code, dtype in DTYPES.items()
    }  # fmt: skip
    return arrays | {
        "scalar": np.array(2.5, np.float32),
        "empty": np.zeros((0, 4), ml_dtypes.bfloat16),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "größe/層": np.arange(3, dtype=np.int8),
    }


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- round trips ---------------------------------------------------------------------------------


def test_what_is_saved_is_read_bit_for_bit(tmp_path):
    arrays = every_dtype()
    save_file(tmp_path / "a.safetensors", arrays, {"format": "np"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert sorted(file.names) == sorted(arrays)
    assert file.metadata == {"format": "np"}
    for name, array in arrays.items():
        assert same_bits(file.tensor(name), array), name
        info = file.info(name)
        assert (info.dtype, info.shape, info.nbytes) == (array.dtype, array.shape, array.nbytes)
        assert info.file == tmp_path / "a.safetensors"


def test_offsets_count_from_the_start_of_the_file(tmp_path):
    path = raw_file(tmp_path / "a", {"x": F32}, np.array([1.5, -2.0], "<f4").tobytes())
    info = SafetensorsFile(path).info("x")
    found = np.frombuffer(path.read_bytes()[info.offset : info.offset + info.nbytes], "<f4")
    np.testing.assert_array_equal(found, [1.5, -2.0])
    np.testing.assert_array_equal(SafetensorsFile(path).tensor("x"), [1.5, -2.0])


def test_bfloat16_and_float8_bits_are_read_as_the_format_says(tmp_path):
    header = {
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]},
        "f": {"dtype": "F8_E4M3", "shape": [3], "data_offsets": [4, 7]},
    }
    data = b"\x80\x3f\x40\xc0" + b"\x38\x7e\xb8"  # 1, -3; 1, 448, -1
    file = SafetensorsFile(raw_file(tmp_path / "a", header, data))
    np.testing.assert_array_equal(file.tensor("b").astype(np.float64), [1, -3])
    np.testing.assert_array_equal(file.tensor("f").astype(np.float64), [1, 448, -1])


def test_tensors_are_views_of_the_file_and_cannot_be_written(tmp_path):
    save_file(tmp_path / "a", {"x": np.arange(4.0), "y": np.arange(3, dtype=np.int8)})
    file = SafetensorsFile(tmp_path / "a")
    assert not file.tensor("x").flags.owndata
    assert np.shares_memory(file.tensor("x"), file.tensor("x"))
    for name in file.names:
        with pytest.raises(ValueError, match="read-only"):
            file.tensor(name)[0] = 1


def test_misaligned_data_come_out_aligned_and_right(tmp_path):
    header = json.dumps({"x": F32})
    header += " " * ((3 - len(header)) % 8)  # the data start 3 bytes after a multiple of 8
    path = raw_file(tmp_path / "a", header, np.array([3.0, 4.0], "<f4").tobytes())
    assert SafetensorsFile(path).info("x").offset % 4 == 3
    array = SafetensorsFile(path).tensor("x")
    assert array.flags.aligned
    assert not array.flags.writeable
    np.testing.assert_array_equal(array, [3.0, 4.0])


def test_saved_tensors_are_aligned_whatever_their_names_and_sizes(tmp_path):
    arrays = {"a" * i: np.zeros(i, d) for i in range(1, 20) for d in ("i1",)}
    arrays |= {"f" * i: np.zeros(i, np.float64) for i in range(1, 20)}
    save_file(tmp_path / "a", arrays)
    file = SafetensorsFile(tmp_path / "a")
    assert all(file.info(n).offset % file.info(n).dtype.itemsize == 0 for n in file.names)


def test_names_follow_the_bytes_not_the_header(tmp_path):
    header = {
        "late": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]},
        "none": {"dtype": "U8", "shape": [0], "data_offsets": [1, 1]},
        "early": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
    }
    file = SafetensorsFile(raw_file(tmp_path / "a", header, b"\x05\x06\x07"))
    assert file.names == ("early", "none", "late")
    np.testing.assert_array_equal(file.tensor("late"), [6, 7])


def test_a_failed_save_leaves_the_old_file(tmp_path):
    save_file(tmp_path / "a", {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"z has dtype complex128; safetensors holds bool"):
        save_file(tmp_path / "a", {"x": np.zeros(2), "z": np.zeros(2, complex)})
    np.testing.assert_array_equal(SafetensorsFile(tmp_path / "a").tensor("x"), [1, 1])


def test_saving_over_a_mapped_file_leaves_the_arrays_read_from_it(tmp_path):
    save_file(tmp_path / "a", {"x": np.ones(4)})
    before = SafetensorsFile(tmp_path / "a").tensor("x")
    save_file(tmp_path / "a", {"x": np.zeros(4)})
    np.testing.assert_array_equal(before, np.ones(4))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_save_rejects_what_the_format_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="cannot be called '__metadata__'"):
        save_file(tmp_path / "a", {"__metadata__": np.ones(2)})
    with pytest.raises(ValueError, match="strings to strings, found 'step': 3"):
        save_file(tmp_path / "a", {"x": np.ones(2)}, {"step": 3})
    with pytest.raises(ValueError, match="x has dtype >f4"):
        save_file(tmp_path / "a", {"x": np.ones(2, ">f4")})
    assert not list(tmp_path.iterdir())


# ---- every way in which one file can be wrong ----------------------------------------------------


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


BAD_HEADERS = {
    "unknown dtype": ({"x": entry("F4")}, "tensor 'x': dtype 'F4' is not known; known are BOOL"),
    "dtype no string": ({"x": entry(dtype=["F32"])}, "tensor 'x': dtype .* is not known"),
    "negative size": ({"x": entry(shape=[-2])}, r"tensor 'x': shape must .* found \[-2\]"),
    "bool size": ({"x": entry(shape=[True, 2])}, r"tensor 'x': shape must .* found \[True, 2\]"),
    "float size": ({"x": entry(shape=[2.0])}, r"tensor 'x': shape must .* found \[2.0\]"),
    "negative offset": ({"x": entry(offsets=[-8, 0])}, r"'x': data_offsets .* found \[-8, 0\]"),
    "offsets reversed": ({"x": entry(offsets=[8, 0])}, r"'x': data_offsets .* found \[8, 0\]"),
    "three offsets": ({"x": entry(offsets=[0, 8, 9])}, r"'x': data_offsets .* \[0, 8, 9\]"),
    "size mismatch": ({"x": entry(shape=[3])}, r"'x': F32 \[3\] takes 12 bytes, .* hold 8"),
    "huge shape": ({"x": entry(shape=[2**40, 2**40])}, r"takes 4,835,703,278,458,516,698,824,704"),
    "missing field": ({"x": {"dtype": "F32", "shape": [2]}}, "must hold dtype, shape and data_off"),
    "entry no object": ({"x": 3}, "tensor 'x': the entry must hold .* found 3"),
    "hole at start": ({"x": entry(offsets=[2, 10])}, "2 bytes between the header and tensor 'x'"),
    "hole": (
        {"x": entry("U8", [2], [0, 2]), "y": entry("U8", [2], [6, 8])},
        "4 bytes between tensor 'x' and tensor 'y' belong to no tensor",
    ),
    "overlap": (
        {"x": entry("U8", [6], [0, 6]), "y": entry("U8", [4], [4, 8])},
        r"tensor 'y' begins at byte \d+, inside tensor 'x'",
    ),
    "same place twice": ({"x": entry(), "y": entry()}, "inside tensor 'x', which ends"),
    "metadata value": (
        {"__metadata__": {"a": 1}, "x": entry()},
        "strings to strings, found 'a': 1",
    ),
    "metadata list": ({"__metadata__": ["a"], "x": entry()}, r"strings to strings, found \['a'\]"),
    "no tensors": ({}, "8 bytes lie behind the last tensor"),
    "list": ("[1]", r"the header must start with '{', found b'\['"),
    "leading space": (' {"x": 1}', "the header must start with '{', found b' '"),
    "no JSON": ('{"x": ', "header is not valid JSON: Expecting value"),
    "not UTF-8": (b'{"\xff": 1}', "header is not valid JSON: 'utf-8' codec"),
    "deep": ("{" + '"a":[' + "[" * 200_000, "header is not valid JSON"),
    "long integer": ('{"x": ' + "9" * 5000 + "}", "header is not valid JSON"),
    "same key": ('{"x": {}, "x": {}}', "the key 'x' occurs more than once"),
    "same inner key": ('{"x": {"dtype": "F32", "dtype": "F16"}}', "the key 'dtype' occurs more"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_naming_file_and_reason(tmp_path, case):
    header, message = BAD_HEADERS[case]
    path = raw_file(tmp_path / "bad.safetensors", header, bytes(8))
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))}: .*{message}"):
        SafetensorsFile(path)


def test_the_good_form_of_the_bad_headers_is_accepted(tmp_path):
    header = {"__metadata__": None, "x": entry(unknown_field=1)}
    np.testing.assert_array_equal(
        SafetensorsFile(raw_file(tmp_path / "a", header, bytes(8))).tensor("x"), [0, 0]
    )


@pytest.mark.parametrize("missing", [1, 5, 8, 11])
def test_a_truncated_file_says_how_many_bytes_are_missing(tmp_path, missing):
    save_file(tmp_path / "a", {"x": np.arange(2.0, dtype="f4"), "y": np.arange(1.0, dtype="f4")})
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[:-missing])
    cut = "y" if missing <= 4 else "x"
    with pytest.raises(
        ValueError,
        match=f"is {missing} bytes short: expected {len(whole)} bytes, found "
        f"{len(whole) - missing}; tensor '{cut}' is cut off: download it again",
    ):
        SafetensorsFile(tmp_path / "a")


def test_a_file_cut_inside_the_header_is_refused(tmp_path):
    save_file(tmp_path / "a", {"x": np.arange(2.0)})
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(b"\xff" * 7)
    with pytest.raises(
        ValueError, match="is at least 1 bytes short: its header ends at byte 8 and"
    ):
        SafetensorsFile(tmp_path / "a")
    for size in (0, 3, 8, 20):
        (tmp_path / "a").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"bytes short.* the file has {size}: download it"):
            SafetensorsFile(tmp_path / "a")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path):
    path = raw_file(tmp_path / "a", {"x": F32}, bytes(11))
    with pytest.raises(ValueError, match="3 bytes lie behind the last tensor: expected"):
        SafetensorsFile(path)


def test_a_huge_header_length_is_refused_without_reading_it(tmp_path):
    path = raw_file(tmp_path / "a", {"x": F32}, bytes(8), length=MAX_HEADER_BYTES + 1)
    with pytest.raises(ValueError, match=r"length is 100,000,001 bytes, the limit is 100,000,000"):
        SafetensorsFile(path)
    path.write_bytes(b"<!DOCTYPE html><html>404</html>")
    with pytest.raises(ValueError, match="this is no safetensors file"):
        SafetensorsFile(path)


def test_a_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "a").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    with pytest.raises(ValueError, match=r"is a Git LFS pointer.*git lfs pull"):
        SafetensorsFile(tmp_path / "a")


def test_a_missing_file_and_an_unknown_name_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SafetensorsFile(tmp_path / "nowhere")
    save_file(tmp_path / "a", {"model.norm.weight": np.ones(2)})
    with pytest.raises(ValueError, match=r"no tensor 'model.norm' among 1; did you mean 'model.no"):
        SafetensorsFile(tmp_path / "a").tensor("model.norm")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_damaged_file_gives_anything_but_a_value_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors"
    save_file(path, {"a": np.ones((2, 3), "f4"), "b": np.ones(5, ml_dtypes.bfloat16)}, {"k": "v"})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        file = SafetensorsFile(path)
    except ValueError as e:
        assert str(e).startswith(str(path))  # noqa: PT017
    else:
        for name in file.names:
            assert file.tensor(name).nbytes == file.info(name).nbytes


# ---- directories ---------------------------------------------------------------------------------


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
        assert same_bits(checkpoint.tensor(name), array)
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


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parity
def test_the_reference_library_reads_our_files(tmp_path):
    reference = pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    arrays = every_dtype()
    save_file(tmp_path / "a", arrays, {"format": "pt"})
    with reference.safe_open(tmp_path / "a", "pt") as f:
        assert sorted(f.keys()) == sorted(arrays)
        assert f.metadata() == {"format": "pt"}
        for name, array in arrays.items():
            tensor = f.get_tensor(name)
            assert tuple(tensor.shape) == array.shape, name
            if name != "F8_E8M0":
                values = tensor.to(torch.float64).numpy()
                np.testing.assert_array_equal(values, array.astype(np.float64), err_msg=name)


@pytest.mark.parity
def test_we_read_the_files_of_the_reference_library(tmp_path):
    pytest.importorskip("safetensors")
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file as reference_save

    tensors = {
        "a": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
        "b": torch.linspace(-3, 3, 7).to(torch.float8_e4m3fn),
        "c": torch.arange(5, dtype=torch.int64),
        "d": torch.tensor(1.25),
        "e": torch.zeros(0, 3, dtype=torch.float16),
        "f": torch.tensor([True, False]),
    }
    reference_save(tensors, tmp_path / "a", {"format": "pt"})
    file = SafetensorsFile(tmp_path / "a")
    assert file.metadata == {"format": "pt"}
    assert sorted(file.names) == sorted(tensors)
    for name, tensor in tensors.items():
        found = file.tensor(name)
        assert found.shape == tuple(tensor.shape)
        assert found.dtype.itemsize == tensor.element_size()
        np.testing.assert_array_equal(found.astype(np.float64), tensor.to(torch.float64).numpy())
