"""Every way in which one safetensors file can be wrong gives an error that names it."""

import json
import pathlib
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.weights.safetensors import SafetensorsFile, save_file
from qwen_jax.weights.safetensors_header import MAX_HEADER_BYTES

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def raw_file(path: pathlib.Path, header, data: bytes = b"", length: int | None = None):
    """A file from a header (object, text or bytes), written without any help from the code."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header)).encode()
    length = len(header) if length is None else length
    path.write_bytes(length.to_bytes(8, "little") + header + data)
    return path


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
