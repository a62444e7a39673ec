"""Which frames of a video are looked at, when they were, and how large they become.

Knows frames, their numbers and their rate. Does not know containers, patches or prompts.
"""

import dataclasses
import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.prompt import image_files, resize, video_files
from qwen_jax.prompt.media_options import MediaOptions, video_bounds
from qwen_jax.prompt.preprocessor import VideoRules

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Clip:
    """The frames of a video that a model sees.

    Attributes:
        frames: uint8 [frames, rows, columns, 3], resized.
        timestamps: seconds, one per patch in time.
    """

    frames: np.ndarray
    timestamps: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class VideoMetadata:
    """What a caller says of frames that were read elsewhere.

    Attributes:
        fps: frames per second of the video they come from.
        frames_indices: their numbers in that video; None: they are the whole of it.
        total_num_frames: of that video.
        do_sample_frames: choose among them (True), or take all (False); None: choose, unless
            frames_indices says that this was done already.
    """

    fps: float
    frames_indices: tuple[int, ...] | None = None
    total_num_frames: int | None = None
    do_sample_frames: bool | None = None

    @classmethod
    def from_mapping(cls, metadata: Any, name: str) -> "VideoMetadata":
        """From the second half of ``(frames, {…})``; ValueError names the part and the key."""
        if not isinstance(metadata, Mapping):
            raise ValueError(
                f"{name}: frames need a mapping beside them that says at least their rate: "
                f"(frames, {{'fps': 24.0}}), got {metadata!r:.80}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        for key in metadata:
            if key not in (*known, *_SAYS_NOTHING):
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"{name}: unknown key {key!r} beside the frames; {hint}")
        fps = metadata.get("fps")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < np.inf:
            raise ValueError(
                f"{name} has no frame rate (fps={fps!r}): say how many frames per second the video "
                "has that the frames come from, {'fps': 24.0}"
            )
        total, sampled = metadata.get("total_num_frames"), metadata.get("do_sample_frames")
        if total is not None and (isinstance(total, bool) or not isinstance(total, int)):
            raise ValueError(f"{name}: total_num_frames={total!r} is no whole number")
        if sampled is not None and not isinstance(sampled, bool):
            raise ValueError(f"{name}: do_sample_frames={sampled!r} is not true or false")
        indices = _whole_numbers(metadata.get("frames_indices"), name)
        return cls(float(fps), indices, total, sampled)


# Further keys of transformers' VideoMetadata: they follow from the frames.
_SAYS_NOTHING = ("duration", "width", "height", "video_backend")


def sample_indices(total: int, fps: float, rules: VideoRules, options: MediaOptions) -> np.ndarray:
    """Numbers of the frames to look at, evenly spread over the video, first and last included.

    Source: transformers Qwen3VLVideoProcessor.sample_frames. Rounding is half to even.

    Args:
        total, fps: frames of the video, and per second.
        rules, options: the checkpoint's and the caller's wishes.

    Returns:
        int [n], non-decreasing.

    Raises:
        ValueError: more frames are wanted than there are, or than the limit on pixels lets be.
    """
    sampled = rules.do_sample_frames
    if options.do_sample_frames is not None:
        sampled = options.do_sample_frames
    count = options.num_frames
    if count is None and options.fps is None:
        count = rules.num_frames
    if not sampled:
        count = total
    elif count is None:
        rate = rules.fps if options.fps is None else options.fps
        count = min(max(int(total / fps * rate), rules.min_frames), rules.max_frames, total)
    if count > total:
        raise ValueError(
            f"num_frames={count} but the video has only {total} frames: ask for {total} or fewer, "
            "or say fps instead"
        )
    video_bounds(rules, options, count)  # before a list of as many numbers as a header claims
    return np.linspace(0, total - 1, count).round().astype(int)


def timestamps(indices: Sequence[int], fps: float, temporal_patch_size: int) -> tuple[float, ...]:
    """Seconds of each patch in time: the mean of its first and last frame's.

    The last frame counts again where the number of frames is odd.
    Source: transformers Qwen3VLProcessor._calculate_timestamps.
    """
    missing = -len(indices) % temporal_patch_size
    times = [index / fps for index in [*indices, *[indices[-1]] * missing]]
    return tuple(
        (times[i] + times[i + temporal_patch_size - 1]) / 2
        for i in range(0, len(times), temporal_patch_size)
    )


def read_clip(source: Any, rules: VideoRules, options: MediaOptions, name: str) -> Clip:
    """The frames of a video that the model sees, resized.

    Args:
        source: a path, `file:` or `data:` URL or bytes of a video file, or ``(frames, metadata)``:
            uint8 [frames, rows, columns, 3] or a list of pictures, and a mapping, see
            `VideoMetadata`.
        rules, options: the checkpoint's and the caller's wishes.
        name: of the part, for errors.

    Raises:
        ValueError: the video is broken, too short, has no frame rate, or contradicts itself.
        ModuleNotFoundError: a file is given and PyAV is not installed.
    """
    if isinstance(source, tuple) and len(source) == 2:
        metadata = VideoMetadata.from_mapping(source[1], name)
        return _from_frames(_stacked(source[0], name), metadata, rules, options, name)
    if isinstance(source, np.ndarray | list | tuple):
        raise ValueError(
            f"{name}: frames alone do not say how fast they go: give (frames, {{'fps': 24.0}})"
        )
    return _from_file(image_files.local_source(source, name), rules, options, name)


