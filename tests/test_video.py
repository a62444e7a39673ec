"""Videos: which frames are seen, how large, when."""

import hashlib
import json
import pathlib
import sys

import numpy as np
import pytest
import vision_samples as samples

from qwen_jax.prompt import images, patches, resize, video
from qwen_jax.prompt.media import Media
from qwen_jax.prompt.media_options import MediaOptions
from qwen_jax.prompt.preprocessor import VideoRules, VisionRules

pytest.importorskip("PIL", reason="needs the extra 'vision'")

TABLES = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "vision.json").read_text(encoding="utf-8")
)
RULES = VideoRules()
NAME = "video 0"


def clip(source, *, rules: VideoRules = RULES, **options) -> video.Clip:
    return video.read_clip(source, rules, MediaOptions(**options), NAME)


def numbered(count: int, rows: int = 64, columns: int = 96) -> np.ndarray:
    """Frames whose first red byte is their number."""
    frames = np.zeros((count, rows, columns, 3), np.uint8)
    frames[..., 0] = np.arange(count)[:, None, None]
    frames[..., 1] = np.arange(columns)[None, None, :]
    frames[:, : rows // 2, :, 2] = 200
    return frames


def numbers(frames: np.ndarray) -> list[int]:
    return frames[:, 0, 0, 0].tolist()


# ---- which frames, how large, when -----------------------------------------------------------


@pytest.mark.parametrize("name", samples.SAMPLINGS)
def test_frames_are_those_that_transformers_chooses(name):
    total, fps, rate, count = samples.SAMPLINGS[name]
    options = MediaOptions(fps=rate, num_frames=count)
    found = video.sample_indices(total, fps, RULES, options)
    assert found.tolist() == TABLES["sample_indices"][name]


@pytest.mark.parametrize("name", samples.VIDEO_SIZES)
def test_frame_sizes_are_those_of_transformers(name):
    frames, height, width, low, high = samples.VIDEO_SIZES[name]
    size = resize.video_size(
        frames, height, width, temporal=2, factor=32, min_pixels=low, max_pixels=high
    )
    assert list(size) == TABLES["video_size"][name]


def test_five_frames_count_as_four():
    limits = {"temporal": 2, "factor": 32, "min_pixels": 1, "max_pixels": 4 * 64 * 64}
    assert resize.video_size(5, 64, 64, **limits) == (64, 64)
    assert resize.video_size(6, 64, 64, **limits) == (32, 32)


def test_a_video_too_long_and_thin_is_refused():
    with pytest.raises(ValueError, match=r"video 0: 7000x10 pixels.*aspect ratio|aspect ratio of"):
        clip((np.zeros((4, 32, 6432, 3), np.uint8), {"fps": 2.0}))


def test_times_are_the_mean_of_a_pair_and_the_last_frame_counts_again():
    assert video.timestamps([0, 15, 30, 45], 30.0, 2) == (0.25, 1.25)
    assert video.timestamps([0, 15, 30], 30.0, 2) == (0.25, 1.0)
    assert list(video.timestamps([0, 7, 14, 22, 29], 29.97, 2)) == TABLES["timestamps"]


def test_every_frame_is_seen_where_sampling_is_off():
    found = video.sample_indices(50, 25.0, RULES, MediaOptions(do_sample_frames=False))
    assert found.tolist() == list(range(50))
    off = VideoRules(do_sample_frames=False)
    assert len(video.sample_indices(50, 25.0, off, MediaOptions())) == 50
    assert len(video.sample_indices(50, 25.0, off, MediaOptions(do_sample_frames=True))) == 4


def test_the_callers_wish_goes_before_the_checkpoints():
    rules = VideoRules(num_frames=6, fps=1.0)
    assert len(video.sample_indices(100, 25.0, rules, MediaOptions())) == 6
    assert len(video.sample_indices(100, 25.0, rules, MediaOptions(num_frames=9))) == 9
    assert len(video.sample_indices(100, 25.0, rules, MediaOptions(fps=5.0))) == 20


def test_a_header_that_claims_endless_frames_costs_nothing():
    for options in (MediaOptions(do_sample_frames=False), MediaOptions(num_frames=10**12)):
        with pytest.raises(ValueError, match=r"leave no room .* or take fewer frames"):
            video.sample_indices(2**62, 25.0, RULES, options)
    assert len(video.sample_indices(2**40, 25.0, RULES, MediaOptions())) == 768


def test_more_frames_than_there_are_is_refused():
    with pytest.raises(ValueError, match="num_frames=9 but the video has only 8 frames: ask for 8"):
        video.sample_indices(8, 25.0, RULES, MediaOptions(num_frames=9))


# ---- frames that a caller read ---------------------------------------------------------------


def test_frames_are_sampled_by_their_rate():
    found = clip((numbered(40), {"fps": 10.0}))
    assert numbers(found.frames) == [0, 6, 11, 17, 22, 28, 33, 39]
    assert found.timestamps[:2] == pytest.approx((0.3, 1.4))
    assert found.frames.shape == (8, 64, 96, 3)


def test_a_list_of_pictures_is_a_video():
    frames = numbered(8)
    listed = clip((list(frames), {"fps": 4.0}))
    np.testing.assert_array_equal(listed.frames, clip((frames, {"fps": 4.0})).frames)
    with pytest.raises(ValueError, match=r"video 0, frame 1: there is no file 'b\.png'"):
        clip(([frames[0], "b.png"], {"fps": 4.0}))
    with pytest.raises(ValueError, match="frames of different sizes"):
        clip(([frames[0], frames[1, :32]], {"fps": 4.0}))


def test_frames_that_were_sampled_are_not_sampled_again():
    frames = numbered(3)
    metadata = {"fps": 30.0, "frames_indices": [0, 45, 89], "total_num_frames": 90}
    found = clip((frames, metadata))
    np.testing.assert_array_equal(found.frames, frames)
    assert found.timestamps == (0.75, 89 / 30)
    for option in ({"fps": 1.0}, {"num_frames": 2}, {"do_sample_frames": True}):
        with pytest.raises(ValueError, match=r"video 0: .*would be sampled twice: leave out"):
            clip((frames, metadata), **option)
    found = clip((numbered(30), {"fps": 30.0, "do_sample_frames": False}))
    assert len(found.frames) == 30


def test_indices_may_be_an_array():
    found = clip((numbered(2), {"fps": 10, "frames_indices": np.array([5, 15])}))
    assert found.timestamps == (1.0,)


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ({}, r"no frame rate \(fps=None\): say how many"),
        ({"fps": None}, "no frame rate"),
        ({"fps": 0}, "no frame rate"),
        ({"fps": "24"}, "no frame rate"),
        ({"fps": float("nan")}, "no frame rate"),
        ({"fps": True}, "no frame rate"),
        (24.0, r"need a mapping beside them.*\(frames, \{'fps': 24\.0\}\)"),
        ({"fsp": 24.0}, "unknown key 'fsp' beside the frames; did you mean 'fps'"),
        ({"fps": 2.0, "total_num_frames": 90}, "8 frames of total_num_frames=90, but not which"),
        ({"fps": 2.0, "total_num_frames": "8"}, "total_num_frames='8' is no whole number"),
        ({"fps": 2.0, "frames_indices": [0, 1]}, "8 frames but 2 frames_indices"),
        ({"fps": 2.0, "frames_indices": [0.5] * 8}, "are no frame numbers"),
        ({"fps": 2.0, "frames_indices": [-1] * 8}, "are no frame numbers"),
        ({"fps": 2.0, "do_sample_frames": "no"}, "do_sample_frames='no' is not true or false"),
    ],
)
def test_wrong_metadata_is_named_with_its_fix(metadata, error):
    with pytest.raises(ValueError, match=f"video 0.*{error}"):
        clip((numbered(8), metadata))


