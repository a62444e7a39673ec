"""Pictures, videos and prompts against transformers, live.

Needs the extra `parity` (torch and transformers) with Pillow, and skips without it. transformers'
video processor also imports torchvision; where that is missing, its resizing and normalising are
left out and all else of it runs.
"""

import base64

import numpy as np
import pytest
import vision_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.prompt import image_files, images, patches, resize, video
from qwen_jax.prompt.media import Media
from qwen_jax.prompt.media_options import MediaOptions
from qwen_jax.prompt.preprocessor import VideoRules, VisionRules

pytest.importorskip("transformers", reason="needs the extra 'parity'", exc_type=ImportError)
pytest.importorskip("PIL", reason="needs the extra 'vision'")

import torch
import transformers
import vision_reference as reference
from PIL import Image

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RULES = VisionRules()
NO_DEADLINE = settings(max_examples=200, deadline=None)


def values_of(source, rules: VisionRules = RULES, **options):
    media = Media("image", source, MediaOptions(**options), "image 0")
    (picture,) = images.prepare([media], rules)
    pixels = rules.image
    return patches.pixel_values(picture.patches, mean=pixels.mean, std=pixels.std), picture.grid


@pytest.mark.parametrize("name", samples.pictures())
def test_pictures_are_equal_bit_for_bit(name):
    picture = samples.pictures()[name]
    values, grid = values_of(picture)
    expected, expected_grid = reference.pixel_values(picture)
    assert grid == expected_grid
    np.testing.assert_array_equal(values, expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900), st.integers(1, 100), st.integers(1, 400))
def test_pictures_of_any_size_and_limits_are_equal_bit_for_bit(rows, columns, low, more):
    low, high = 1024 * low, 1024 * (low + more)
    picture = Image.fromarray(samples.noise(rows, columns, 3))
    if max(rows, columns) / min(rows, columns) > 200:
        return
    values, grid = values_of(picture, min_pixels=low, max_pixels=high)
    expected, expected_grid = reference.pixel_values(picture, low, high)
    assert grid == expected_grid
    np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize(
    ("kind", "orientation"), [("PNG", 1), ("PNG", 6), ("JPEG", 8), ("WEBP", 5)]
)
def test_files_are_equal_to_those_transformers_loads(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    raw = samples.encoded(Image.fromarray(samples.noise(90, 130, 3)), kind, exif=exif)
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(raw).decode()}"
    expected, expected_grid = reference.pixel_values(transformers.image_utils.load_image(url))
    values, grid = values_of(url)
    assert grid == expected_grid
    np.testing.assert_array_equal(values, expected)


def test_a_jpeg_in_cmyk_is_equal_to_what_transformers_loads():
    ink = Image.merge(
        "CMYK", [Image.fromarray(samples.noise(60, 80, 1, seed=i)[..., 0]) for i in range(4)]
    )
    raw = samples.encoded(ink, "JPEG")
    expected = np.asarray(transformers.image_utils.load_image(base64.b64encode(raw).decode()))
    np.testing.assert_array_equal(image_files.read_picture(raw, "image 0"), expected)


@NO_DEADLINE
@given(
    st.integers(1, 9000),
    st.integers(1, 9000),
    st.integers(1, 20_000_000),
    st.integers(0, 20_000_000),
)
def test_any_image_size_is_equal(height, width, low, more):
    if max(height, width) / min(height, width) > 200:
        return
    size = resize.image_size(height, width, factor=32, min_pixels=low, max_pixels=low + more)
    assert size == reference.image_size(height, width, low, low + more)


@NO_DEADLINE
@given(
    st.integers(2, 800),
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.integers(1, 30_000_000),
    st.integers(0, 30_000_000),
)
def test_any_frame_size_is_equal(frames, height, width, low, more):
    try:
        expected = reference.video_size(frames, height, width, low, low + more)
    except ValueError:
        expected = None
    limits = {"temporal": 2, "factor": 32, "min_pixels": low, "max_pixels": low + more}
    if expected is None:
        with pytest.raises(ValueError, match="aspect ratio"):
            resize.video_size(frames, height, width, **limits)
    else:
        assert resize.video_size(frames, height, width, **limits) == expected


