"""Copies between views: any strides, any dtypes, NaN found wherever it is."""

import mmap

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.weights import copying

DTYPES = [
    np.dtype(x)
    for x in (np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8)
]


def random(shape, dtype: np.dtype) -> np.ndarray:
    values = np.random.default_rng(0).integers(-100, 100, shape).astype(np.float32)
    return values.astype(dtype)


@st.composite
def views(draw) -> tuple[np.ndarray, np.ndarray]:
    """A source and a destination of one shape, both with axes in any order and cut anywhere."""
    shape = draw(st.lists(st.integers(1, 12), min_size=1, max_size=5))
    found = []
    for dtype in draw(st.sampled_from([(a, a) for a in DTYPES] + [(DTYPES[2], DTYPES[0])])):
        order = draw(st.permutations(range(len(shape))))
        margins = [draw(st.integers(0, 3)) for _ in shape]
        whole = [shape[i] + margins[i] for i in order]
        view = random(whole, dtype).transpose(np.argsort(order))
        found.append(view[tuple(slice(0, n) for n in shape)])
    return found[0], np.array(found[1]) if draw(st.booleans()) else found[1]


@settings(max_examples=200, deadline=None)
@given(views())
def test_a_copy_equals_numpys(pair):
    source, out = pair
    expected = source.astype(out.dtype)
    copying.copy_all([("x", out, source)])
    assert np.array_equal(out.view(f"u{out.itemsize}"), expected.view(f"u{out.itemsize}"))


@pytest.mark.parametrize("shape", [(1,), (255, 257), (256, 256), (513, 3), (2, 300, 5, 64)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_blocks_meet_without_gap_or_overlap(shape, dtype):
    source = random(shape, dtype)
    for axes in {tuple(range(len(shape))), tuple(reversed(range(len(shape))))}:
        view = source.transpose(axes)
        out = np.zeros(view.shape, dtype)
        copying.copy_all([("x", out, view)])
        assert np.array_equal(out.view(f"u{out.itemsize}"), view.view(f"u{out.itemsize}"))


def test_every_conversion_rounds_as_numpy_does():
    source = np.random.default_rng(1).standard_normal((300, 200)).astype(np.float32)
    for a in DTYPES[:3]:
        for b in DTYPES[:3]:
            x = source.astype(a).T
            out = np.zeros(x.shape, b)
            copying.copy_all([("x", out, x)])
            assert np.array_equal(
                out.view(f"u{out.itemsize}"), x.astype(b).view(f"u{out.itemsize}")
            )


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(DTYPES[:4]),
    st.booleans(),
    st.integers(0, 700 * 300 - 1),
    st.sampled_from([np.nan, np.inf, -np.inf]),
)
def test_one_bad_value_anywhere_is_found(dtype, turned, position, bad):
    bad = np.nan if dtype == ml_dtypes.float8_e4m3fn else bad
    source = random((700, 300), dtype)
    source.reshape(-1)[position] = bad
    view = source.T if turned else source
    with pytest.raises(copying.NotFiniteError, match=r"weights\.here: at least 1 values"):
        copying.copy_all([("weights.here", np.empty(view.shape, dtype), view)])


def test_a_value_that_overflows_when_it_is_rounded_is_found():
    source = np.full((3, 3), 3.4e38, np.float32)
    out = np.empty((3, 3), ml_dtypes.bfloat16)
    with pytest.raises(copying.NotFiniteError, match="as bfloat16"):
        copying.copy_all([("x", out, source)])


def test_the_largest_values_are_finite():
    for dtype in DTYPES[:4]:
        source = np.full((5, 5), ml_dtypes.finfo(dtype).max, dtype)
        out = np.empty((5, 5), dtype)
        copying.copy_all([("x", out, source), ("y", out.copy(), -source)])
        assert float(out[4, 4]) == float(ml_dtypes.finfo(dtype).max)


def test_empty_is_aligned_for_any_shape():
    for shape in ((), (1,), (3, 5), (1000, 1001)):
        x = copying.empty(shape, np.dtype(np.float32))
        assert x.ctypes.data % 64 == 0
        assert (x.shape, x.dtype) == (shape, np.float32)


def test_forgotten_pages_are_given_back_and_read_again(tmp_path):
    content = np.arange(1 << 20, dtype=np.uint32)
    path = tmp_path / "file"
    content.tofile(path)
    mapped = np.asarray(np.memmap(path, np.uint8, "r"))
    view = mapped[4 * 1000 : 4 * 1_000_000].view(np.uint32)
    assert view.sum(dtype=np.int64) == content[1000:1_000_000].sum(dtype=np.int64)
    before = resident(path)
    copying.forget(view)
    assert before - resident(path) >= view.nbytes - 2 * mmap.PAGESIZE
    assert np.array_equal(view, content[1000:1_000_000])


def resident(path) -> int:
    """Bytes of a mapped file that this process holds."""
    with open("/proc/self/smaps") as smaps:
        lines = iter(smaps)
        found = [next(x for x in lines if x.startswith("Rss")) for y in lines if str(path) in y]
    return sum(1024 * int(x.split()[1]) for x in found)


def test_forgetting_an_array_of_no_file_does_nothing():
    x = np.ones(10)
    copying.forget(x[2:5])
    assert x.sum() == 10
