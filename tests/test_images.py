"""Pictures to patches: sizes, pixels to the last bit, order, positions, packing."""

import hashlib
import json
import pathlib

import numpy as np
import pytest
import vision_samples as samples

from qwen_jax.prompt import images, patches, resize
from qwen_jax.prompt.media import Media
from qwen_jax.prompt.media_options import MediaOptions, image_bounds
from qwen_jax.prompt.preprocessor import VisionRules

GOLDEN = pathlib.Path(__file__).parent / "golden"
TABLES = json.loads((GOLDEN / "vision.json").read_text(encoding="utf-8"))
RULES = VisionRules()
SIDE = 48


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "vision.npz") as arrays:
        return dict(arrays)


def prepare(source, **options) -> images.Picture:
    pytest.importorskip("PIL", reason="needs the extra 'vision'")
    media = Media("image", source, MediaOptions(**options), "image 0")
    return images.prepare([media], RULES)[0]


# ---- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", samples.SIZES)
def test_image_sizes_are_those_of_transformers(name):
    height, width, low, high = samples.SIZES[name]
    size = resize.image_size(height, width, factor=32, min_pixels=low, max_pixels=high)
    assert list(size) == TABLES["image_size"][name]


def test_half_a_token_rounds_to_an_even_number_of_tokens():
    limits = {"factor": 32, "min_pixels": 1, "max_pixels": 10**9}
    assert resize.image_size(48, 80, **limits) == (64, 64)
    assert resize.image_size(112, 144, **limits) == (128, 128)


@pytest.mark.parametrize(("height", "width"), [(0, 10), (10, 0)])
def test_a_picture_without_pixels_is_refused(height, width):
    with pytest.raises(ValueError, match=rf"{width}x{height} pixels are no picture"):
        resize.image_size(height, width, factor=32, min_pixels=1, max_pixels=10**9)


def test_aspect_ratios_up_to_200_are_taken_and_others_refused():
    limits = {"factor": 32, "min_pixels": 1, "max_pixels": 10**9}
    assert resize.image_size(32, 6400, **limits) == (32, 6400)
    with pytest.raises(ValueError, match=r"aspect ratio of 200\.0, the limit is 200: crop it"):
        resize.image_size(32, 6401, **limits)
    with pytest.raises(ValueError, match=r"aspect ratio of 201\.0"):
        resize.image_size(201, 1, **limits)


# ---- pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES["pictures"])
def test_pixel_values_are_those_of_transformers_bit_for_bit(name):
    pytest.importorskip("PIL", reason="needs the extra 'vision'")
    picture = prepare(samples.pictures()[name])
    values = patches.pixel_values(picture.patches, mean=RULES.image.mean, std=RULES.image.std)
    expected = TABLES["pictures"][name]
    assert list(picture.grid) == expected["grid"]
    assert values.dtype == np.float32
    assert hashlib.sha256(values.tobytes()).hexdigest() == expected["sha256"]


def test_every_byte_becomes_its_own_channels_value():
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    bytes_of = np.tile(np.arange(256, dtype=np.uint8)[:, None], (1, 6))  # two elements per channel
    values = patches.pixel_values(bytes_of, mean=mean, std=std)
    exact = (np.arange(256) / 255.0)[:, None] - np.repeat(np.asarray(mean), 2)
    exact /= np.repeat(np.asarray(std), 2)
    # Three float32 roundings: of the quotient, the difference and the second quotient.
    assert np.abs(values - exact).max() < 4 * np.spacing(np.float32(np.abs(exact).max()))


def test_min_pixels_and_max_pixels_bound_a_picture():
    picture = samples.noise(256, 320, 3)
    assert prepare(picture).grid == (1, 16, 20)
    assert (prepare(picture).num_pixels, prepare(picture).num_tokens) == (256 * 320, 8 * 10)
    assert prepare(picture, max_pixels=128 * 160).grid == (1, 8, 10)
    assert prepare(picture, min_pixels=512 * 640).grid == (1, 32, 40)
    assert prepare(picture, min_pixels=1024, max_pixels=1024).num_tokens == 1


