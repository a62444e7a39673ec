"""Frames out of a video file, by PyAV.

Knows containers and decoding. Does not know which frames a model wants, nor how large.
"""

import dataclasses
import io
import pathlib
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np

# A playlist could name other files; these containers hold everything themselves.
CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,ogg,asf,gif,h264,hevc"
)

# As Pillow's limit against decompression bombs, for one frame.
MAX_FRAME_PIXELS = 89_478_485


@dataclasses.dataclass(frozen=True)
class VideoInfo:
    """What a file says of itself.

    Attributes:
        frames: as the container counts them, or its packets; decoding may find fewer.
        fps: average frames per second.
        height, width: of a frame as it is shown.
        quarter_turns: counterclockwise, from how a frame is stored to how it is shown.
    """

    frames: int
    fps: float
    height: int
    width: int
    quarter_turns: int


def probe(source: pathlib.Path | bytes, name: str) -> VideoInfo:
    """Reads a file's header and decodes its first frame.

    Raises:
        ValueError: no video, no frame rate, no frame that decodes, or frames beyond all measure.
        ModuleNotFoundError: PyAV is not installed.
    """
    av = _pyav(name)
    with _Errors(av, name), _open(av, source, name) as container:
        stream = container.streams.video[0]
        fps = float(stream.average_rate or 0)
        if not fps > 0:
            raise ValueError(
                f"{name} has no frame rate: decode it yourself and give (frames, {{'fps': …}}), "
                "or write it again with one (ffmpeg -r 25 -i in out.mp4)"
            )
        if stream.width * stream.height > MAX_FRAME_PIXELS:
            raise ValueError(
                f"{name} has frames of {stream.width}x{stream.height} pixels, the limit is "
                f"{MAX_FRAME_PIXELS:,}: scale it down"
            )
        first = next(container.decode(stream), None)
        if first is None:
            raise ValueError(f"{name} holds no frame that can be decoded: write it again")
        turns = round(first.rotation / 90) % 4
        height, width = first.height, first.width
        count = stream.frames
    if not count:  # Matroska and the like do not count their frames
        with _Errors(av, name), _open(av, source, name) as container:
            count = sum(1 for packet in container.demux(video=0) if packet.size)
    if turns % 2:
        height, width = width, height
    return VideoInfo(count, fps, height, width, turns)


def decode(
    source: pathlib.Path | bytes,
    info: VideoInfo,
    indices: np.ndarray,
    use: Callable[[np.ndarray], np.ndarray],
    name: str,
) -> tuple[list[np.ndarray], int]:
    """Decodes up to the last wanted frame, and keeps ``use(frame)`` of the wanted ones.

    Only what ``use`` returns stays in memory; it gets uint8 [rows, columns, 3], upright.

    Args:
        source, info: the file, and what `probe` said of it.
        indices: int [n], non-decreasing; repeated ones are repeated.
        use: makes a frame small.
        name: of the part, for errors.

    Returns:
        A frame per index while frames last, and how many frames were decoded: fewer than
        ``indices[-1] + 1`` means that the file holds no more.

    Raises:
        ValueError: the file is damaged.
    """
    av = _pyav(name)
    kept: list[np.ndarray] = []
    decoded = 0
    with _Errors(av, name), _open(av, source, name) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in _until(container, int(indices[-1])):
            times = int(np.count_nonzero(indices == decoded))
            if times:
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), info.quarter_turns)
                if pixels.shape[:2] != (info.height, info.width):
                    raise ValueError(
                        f"{name} changes its size at frame {decoded}: cut it there, or scale it"
                    )
                kept += [use(np.ascontiguousarray(pixels))] * times
            decoded += 1
    return kept, decoded


def _until(container: Any, last: int) -> Iterator[Any]:
    for index, frame in enumerate(container.decode(video=0)):
        yield frame
        if index == last:
            return


def _pyav(name: str) -> ModuleType:
    try:
        import av
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name}: video files need PyAV: pip install 'qwen-jax[video]', or give the frames: "
            "(frames, {'fps': …})",
            name="av",
        ) from None
    return av


def _open(av: Any, source: pathlib.Path | bytes, name: str) -> Any:
    """An open container with a video stream; it can reach no other file and no network."""
    if isinstance(source, bytes):
        file, protocols = io.BytesIO(source), ""
    else:
        file, protocols = str(source.resolve()), "file"
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": protocols}
    container = av.open(file, options=options)
    if not container.streams.video:
        container.close()
        raise ValueError(f"{name} has no video stream: is it a sound file?")
    return container


class _Errors:
    """Turns what PyAV raises while a file is read into a ValueError that names the part."""

    def __init__(self, av: Any, name: str):
        self._av, self._name = av, name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        # UnicodeDecodeError: a title that is not UTF-8, in some releases of PyAV.
        if isinstance(error, self._av.FFmpegError | UnicodeDecodeError):
            raise ValueError(
                f"{self._name} cannot be decoded ({error}): it is broken, "
                "truncated or in an unknown format; write it again (ffmpeg -i in out.mp4)"
            ) from error