@pytest.mark.parametrize(
    ("frames", "error"),
    [
        (np.zeros((8, 64, 96), np.uint8), r"frames of uint8 \(8, 64, 96\): give uint8 \[frames, "),
        (np.zeros((8, 64, 96, 4), np.uint8), "give uint8"),
        (np.zeros((8, 64, 96, 3), np.float32), "frames of float32"),
        (np.zeros((0, 64, 96, 3), np.uint8), "give uint8"),
        ([], "an array or a list of pictures"),
        ("a.mp4", "an array or a list of pictures"),
    ],
)
def test_what_is_no_frames_is_refused(frames, error):
    with pytest.raises(ValueError, match=f"video 0: .*{error}"):
        clip((frames, {"fps": 2.0}))


def test_frames_without_a_rate_are_refused():
    for frames in (numbered(8), list(numbered(8))):
        with pytest.raises(ValueError, match=r"frames alone do not say how fast they go: give \("):
            clip(frames)


def test_a_single_frame_is_an_image():
    for frames, options in ((numbered(1), {}), (numbered(9), {"num_frames": 1})):
        with pytest.raises(ValueError, match=r"video 0 comes to 1 frame.*give it as an image"):
            clip((frames, {"fps": 2.0}), **options)


def test_limits_of_pixels_hold_over_all_frames():
    frames = numbered(8, 128, 128)

    def size(**options):
        return clip((frames, {"fps": 4.0}), **options).frames.shape[:3]

    assert size() == (4, 128, 128)
    assert size(total_pixels=4 * 64 * 64) == (4, 64, 64)
    assert size(max_pixels=64 * 64) == (4, 64, 64)
    assert size(min_pixels=192 * 192) == (4, 192, 192)
    with pytest.raises(ValueError, match="video 0: at most 4,095 pixels over 4 frames leave no"):
        size(total_pixels=4095)


def test_a_video_becomes_patches_as_in_transformers():
    frames = samples.noise(5, 64, 96, 3, seed=20)
    source = (frames, {"fps": 2.0, "do_sample_frames": False})
    media = Media("video", source, MediaOptions(), NAME)
    (picture,) = images.prepare([media], VisionRules())
    expected = TABLES["video_patches"]
    assert list(picture.grid) == expected["grid"]
    assert hashlib.sha256(picture.patches.tobytes()).hexdigest() == expected["sha256"]
    assert picture.timestamps == (0.25, 1.25, 2.0)
    assert (picture.num_tokens, picture.num_pixels) == (3 * 6, 5 * 64 * 96)
    batch = images.pack([picture], num_patches=128, num_segments=4, side=48)
    assert batch.segment_starts.tolist() == [0, 24, 48, 72, 72]  # one per slice
    np.testing.assert_array_equal(batch.coordinates[:24], batch.coordinates[24:48])
    np.testing.assert_array_equal(batch.taps[:, :24], batch.taps[:, 48:72])
    for i in range(3):
        alone, _ = patches.patchify(
            frames[2 * i : 2 * i + 2], patch_size=16, temporal_patch_size=2, merge_size=2
        )
        np.testing.assert_array_equal(picture.patches[24 * i : 24 * i + 24], alone)


def test_a_checkpoint_without_rules_for_videos_says_which_file_is_missing():
    media = Media("video", (numbered(4), {"fps": 2.0}), MediaOptions(), NAME)
    with pytest.raises(ValueError, match=r"video 0: .*no video_preprocessor_config\.json"):
        images.prepare([media], VisionRules(video=None))


def test_without_pyav_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'qwen-jax\[video\]', or give the"):
        clip(b"")
