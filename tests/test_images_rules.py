"""A checkpoint's preprocessor files: every value is taken, and nothing is passed over."""

import json

import pytest

from qwen_jax.prompt import preprocessor
from qwen_jax.prompt.preprocessor import PixelRules, VideoRules, VisionRules
from qwen_jax.weights.config import VisionConfig

TOWER = VisionConfig(depth=2, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64)
PUBLISHED = {
    "size": {"longest_edge": 16777216, "shortest_edge": 65536},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "Qwen3VLProcessor",
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
PUBLISHED_VIDEO = {
    **{k: v for k, v in PUBLISHED.items() if k != "image_processor_type"},
    "size": {"longest_edge": 25165824, "shortest_edge": 4096},
    "video_processor_type": "Qwen3VLVideoProcessor",
}
# What transformers 5.23 writes when it saves a processor.
SAVED_BY_5 = {
    **PUBLISHED,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "image_processor_type": "Qwen2VLImageProcessor",
    "do_center_crop": None,
    "data_format": "channels_first",
}
VIDEO_SAVED_BY_5 = {
    **{k: v for k, v in SAVED_BY_5.items() if k != "image_processor_type"},
    **PUBLISHED_VIDEO,
    "do_sample_frames": True,
    "fps": 2,
    "max_frames": 768,
    "max_video_tokens": 768,
    "min_frames": 4,
    "return_metadata": False,
}


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return directory


def test_published_files_say_what_the_defaults_say(tmp_path):
    write(tmp_path, preprocessor_config=PUBLISHED, video_preprocessor_config=PUBLISHED_VIDEO)
    assert VisionRules.from_dir(tmp_path, TOWER) == VisionRules()


def test_real_files_say_what_the_defaults_say(shared_data):
    for directory in sorted(shared_data.glob("Qwen3-VL-*")):
        assert VisionRules.from_dir(directory, TOWER) == VisionRules(), directory


def test_files_that_transformers_5_saved_are_read(tmp_path):
    write(tmp_path, preprocessor_config=SAVED_BY_5, video_preprocessor_config=VIDEO_SAVED_BY_5)
    assert VisionRules.from_dir(tmp_path, TOWER) == VisionRules()
    both = tmp_path / "joint"
    both.mkdir()
    joint = {"image_processor": SAVED_BY_5, "video_processor": VIDEO_SAVED_BY_5}
    write(both, processor_config=joint)
    assert VisionRules.from_dir(both, TOWER) == VisionRules()


def test_every_value_is_taken_from_the_files(tmp_path):
    image = {
        **PUBLISHED,
        "size": {"longest_edge": 50000, "shortest_edge": 1000},
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [1, 2, 3],
    }
    video = {
        **PUBLISHED_VIDEO,
        "size": {"longest_edge": 90000, "shortest_edge": 2000},
        "fps": 1.5,
        "num_frames": 6,
        "min_frames": 2,
        "max_frames": 32,
        "do_sample_frames": False,
        "cap_pixels_per_frame": True,
        "max_video_tokens": 5,
    }
    write(tmp_path, preprocessor_config=image, video_preprocessor_config=video)
    rules = VisionRules.from_dir(tmp_path, TOWER)
    assert rules.image == PixelRules(1000, 50000, 16, 2, 2, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert rules.video == VideoRules(
        PixelRules(min_pixels=2000, max_pixels=90000), 1.5, 6, 2, 32, False, True, 5
    )


def test_older_names_of_the_limits_win(tmp_path):
    write(tmp_path, preprocessor_config={**PUBLISHED, "min_pixels": 2048, "max_pixels": 4096})
    rules = VisionRules.from_dir(tmp_path, TOWER)
    assert (rules.image.min_pixels, rules.image.max_pixels) == (2048, 4096)
    assert rules.video is None  # no file for videos


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"patch_size": None}, "'patch_size' is missing"),
        ({"size": None}, "'shortest_edge' is missing"),
        ({"size": {"longest_edge": 9, "shortest_edge": 4}}, "4 to 9 pixels holds no picture"),
        ({"size": {"longest_edge": 4096}}, "'shortest_edge' is missing"),
        ({"size": {"height": 5, "shortest_edge": 1, "longest_edge": 4096}}, "unknown keys.*height"),
        ({"size": 5}, "expected a JSON object"),
        ({"patch_size": 14}, "patch_size=14 but the vision tower of config.json has 16"),
        ({"merge_size": 4}, "merge_size=4 but the vision tower"),
        ({"temporal_patch_size": 1}, "temporal_patch_size=1 but"),
        ({"image_mean": [0.5, 0.5]}, "image_mean=.* is not three numbers"),
        ({"image_std": [0.5, 0.5, 0]}, "image_std=.* is not three numbers"),
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"resample": 2}, "resample=2 is not supported, only 3"),
        ({"rescale_factor": 1.0}, "rescale_factor=1.0 is not supported"),
        ({"do_pad": True}, "unknown keys that might change the result: 'do_pad'"),
        ({"image_processor_type": "CLIPImageProcessor"}, "is not supported"),
        ({"mergesize": 2, "merge_size": None}, "'merge_size' is missing, did you mean 'mergesize'"),
    ],
)
def test_a_file_that_says_something_else_is_refused(tmp_path, change, error):
    write(tmp_path, preprocessor_config={**PUBLISHED, **change})
    with pytest.raises(ValueError, match=rf"preprocessor_config\.json.*{error}"):
        VisionRules.from_dir(tmp_path, TOWER)


def test_a_checkpoint_without_the_file_says_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for preprocessor_config\.json and for"):
        VisionRules.from_dir(tmp_path, TOWER)


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / preprocessor.IMAGE_FILE).write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is not valid JSON"):
        VisionRules.from_dir(tmp_path, TOWER)
