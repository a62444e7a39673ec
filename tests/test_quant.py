"""Quantised weights against float64 numpy, which shares no helper with the code."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qwen_jax.weights import quant
from qwen_jax.weights.quant import QArray

quantize = jax.jit(quant.quantize, static_argnums=(1, 2))
dequantize = jax.jit(quant.dequantize, static_argnums=1)
einsum = jax.jit(quant.einsum, static_argnums=0)
LARGEST = {"fp8": 448.0, "int8": 127.0}
DTYPES = {"fp8": ml_dtypes.float8_e4m3fn, "int8": np.int8}
# spec, sizes by letter (128-blocks end inside most of them), contracted letters
SPECS = {
    "TD,DNH->TNH": ({"T": 5, "D": 192, "N": 3, "H": 64}, "D"),
    "TNH,NHD->TD": ({"T": 5, "N": 3, "H": 64, "D": 160}, "NH"),
    "TD,DPI->TPI": ({"T": 5, "D": 192, "P": 2, "I": 200}, "D"),
    "TI,ID->TD": ({"T": 5, "I": 200, "D": 192}, "I"),
    "TD,DV->TV": ({"T": 5, "D": 192, "V": 300}, "D"),
}


def oracle_spread(scale, shape, blocks):
    """The scale of every element, one index at a time."""
    index = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    blocked = tuple(i // b for i, b in zip(index, blocks, strict=True))
    return np.asarray(scale, np.float64)[blocked]


def weights(shape, seed=0):
    """Zero mean, a few large values, and blocks of different size."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[-1]))
    w.flat[:: max(1, w.size // 7)] *= 20
    return w.astype(np.float32)


def rounding(dtype):
    """Half the spacing of numbers next to 1."""
    return {"float32": 2.0**-24, "bfloat16": 2.0**-8}[jnp.dtype(dtype).name]


# ---- quantize, dequantize --------------------------------------------------------------------


CASES = [
    ((256, 384), (128, 128)),
    ((200, 300), (128, 128)),  # partial blocks at both edges
    ((5, 7), (128, 128)),  # a block larger than the weight
    ((192, 3, 64), (128, 2, 64)),
    ((4, 96, 2, 40), (1, 128, 1, 32)),
    ((96, 40), (96, 1)),  # one scale per output channel
    ((6, 8), (1, 1)),
]


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("shape", "blocks"), CASES)
def test_quantize_takes_the_largest_of_every_block(form, shape, blocks):
    w = weights(shape)
    q = quantize(jnp.asarray(w), blocks, form)
    expected = np.empty(quant.scale_shape(shape, blocks))
    for index in np.ndindex(expected.shape):
        part = tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, blocks, strict=True))
        expected[index] = np.abs(w[part]).max() / LARGEST[form]
    assert q.values.dtype == DTYPES[form]
    assert q.scale.dtype == jnp.float32
    np.testing.assert_allclose(q.scale, expected, rtol=2 * rounding("float32"))
    scaled = w / oracle_spread(q.scale, shape, q.blocks).astype(np.float32)
    rounded = np.round(scaled) if form == "int8" else scaled
    limit = LARGEST[form]
    np.testing.assert_array_equal(q.values, np.clip(rounded, -limit, limit).astype(DTYPES[form]))


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize(("shape", "blocks"), CASES)
def test_quantising_errs_by_half_a_step_at_most(form, shape, blocks):
    w = weights(shape).astype(np.float64)
    q = quantize(jnp.asarray(w, jnp.float32), blocks, form)
    step = oracle_spread(q.scale, shape, q.blocks)
    # float8_e4m3: 3 bits behind the leading one, and steps of 2**-9 below 2**-6.
    half = step / 2 if form == "int8" else np.maximum(np.abs(w) * 2.0**-4, step * 2.0**-10)
    assert (
        np.abs(np.asarray(dequantize(q, jnp.float32), np.float64) - w) <= half * (1 + 1e-6)
    ).all()


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_what_was_quantised_quantises_to_itself(form):
    first = quantize(jnp.asarray(weights((200, 300))), (128, 128), form)
    again = quantize(dequantize(first, jnp.float32), (128, 128), form)
    np.testing.assert_array_equal(first.values, again.values)


