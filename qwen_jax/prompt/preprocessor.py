"""What a checkpoint's preprocessor files say of pictures and videos.

Knows their keys and values. Does not know pictures, callers or prompts.

`size.shortest_edge` and `size.longest_edge` of these files are pixel *counts*: of one picture, and
of a whole video (frames × height × width).
"""

import dataclasses
import os
import pathlib
from typing import Any

from qwen_jax.prompt.tokenizer_files import read_json_object
from qwen_jax.weights.config import VisionConfig
from qwen_jax.weights.json_keys import Keys

IMAGE_FILE, VIDEO_FILE = "preprocessor_config.json", "video_preprocessor_config.json"
_JOINT_FILE = "processor_config.json"  # where transformers 5 saves both, nested
_IMAGE_TYPES = ("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil")
_BICUBIC = 3  # PIL.Image.Resampling.BICUBIC

# Keys that describe how Hugging Face runs its processor, not what comes out.
_SAYS_NOTHING = frozenset(
    (
        "processor_class",
        "data_format",
        "input_data_format",
        "default_to_square",
        "device",
        "disable_grouping",
        "return_tensors",
        "return_metadata",
        "max_image_size",
        "image_seq_length",
    )
)


@dataclasses.dataclass(frozen=True)
class PixelRules:
    """How pixels become patches. The defaults are those of every published Qwen3-VL.

    Attributes:
        min_pixels, max_pixels: of a picture, or of a video over all its frames.
        patch_size, temporal_patch_size: pixels and frames of a patch.
        merge_size: patches along each side of what becomes one token.
        mean, std: per colour channel, of values in 0 .. 1.
    """

    min_pixels: int = 65_536
    max_pixels: int = 16_777_216
    patch_size: int = 16
    temporal_patch_size: int = 2
    merge_size: int = 2
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def factor(self) -> int:
        """Pixels along each side of one token: both sides of a picture are multiples of it."""
        return self.patch_size * self.merge_size


@dataclasses.dataclass(frozen=True)
class VideoRules:
    """How frames are chosen, and `pixels` for all of them together.

    Attributes:
        pixels: min_pixels and max_pixels count frames × height × width.
        fps: frames to take per second of video, unless num_frames says how many.
        num_frames: frames to take, or None.
        min_frames, max_frames: bounds on what ``fps`` leads to.
        do_sample_frames: False takes every frame.
        cap_pixels_per_frame: also bound each frame, as qwen-vl-utils does.
        max_video_tokens: that bound, in tokens.
    """

    pixels: PixelRules = PixelRules(min_pixels=4096, max_pixels=25_165_824)
    fps: float = 2.0
    num_frames: int | None = None
    min_frames: int = 4
    max_frames: int = 768
    do_sample_frames: bool = True
    cap_pixels_per_frame: bool = False
    max_video_tokens: int = 768


@dataclasses.dataclass(frozen=True)
class VisionRules:
    """Both preprocessor files; ``video`` is None where the checkpoint has no file for videos."""

    image: PixelRules = PixelRules()
    video: VideoRules | None = VideoRules()

    @classmethod
    def from_dir(cls, path: str | os.PathLike[str], vision: VisionConfig) -> "VisionRules":
        """Reads a checkpoint's preprocessor files, and holds them against its tower.

        Raises:
            FileNotFoundError: neither preprocessor_config.json nor processor_config.json.
            ValueError: a key is missing, unknown, or contradicts ``vision``.
        """
        directory = pathlib.Path(path)
        joint = read_json_object(directory / _JOINT_FILE, missing={})
        image, where = joint.get("image_processor"), f"{_JOINT_FILE}: image_processor"
        if image is None:
            if not (directory / IMAGE_FILE).is_file():
                raise FileNotFoundError(
                    f"{directory} says nothing of how to prepare pictures: looked for {IMAGE_FILE} "
                    f"and for 'image_processor' in {_JOINT_FILE}; copy it from the published model"
                )
            image, where = read_json_object(directory / IMAGE_FILE), IMAGE_FILE
        video, video_where = joint.get("video_processor"), f"{_JOINT_FILE}: video_processor"
        if video is None and (directory / VIDEO_FILE).is_file():
            video, video_where = read_json_object(directory / VIDEO_FILE), VIDEO_FILE
        rules = cls(
            image=_image_rules(image, where),
            video=None if video is None else _video_rules(video, video_where),
        )
        _hold_against(rules.image, vision, where)
        if rules.video is not None:
            _hold_against(rules.video.pixels, vision, video_where)
        return rules


