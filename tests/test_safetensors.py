"""What is saved is read back bit for bit, here and by the reference library."""

import json

import ml_dtypes
import numpy as np
import pytest
from test_safetensors_header import F32, raw_file

from qwen_jax.weights.safetensors import SafetensorsFile, save_file
from qwen_jax.weights.safetensors_header import DTYPES


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
