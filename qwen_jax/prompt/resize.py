"""Picture sizes a vision tower takes, and bicubic resizing to them.

Knows pixel counts and the side of a token. Does not know where pictures come from.
"""

import math

import numpy as np

MAX_ASPECT = 200  # of the long side to the short one; transformers' smart_resize


def image_size(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size a picture is brought to: sides that are multiples of ``factor``, and few enough
    pixels, but never a side below one ``factor``.

    Small pictures are enlarged. Rounding is Python's, half to even.
    Source: transformers image_processing_pil_qwen2_vl.py smart_resize.

    Raises:
        ValueError: a side is zero, or the aspect ratio is above 200.
    """
    check_sides(height, width)
    rows, columns = _nearest(height, factor), _nearest(width, factor)
    if rows * columns > max_pixels:
        return _shrunk(height, width, math.sqrt(height * width / max_pixels), factor)
    if rows * columns < min_pixels:
        return _grown(height, width, math.sqrt(min_pixels / (height * width)), factor)
    return rows, columns


def video_size(
    frames: int,
    height: int,
    width: int,
    *,
    temporal: int,
    factor: int,
    min_pixels: int,
    max_pixels: int,
) -> tuple[int, int]:
    """The size that every frame is brought to; the limits count all frames together.

    Frames below one ``factor`` are scaled up first. The count that is held against the limits is
    ``frames`` rounded to a multiple of ``temporal``, half to even (so 5 counts as 4), while the
    scale uses ``frames`` itself. Source: transformers video_processing_qwen3_vl.py smart_resize.

    Raises:
        ValueError: a side is zero, or the aspect ratio is above 200.
    """
    if min(height, width) > 0 and min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_sides(height, width)
    rows, columns = _nearest(height, factor), _nearest(width, factor)
    counted = _nearest(frames, temporal) * rows * columns
    if counted > max_pixels:
        return _shrunk(height, width, math.sqrt(frames * height * width / max_pixels), factor)
    if counted < min_pixels:
        return _grown(height, width, math.sqrt(min_pixels / (frames * height * width)), factor)
    return rows, columns


def check_sides(height: int, width: int) -> None:
    """Raises ValueError for a picture without pixels, or one too long and thin."""
    if height < 1 or width < 1:
        raise ValueError(f"{width}x{height} pixels are no picture")
    aspect = max(height, width) / min(height, width)
    if aspect > MAX_ASPECT:
        raise ValueError(
            f"{width}x{height} pixels have an aspect ratio of {aspect:.1f}, the limit is "
            f"{MAX_ASPECT}: crop it, or cut it into pieces"
        )


def resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bicubic, antialiased, rounded and clamped to bytes, as Pillow does it.

    Args:
        picture: uint8 [rows, columns, 3].
        size: rows and columns wanted.
    """
    if picture.shape[:2] == size:
        return picture
    from PIL import Image  # whoever holds pictures has asked for the extra already

    rows, columns = size
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((columns, rows), Image.Resampling.BICUBIC))


def _nearest(length: int, factor: int) -> int:
    return round(length / factor) * factor


def _shrunk(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    rows = max(factor, math.floor(height / scale / factor) * factor)
    return rows, max(factor, math.floor(width / scale / factor) * factor)


def _grown(height: int, width: int, scale: float, factor: int) -> tuple[int, int]:
    rows = math.ceil(height * scale / factor) * factor
    return rows, math.ceil(width * scale / factor) * factor