def _image_rules(raw: Any, where: str) -> PixelRules:
    keys = Keys(raw, where)
    keys.same("image_processor_type", *_IMAGE_TYPES)
    rules = _pixel_rules(keys)
    keys.finish(_SAYS_NOTHING)
    return rules


def _video_rules(raw: Any, where: str) -> VideoRules:
    keys = Keys(raw, where)
    keys.same("video_processor_type", "Qwen3VLVideoProcessor")
    pixels = _pixel_rules(keys)
    count = keys.take("num_frames", None)
    rules = VideoRules(
        pixels=pixels,
        fps=keys.number("fps", VideoRules.fps),
        num_frames=count
        if count is None
        else Keys({"num_frames": count}, where).integer("num_frames"),
        min_frames=keys.integer("min_frames", VideoRules.min_frames),
        max_frames=keys.integer("max_frames", VideoRules.max_frames),
        do_sample_frames=keys.flag("do_sample_frames", VideoRules.do_sample_frames),
        cap_pixels_per_frame=keys.flag("cap_pixels_per_frame", VideoRules.cap_pixels_per_frame),
        max_video_tokens=keys.integer("max_video_tokens", VideoRules.max_video_tokens),
    )
    keys.finish(_SAYS_NOTHING)
    return rules


def _pixel_rules(keys: Keys) -> PixelRules:
    for name in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        keys.same(name, True)
    keys.same("resample", _BICUBIC)
    keys.same("rescale_factor", 1 / 255)
    low, high = _limits(keys)
    rules = PixelRules(
        min_pixels=low,
        max_pixels=high,
        patch_size=keys.integer("patch_size"),
        temporal_patch_size=keys.integer("temporal_patch_size"),
        merge_size=keys.integer("merge_size"),
        mean=_colours(keys, "image_mean"),
        std=_colours(keys, "image_std"),
    )
    if low > high or high < rules.factor**2:
        raise ValueError(f"{keys.where}: size of {low:,} to {high:,} pixels holds no picture")
    return rules


def _limits(keys: Keys) -> tuple[int, int]:
    """Pixel counts: ``size``, or the older ``min_pixels`` and ``max_pixels``, which win."""
    size = keys.take("size", None)
    old = {name: keys.take(name, None) for name in ("min_pixels", "max_pixels")}
    given = {"shortest_edge": old["min_pixels"], "longest_edge": old["max_pixels"]}
    given = {name: value for name, value in given.items() if value is not None}
    limits = Keys(
        {**(size or {}), **given} if isinstance(size, dict | None) else size, f"{keys.where}: size"
    )
    low, high = limits.integer("shortest_edge"), limits.integer("longest_edge")
    limits.finish(frozenset(("min_pixels", "max_pixels")))
    return low, high


def _colours(keys: Keys, name: str) -> tuple[float, ...]:
    values = keys.take(name)
    if (
        not isinstance(values, list)
        or len(values) != 3
        or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        or (name == "image_std" and not all(v > 0 for v in values))
    ):
        raise ValueError(f"{keys.where}: {name}={values!r} is not three numbers, one per colour")
    return tuple(float(v) for v in values)


def _hold_against(rules: PixelRules, vision: VisionConfig, where: str) -> None:
    pairs = {
        "patch_size": (rules.patch_size, vision.patch_size),
        "temporal_patch_size": (rules.temporal_patch_size, vision.temporal_patch_size),
        "merge_size": (rules.merge_size, vision.spatial_merge_size),
        "colour channels": (len(rules.mean), vision.in_channels),
    }
    for name, (here, there) in pairs.items():
        if here != there:
            raise ValueError(
                f"{where}: {name}={here} but the vision tower of config.json has {there}: the "
                "files belong to different models"
            )