def test_a_picture_of_the_right_size_is_not_touched():
    picture = samples.noise(256, 320, 3)
    rebuilt = prepare(picture).patches.reshape(8, 10, 2, 2, 3, 2, 16, 16)
    # block row, block column, row, column, C, Z, Y, X -> rows, columns, C
    for frame in range(2):
        planes = rebuilt[:, :, :, :, :, frame].transpose(0, 2, 5, 1, 3, 6, 4)
        np.testing.assert_array_equal(planes.reshape(256, 320, 3), picture)


def test_the_digest_is_of_the_pixels_that_are_seen():
    picture = samples.noise(256, 320, 3)
    changed = picture.copy()
    changed[200, 300, 2] ^= 1
    assert prepare(picture).digest == prepare(picture.copy()).digest
    assert prepare(picture).digest != prepare(changed).digest
    assert prepare(picture).digest != prepare(picture, max_pixels=128 * 160).digest
    assert prepare(picture).digest != prepare(picture.reshape(320, 256, 3)).digest


def test_pictures_come_back_in_their_order():
    pytest.importorskip("PIL", reason="needs the extra 'vision'")
    sources = [samples.noise(64 * n, 320, 3, seed=n) for n in (9, 1, 5, 3)]
    media = [Media("image", x, MediaOptions(), f"image {i}") for i, x in enumerate(sources)]
    together = images.prepare(media, RULES)
    assert [p.name for p in together] == ["image 0", "image 1", "image 2", "image 3"]
    for picture, source in zip(together, sources, strict=True):
        np.testing.assert_array_equal(picture.patches, prepare(source).patches)


def test_options_for_all_give_way_to_a_pictures_own():
    pytest.importorskip("PIL", reason="needs the extra 'vision'")
    picture = samples.noise(256, 320, 3)
    media = [
        Media("image", picture, MediaOptions(), "image 0"),
        Media("image", picture, MediaOptions(max_pixels=64 * 64), "image 1"),
    ]
    first, second = images.prepare(
        media, RULES, MediaOptions(min_pixels=1024, max_pixels=128 * 160)
    )
    assert (first.grid, second.grid) == ((1, 8, 10), (1, 2, 4))


def test_a_callers_limit_moves_the_checkpoints_other_one():
    small = samples.noise(64, 96, 3)  # below the checkpoint's min_pixels: enlarged
    assert prepare(small).num_tokens >= 64
    assert prepare(small, max_pixels=64 * 96).grid == (1, 4, 6)
    low, high = image_bounds(RULES.image, MediaOptions(min_pixels=20_000_000))
    assert low == high == 20_000_000


def test_limits_that_contradict_each_other_name_the_picture():
    media = Media("image", samples.noise(64, 96, 3), MediaOptions(min_pixels=9000), "image 0")
    with pytest.raises(ValueError, match="image 0: min_pixels=9000 exceeds max_pixels=5000"):
        images.prepare([media], RULES, MediaOptions(max_pixels=5000))
    with pytest.raises(ValueError, match="image 0: at most 1,023 pixels leave no room for one"):
        prepare(samples.noise(256, 320, 3), max_pixels=1023)


def test_a_long_thin_picture_is_refused_by_name():
    with pytest.raises(ValueError, match=r"image 0: 2001x10 pixels have an aspect ratio of 200\.1"):
        prepare(samples.noise(10, 2001, 3))


# ---- order and positions ---------------------------------------------------------------------


def blocks_in_words(grid: tuple[int, int, int]):
    """Row and column of each patch, by walking slices, blocks and the four patches of each."""
    for _ in range(grid[0]):
        for top in range(0, grid[1], 2):
            for left in range(0, grid[2], 2):
                for row in (top, top + 1):
                    for column in (left, left + 1):
                        yield row, column