def _from_file(source: Any, rules: VideoRules, options: MediaOptions, name: str) -> Clip:
    info = video_files.probe(source, name)

    def attempt(total: int) -> tuple[list[np.ndarray], list[int], int]:
        indices = _named(name, sample_indices, total, info.fps, rules, options)
        size = _frame_size(len(indices), info.height, info.width, rules, options, name)
        frames, found = video_files.decode(
            source, info, indices, lambda frame: resize.resize(frame, size), name
        )
        return frames, indices.tolist(), found

    frames, indices, found = attempt(info.frames)
    if 0 < found < info.frames and len(frames) < len(indices):
        _LOG.warning("%s announces %d frames, %d decode: sampled those", name, info.frames, found)
        frames, indices, found = attempt(found)
    if len(frames) < len(indices):
        raise ValueError(f"{name}: only {found} frames can be decoded: write it again")
    return _clip(frames, indices, info.fps, rules)


def _from_frames(
    frames: np.ndarray,
    metadata: VideoMetadata,
    rules: VideoRules,
    options: MediaOptions,
    name: str,
) -> Clip:
    chosen = metadata.frames_indices
    total = len(frames) if metadata.total_num_frames is None else metadata.total_num_frames
    if chosen is None and total != len(frames):
        raise ValueError(
            f"{name}: {len(frames)} frames of total_num_frames={total}, but not which: add "
            "'frames_indices' with their numbers"
        )
    if chosen is not None and len(chosen) != len(frames):
        raise ValueError(f"{name}: {len(frames)} frames but {len(chosen)} frames_indices")
    sampling = metadata.do_sample_frames
    if options.do_sample_frames is not None:
        sampling = options.do_sample_frames
    if chosen is not None and (sampling or options.fps or options.num_frames):
        raise ValueError(
            f"{name}: frames with frames_indices were sampled already, and would be sampled twice: "
            "leave out fps, num_frames and do_sample_frames, or give every frame"
        )
    if chosen is None:
        options = dataclasses.replace(options, do_sample_frames=sampling)
        picked = _named(name, sample_indices, total, metadata.fps, rules, options).tolist()
        frames, chosen = frames[picked], tuple(picked)
    height, width = frames.shape[1:3]
    size = _frame_size(len(frames), height, width, rules, options, name)
    resized = [resize.resize(frame, size) for frame in frames]
    return _clip(resized, chosen, metadata.fps, rules)


def _clip(
    frames: Sequence[np.ndarray], indices: Sequence[int], fps: float, rules: VideoRules
) -> Clip:
    return Clip(np.stack(frames), timestamps(indices, fps, rules.pixels.temporal_patch_size))


def _frame_size(
    count: int, height: int, width: int, rules: VideoRules, options: MediaOptions, name: str
) -> tuple[int, int]:
    pixels = rules.pixels
    if count < pixels.temporal_patch_size:
        raise ValueError(
            f"{name} comes to {count} frame, and a video has {pixels.temporal_patch_size} or more: "
            "give it as an image, or ask for more frames"
        )
    low, high = _named(name, video_bounds, rules, options, count)
    return _named(
        name,
        resize.video_size,
        count,
        height,
        width,
        temporal=pixels.temporal_patch_size,
        factor=pixels.factor,
        min_pixels=low,
        max_pixels=high,
    )


def _named(name: str, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls ``function``, and puts the part's name before what it complains of."""
    try:
        return function(*args, **kwargs)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _stacked(frames: Any, name: str) -> np.ndarray:
    """Frames as uint8 [frames, rows, columns, 3]."""
    if isinstance(frames, np.ndarray):
        if frames.ndim == 4 and frames.shape[3] == 3 and frames.dtype == np.uint8 and len(frames):
            return frames
        raise ValueError(
            f"{name}: frames of {frames.dtype} {frames.shape}: give uint8 "
            "[frames, rows, columns, 3] in 0 .. 255"
        )
    if not isinstance(frames, list | tuple) or not frames:
        raise ValueError(
            f"{name}: frames must be an array or a list of pictures, got {frames!r:.80}"
        )
    pictures = [
        image_files.read_picture(frame, f"{name}, frame {i}") for i, frame in enumerate(frames)
    ]
    sizes = {picture.shape[:2] for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"{name}: frames of different sizes {sorted(sizes)}: scale them to one")
    return np.stack(pictures)


def _whole_numbers(indices: Any, name: str) -> tuple[int, ...] | None:
    if indices is None:
        return None
    array = np.asarray(indices)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (array < 0).any():
        raise ValueError(f"{name}: frames_indices={indices!r:.80} are no frame numbers")
    return tuple(array.tolist())