@pytest.mark.parametrize("form", ["fp8", "int8"])
@pytest.mark.parametrize("tiny", [0.0, 1e-44, 1e-39])
def test_a_block_of_nothing_is_zero_and_finite(form, tiny):
    w = np.full((4, 6), 1.5, np.float32)
    w[:2, :3] = tiny
    w[0, 0] = 0
    q = quantize(jnp.asarray(w), (2, 3), form)
    assert np.isfinite(np.asarray(q.values, np.float32)).all()
    back = np.asarray(dequantize(q, jnp.float32))
    np.testing.assert_allclose(back, np.where(w == 1.5, 1.5, 0), rtol=1e-6)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("shape", "blocks"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dequantize_multiplies_in_float32_and_rounds_once(scale_dtype, shape, blocks, dtype):
    q = quantize(jnp.asarray(weights(shape)), blocks, "fp8")
    q = q.replace(scale=q.scale.astype(scale_dtype))
    exact = np.asarray(q.values, np.float64) * oracle_spread(q.scale, shape, q.blocks)
    once = exact.astype(np.float32).astype(jnp.dtype(dtype))
    out = dequantize(q, dtype)
    assert out.dtype == dtype
    np.testing.assert_array_equal(np.asarray(out, np.float32), once.astype(np.float32))


def test_dequantising_a_plain_weight_changes_its_dtype_only():
    w = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    out = dequantize(w, jnp.bfloat16)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(out, np.float32), w)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_spread_stays_in_the_library_of_its_scale(make):
    scale = make(np.arange(6, dtype=np.float32).reshape(2, 1, 3))
    wide = quant.spread(scale, (200, 64, 300), (128, 64, 128))
    assert type(wide) is type(scale)
    assert wide.shape == (200, 1, 300)
    full = np.broadcast_to(wide, (200, 64, 300))
    np.testing.assert_array_equal(full, oracle_spread(scale, (200, 64, 300), (128, 64, 128)))


def test_an_unknown_form_raises_and_lists_the_known():
    with pytest.raises(ValueError, match=r"quantization 'int4' is unknown.*fp8.*int8"):
        quant.quantize(jnp.ones((2, 2)), (1, 1), "int4")


def test_a_quantised_weight_is_a_pytree_of_two_arrays():
    q = quantize(jnp.ones((4, 6)), (2, 3), "int8")
    assert [x.shape for x in jax.tree.leaves(q)] == [(4, 6), (2, 2)]
    assert jax.tree.map(lambda x: x, q).blocks == (2, 3)
    assert (q.shape, q.ndim) == ((4, 6), 2)


# ---- einsum ----------------------------------------------------------------------------------


def blocks_of(kind, letters, size, contracted):
    if kind == "channel":
        return tuple(size[x] if x in contracted else 1 for x in letters)
    if kind == "row":  # scales along the contraction only
        return tuple(16 if x in contracted else size[x] for x in letters)
    if kind == "element":
        return tuple(1 for _ in letters)
    return tuple(1 if x in "NP" else 128 for x in letters)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        ("plain", None),
        ("channel", "fp8"),
        ("channel", "int8"),
        ("block", "fp8"),
        ("row", "int8"),
        ("element", "fp8"),
    ],
)
@pytest.mark.parametrize("spec", SPECS)
def test_einsum_is_the_product_with_the_dequantised_weight(spec, kind, form, dtype):
    size, contracted = SPECS[spec]
    left, letters = spec.split("->")[0].split(",")
    w = weights([size[x] for x in letters], seed=1)
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal([size[c] for c in left]), dtype)
    if form is None:
        stored = jnp.asarray(w, dtype)
        exact = np.asarray(stored, np.float64)
    else:
        stored = quantize(jnp.asarray(w), blocks_of(kind, letters, size, contracted), form)
        values = np.asarray(stored.values, np.float64)
        exact = values * oracle_spread(stored.scale, w.shape, stored.blocks)
    out = einsum(spec, x, stored)
    wide = np.asarray(x, np.float64)
    expected = np.einsum(spec, wide, exact)
    size_of_sum = np.einsum(spec, np.abs(wide), np.abs(exact))
    terms = np.prod([size[c] for c in contracted])
    summing = terms * rounding("float32") * size_of_sum
    weight_rounded = kind in ("block", "row", "element")
    rounded = rounding(dtype) * (np.abs(expected) + weight_rounded * size_of_sum)
    assert out.dtype == dtype
    error = np.abs(np.asarray(out, np.float64) - expected)
    assert (error <= 1.01 * (summing + rounded)).all()