def test_patches_are_cut_in_merge_block_order_with_colour_slowest():
    frames = samples.noise(3, 64, 96, 3, seed=3)  # odd: the last frame comes twice
    cut, grid = patches.patchify(frames, patch_size=16, temporal_patch_size=2, merge_size=2)
    assert grid == (2, 4, 6)
    for u, (row, column) in enumerate(blocks_in_words(grid)):
        first = 2 * (u // 24)
        tile = frames[[first, min(first + 1, 2)]]
        tile = tile[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        np.testing.assert_array_equal(cut[u].reshape(3, 2, 16, 16), tile.transpose(3, 0, 1, 2))


def test_the_published_order_of_a_grid_of_16_by_18():
    rows, columns = patches.coordinates((1, 16, 18), 2).T
    assert (rows * 18 + columns)[:8].tolist() == [0, 1, 18, 19, 2, 3, 20, 21]


@pytest.mark.parametrize("name", samples.GRIDS)
def test_learned_positions_are_bilinear_with_the_corners_aligned(name):
    for grid in samples.GRIDS[name]:
        taps, weights = patches.interpolation(grid, 2, SIDE)
        assert (taps >= 0).all()
        assert (taps < SIDE**2).all()
        # A plane is reproduced exactly by bilinear interpolation, so what the four taps say of
        # (row, column) of the table must be where the patch lies in it.
        at = np.array(list(blocks_in_words(grid)), np.float64)
        where = at * (SIDE - 1) / np.maximum(np.array(grid[1:]) - 1, 1)
        for axis, coordinate in enumerate((taps // SIDE, taps % SIDE)):
            found = (coordinate * weights.astype(np.float64)).sum(0)
            np.testing.assert_allclose(found, where[:, axis], atol=1e-4)
        np.testing.assert_allclose(weights.sum(0), 1, atol=1e-6)
        # … and no tap is further than one step away.
        assert (np.abs(taps // SIDE - where[:, 0]) <= 1).all()
        assert (np.abs(taps % SIDE - where[:, 1]) <= 1).all()


@pytest.mark.parametrize("name", samples.GRIDS)
def test_tower_inputs_are_those_of_transformers(name, golden):
    grids = samples.GRIDS[name]
    cut = [np.zeros((np.prod(grid), 6), np.uint8) for grid in grids]
    segments = sum(grid[0] for grid in grids)
    batch = patches.pack_patches(
        cut, grids, num_patches=sum(map(len, cut)), num_segments=segments, merge_size=2, side=SIDE
    )
    for field in ("coordinates", "taps", "tap_weights", "segment_starts"):
        np.testing.assert_array_equal(getattr(batch, field), golden[f"{field}/{name}"], field)


# ---- packing ---------------------------------------------------------------------------------


def test_padding_lies_behind_the_last_segment():
    grids = [(2, 4, 6), (1, 2, 2)]
    cut = [np.full((48, 6), 7, np.uint8), np.full((4, 6), 9, np.uint8)]
    batch = patches.pack_patches(
        cut, grids, num_patches=64, num_segments=5, merge_size=2, side=SIDE
    )
    assert batch.segment_starts.tolist() == [0, 24, 48, 52, 52, 52]
    assert batch.patches[:, 0].tolist() == [7] * 48 + [9] * 4 + [0] * 12
    assert not batch.tap_weights[:, 52:].any()
    np.testing.assert_array_equal(batch.coordinates[48:52], patches.coordinates((1, 2, 2), 2))
    assert {array.dtype.name for array in vars(batch).values()} == {"uint8", "int32", "float32"}


@pytest.mark.parametrize(("num_patches", "num_segments"), [(51, 8), (64, 2)])
def test_a_bucket_that_is_too_small_is_refused(num_patches, num_segments):
    cut = [np.zeros((48, 6), np.uint8), np.zeros((4, 6), np.uint8)]
    with pytest.raises(ValueError, match="2 pictures with 52 patches in 3 segments do not fit"):
        patches.pack_patches(
            cut,
            [(2, 4, 6), (1, 2, 2)],
            num_patches=num_patches,
            num_segments=num_segments,
            merge_size=2,
            side=SIDE,
        )


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="0 pictures"):
        images.pack([], num_patches=64, num_segments=1, side=SIDE)


def test_pack_takes_pictures():
    picture = prepare(samples.noise(256, 320, 3))
    batch = images.pack([picture, picture], num_patches=1024, num_segments=4, side=SIDE)
    np.testing.assert_array_equal(batch.patches[:320], picture.patches)
    np.testing.assert_array_equal(batch.patches[320:640], picture.patches)
    assert batch.segment_starts.tolist() == [0, 320, 640, 640, 640]