@NO_DEADLINE
@given(
    st.integers(1, 5000),
    st.floats(1.0, 240.0),
    st.one_of(st.none(), st.floats(0.1, 60.0)),
    st.one_of(st.none(), st.integers(1, 900)),
)
def test_any_choice_of_frames_and_its_times_are_equal(total, fps, rate, count):
    if rate is not None and count is not None:
        rate = None
    if count is not None and count > total:
        count = total
    found = video.sample_indices(
        total, fps, VideoRules(), MediaOptions(fps=rate, num_frames=count)
    ).tolist()
    assert found == reference.sample_indices(total, fps, rate, count).tolist()
    assert list(video.timestamps(found, fps, 2)) == reference.timestamps(found, fps)


@pytest.mark.parametrize("count", [2, 3, 4, 7])
def test_patches_of_videos_are_equal(count):
    frames = samples.noise(count, 96, 64, 3, seed=count)
    expected, grid = reference.video_patches(frames)
    found, found_grid = patches.patchify(frames, patch_size=16, temporal_patch_size=2, merge_size=2)
    assert found_grid == grid
    np.testing.assert_array_equal(found, expected)


def test_frames_of_a_file_are_those_transformers_reads(tmp_path):
    av = pytest.importorskip("av", reason="needs the extra 'video'")
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=12)  # lossy: decoders must agree on colours
        stream.height, stream.width, stream.pix_fmt = 128, 160, "yuv420p"
        for i in range(50):
            frame = av.VideoFrame.from_ndarray(samples.noise(128, 160, 3, seed=i), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    from transformers.video_utils import read_video_pyav

    def chosen(metadata, **_):
        return reference.sample_indices(metadata.total_num_frames, metadata.fps, None, None)

    expected, metadata = read_video_pyav(str(path), chosen)
    found = video.read_clip(path, VideoRules(), MediaOptions(), "video 0")
    np.testing.assert_array_equal(found.frames, expected)
    indices = metadata.frames_indices.tolist()
    assert list(found.timestamps) == reference.timestamps(indices, metadata.fps)


@pytest.mark.parametrize("name", samples.GRIDS)
def test_positions_of_patches_are_equal(name):
    grids = samples.GRIDS[name]
    cut = [np.zeros((np.prod(grid), 6), np.uint8) for grid in grids]
    batch = patches.pack_patches(
        cut,
        grids,
        num_patches=sum(map(len, cut)),
        num_segments=sum(grid[0] for grid in grids),
        merge_size=2,
        side=48,
    )
    for field, expected in reference.tower_inputs(grids).items():
        np.testing.assert_array_equal(getattr(batch, field), expected, field)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 3))
def test_positions_of_patches_of_any_grid_are_equal(rows, columns, slices):
    grid = (slices, 2 * rows, 2 * columns)
    expected = reference.tower_inputs([grid])
    taps, weights = patches.interpolation(grid, 2, 48)
    np.testing.assert_array_equal(taps, expected["taps"])
    np.testing.assert_array_equal(weights, expected["tap_weights"])
    np.testing.assert_array_equal(patches.coordinates(grid, 2), expected["coordinates"])


def test_the_learned_embedding_is_torchs_resizing_with_corners_aligned():
    table = torch.randn(48, 48, 5, dtype=torch.float64)
    for grid in [(1, 16, 18), (1, 2, 2), (1, 70, 94), (1, 48, 48)]:
        taps, weights = patches.interpolation(grid, 2, 48)
        mixed = (table.reshape(-1, 5).numpy()[taps] * weights[..., None]).sum(0)
        whole = torch.nn.functional.interpolate(
            table.permute(2, 0, 1)[None], size=grid[1:], mode="bilinear", align_corners=True
        )[0].permute(1, 2, 0)
        rows, columns = patches.coordinates(grid, 2).T
        np.testing.assert_allclose(mixed, whole.numpy()[rows, columns], atol=2e-5)


def test_rotary_angles_of_the_tower_follow_from_rows_and_columns():
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionRotaryEmbedding

    tower = Qwen3VLVisionConfig(hidden_size=144, num_heads=2)
    at = patches.coordinates((2, 8, 6), 2)
    cos, _ = Qwen3VLVisionRotaryEmbedding(tower)(torch.zeros(1), torch.from_numpy(at).long())
    frequencies = 10000.0 ** (-np.arange(0, 36, 2) / 36)
    half = np.concatenate([at[:, :1] * frequencies, at[:, 1:] * frequencies], axis=1)
    np.testing.assert_allclose(cos.numpy(), np.cos(np.tile(half, 2)), atol=1e-5)