def test_a_single_scale_along_the_contraction_adds_no_rounding():
    # Products of small integers are exact in float32, in any order; so is a scale of 2**-3.
    rng = np.random.default_rng(0)
    values = rng.integers(-127, 128, (64, 2, 24)).astype(np.int8)
    x = rng.integers(-8, 9, (5, 64)).astype(np.float32)
    scale = np.full((1, 2, 24), 0.125, np.float32)
    w = QArray(jnp.asarray(values), jnp.asarray(scale), (64, 1, 1))
    out = einsum("TD,DPI->TPI", jnp.asarray(x), w)
    np.testing.assert_array_equal(out, np.einsum("TD,DPI->TPI", x, values * 0.125))


def test_letters_of_the_result_may_stand_in_any_order():
    rng = np.random.default_rng(0)
    w = quantize(jnp.asarray(rng.standard_normal((6, 4, 5)), jnp.float32), (6, 1, 1), "int8")
    x = jnp.asarray(rng.standard_normal((3, 6)), jnp.float32)
    out = einsum("td,dnh->hnt", x, w)
    expected = np.einsum("td,dnh->hnt", x, np.asarray(dequantize(w, jnp.float32)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [
        ("TNH,NHD->TD", (2, 16, 64), (16, 64, 128)),  # "NH" is not in alphabetical order
        ("UCZYX,CZYXD->UD", (4, 3, 2, 16, 16), (3, 2, 16, 16, 96)),
    ],
)
def test_a_weight_is_multiplied_as_it_lies_in_memory(spec, x, w):
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (x, w)]
    product = jax.jit(lambda x, w: quant.einsum(spec, x, w)).lower(*shapes).compile()
    temporary = product.memory_analysis().temp_size_in_bytes
    assert temporary < 4 * np.prod(w), "a transposed copy of the weight"


# ---- what a TPU does in place of it ------------------------------------------------------------


def by_hand_of_tpu(spec, x, w):
    """What `einsum` compiles to on a TPU, run here."""
    with pytest.MonkeyPatch.context() as patch:
        choose = lambda *args, tpu, default: tpu(*args)
        patch.setattr(quant.lax, "platform_dependent", choose)
        return quant.einsum(spec, x, w, jnp.float32)


@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize(
    ("spec", "sizes", "blocks"),
    [
        ("TD,DNH->TNH", {"D": 256, "N": 3, "H": 64}, (128, 1, 64)),
        ("TD,DPI->TPI", {"D": 256, "P": 2, "I": 200}, (64, 1, 128)),
        ("TI,ID->TD", {"I": 96, "D": 160}, (32, 128)),
    ],
)
def test_on_a_tpu_sums_of_blocks_are_scaled_and_no_weight_is_rounded(spec, sizes, blocks, rows):
    left, letters = spec.split("->")[0].split(",")
    stored = quantize(jnp.asarray(weights([sizes[c] for c in letters], seed=3)), blocks, "fp8")
    x = np.random.default_rng(4).standard_normal([{**sizes, "T": rows}[c] for c in left])
    x = jnp.asarray(x, jnp.bfloat16)
    exact = np.asarray(stored.values, np.float64)
    exact = exact * oracle_spread(stored.scale, exact.shape, stored.blocks)
    wide = np.asarray(x, np.float64)
    error = np.abs(by_hand_of_tpu(spec, x, stored) - np.einsum(spec, wide, exact))
    terms = x.shape[1]
    limit = terms * rounding("float32") * np.einsum(spec, np.abs(wide), np.abs(exact))
    assert (error <= limit).all(), (error / limit).max()


def test_on_a_tpu_one_row_has_company_and_many_rows_meet_dequantised_weights():
    def products(rows, platform, w):
        x = jnp.ones((rows, 256), jnp.bfloat16)
        traced = jax.jit(lambda x, w: quant.einsum("TD,DNH->TNH", x, w)).trace(x, w)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return [line.split("->")[-1].strip() for line in text.splitlines() if "dot_general" in line]

    plain = jnp.ones((256, 3, 64), jnp.bfloat16)
    assert products(1, "cpu", plain)[0].startswith("tensor<1x3x64")
    assert products(1, "tpu", plain)[0].startswith("tensor<2x3x64")
    blocked = quantize(jnp.ones((256, 3, 64)), (128, 1, 64), "fp8")
    for rows, platform, shape in [
        (5, "tpu", "2x5x3x64"),
        (5, "cpu", "5x3x64"),
        (quant.MOST_SPLIT_ROWS + 1, "tpu", f"{quant.MOST_SPLIT_ROWS + 1}x3x64"),
    ]:
        assert products(rows, platform, blocked)[0].startswith(f"tensor<{shape}x")
