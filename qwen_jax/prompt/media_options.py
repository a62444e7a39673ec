"""What a caller may say of a picture or a video, and the pixel counts that come of it.

Knows options and a checkpoint's rules. Does not know pictures or files.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from qwen_jax.prompt.preprocessor import PixelRules, VideoRules


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaOptions:
    """What a caller may say of a picture or a video; None leaves it to the checkpoint.

    Attributes:
        min_pixels, max_pixels: of a picture, or of each frame of a video.
        total_pixels: most pixels of a video over all its frames.
        fps: frames to take per second of video.
        num_frames: frames to take; excludes ``fps``.
        do_sample_frames: False takes every frame there is.

    Raises:
        ValueError: a value is no positive number, or two exclude each other.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    total_pixels: int | None = None
    fps: float | None = None
    num_frames: int | None = None
    do_sample_frames: bool | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None:
                continue
            if field.name == "do_sample_frames":
                if not isinstance(value, bool):
                    raise ValueError(f"do_sample_frames={value!r} is not true or false")
                continue
            kinds, what = (int, "whole number") if field.name != "fps" else ((int, float), "number")
            if not isinstance(value, kinds) or isinstance(value, bool) or not value > 0:
                raise ValueError(f"{field.name}={value!r} is not a positive {what}")
        if self.fps is not None and self.num_frames is not None:
            raise ValueError(
                f"fps={self.fps} and num_frames={self.num_frames} exclude each other; give one"
            )
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels={self.min_pixels} exceeds max_pixels={self.max_pixels}")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any], name: str) -> "MediaOptions":
        """From ``mm_processor_kwargs`` or the keys of a content part; ``name`` is for errors."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in options:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"{name}: unknown option {key!r}; {hint}")
        try:
            return cls(**options)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def over(self, base: "MediaOptions") -> "MediaOptions":
        """These options, and ``base`` where they say nothing; fps and num_frames are one thing."""
        merged = dataclasses.asdict(base)
        if self.fps is not None or self.num_frames is not None:
            merged.update(fps=None, num_frames=None)
        merged.update({k: v for k, v in dataclasses.asdict(self).items() if v is not None})
        return MediaOptions(**merged)


def image_bounds(rules: PixelRules, options: MediaOptions) -> tuple[int, int]:
    """The fewest and the most pixels of a picture.

    A limit of the caller's moves the checkpoint's other one out of its way.

    Raises:
        ValueError: not even one token fits.
    """
    low, high = rules.min_pixels, rules.max_pixels
    if options.max_pixels is not None:
        low, high = min(low, options.max_pixels), options.max_pixels
    if options.min_pixels is not None:
        low, high = options.min_pixels, max(high, options.min_pixels)
    return low, _at_least_a_token(high, rules.factor, frames=1)


def video_bounds(rules: VideoRules, options: MediaOptions, frames: int) -> tuple[int, int]:
    """The fewest and the most pixels of ``frames`` frames together.

    The caller's limits per frame hold within the limit on the whole video.
    Source of the cap per frame: transformers Qwen3VLVideoProcessor.resize.

    Raises:
        ValueError: two limits of the caller's contradict each other, or a frame does not hold one
            token.
    """
    pixels = rules.pixels
    low = pixels.min_pixels
    high = pixels.max_pixels if options.total_pixels is None else options.total_pixels
    if rules.cap_pixels_per_frame:
        share = min(rules.max_video_tokens * pixels.factor**2, high // frames)
        high = max(share, int(low * 1.05)) * frames
    if options.max_pixels is not None:
        high = min(high, frames * options.max_pixels)
    if options.min_pixels is not None:
        low = frames * options.min_pixels
        if options.total_pixels is not None and low > options.total_pixels:
            raise ValueError(
                f"min_pixels={options.min_pixels:,} for each of {frames} frames exceeds "
                f"total_pixels={options.total_pixels:,}: raise that, or take fewer frames"
            )
    return min(low, high), _at_least_a_token(high, pixels.factor, frames=frames)


def _at_least_a_token(high: int, factor: int, *, frames: int) -> int:
    least = frames * factor**2
    if high < least:
        over = f" over {frames} frames" if frames > 1 else ""
        raise ValueError(
            f"at most {high:,} pixels{over} leave no room for one token of {factor}x{factor} "
            f"pixels{' per frame' if over else ''}: allow {least:,} or more"
            + (", or take fewer frames" if over else "")
        )
    return high
