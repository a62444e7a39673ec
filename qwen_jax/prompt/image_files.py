"""Whatever holds a picture, to RGB bytes: files, data URLs, Pillow images, arrays.

Knows formats, colour modes and what can be wrong with a file. Does not know sizes a model wants.
"""

import base64
import binascii
import io
import os
import pathlib
import struct
import urllib.parse
from types import ModuleType
from typing import Any

import numpy as np

# What is opened; others (some start programs, such as EPS) are refused by name.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO")

# What reading a damaged file can raise, besides Pillow's own.
_READ_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
)
_WHITE = 255


def read_picture(source: Any, name: str) -> np.ndarray:
    """A picture as bytes, uint8 [rows, columns, 3].

    - A file (path, `file:` or `data:` URL, bytes) is turned upright by its EXIF orientation; a
      Pillow image or an array is taken as it lies. Source: transformers image_utils.py load_image.
    - Transparency is laid on white, grey and palette become RGB, CMYK too.
      Source: transformers image_transforms.py convert_to_rgb.

    Args:
        source: str, path, bytes, PIL.Image.Image, or uint8 array [rows, columns] or
            [rows, columns, 1 | 3 | 4].
        name: of the part, for errors.

    Raises:
        ValueError: the file is missing, broken, animated, too large to be meant, or has more than
            8 bits per colour.
        ModuleNotFoundError: Pillow is not installed.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, name)
    pillow = pillow_image(name)
    if isinstance(source, pillow.Image):
        return _from_pillow(source, name)
    return _from_file(local_source(source, name), name)


def pillow_image(name: str) -> ModuleType:
    """`PIL.Image`; ModuleNotFoundError names the extra that brings it."""
    try:
        from PIL import Image
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            f"{name}: pictures need Pillow: pip install 'qwen-jax[vision]'", name="PIL"
        ) from None
    return Image


def local_source(source: Any, name: str) -> pathlib.Path | bytes:
    """The file behind a path, or the bytes inside a `data:` URL; nothing is fetched.

    Raises:
        ValueError: another kind of URL or object, no such file, or base64 that is none.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        return bytes(source)
    if isinstance(source, str):
        scheme = source[:8].lower()
        if scheme.startswith("data:"):
            return _data_url(source, name)
        if scheme.startswith(("http:", "https:")):
            raise ValueError(
                f"{name}: {source[:100]!r} is not fetched: download it and give its path, or put "
                "it into a data: URL"
            )
        if scheme.startswith("file:"):
            source = urllib.parse.unquote(urllib.parse.urlsplit(source).path)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(
            f"{name} is a {type(source).__name__}: give a path, a data: URL, the bytes of a file, "
            "a PIL image or a uint8 array (numpy.asarray of it)"
        )
    path = pathlib.Path(source)
    try:
        if path.is_file():
            return path
    except (OSError, ValueError):  # a name that no file can have
        pass
    raise ValueError(f"{name}: there is no file {str(source)[:200]!r}")


def _data_url(url: str, name: str) -> bytes:
    head, comma, payload = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ValueError(
            f"{name}: {head[:60]!r} is not a data: URL with base64; write "
            "data:image/png;base64,<the file in base64>"
        )
    try:
        return base64.b64decode("".join(payload.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: the data: URL holds no valid base64: {error}") from None


def _from_file(source: pathlib.Path | bytes, name: str) -> np.ndarray:
    pillow = pillow_image(name)
    from PIL import ImageOps

    pillow.init()  # registers every format; the list given to open() must be of registered ones
    formats = [kind for kind in FORMATS if kind in pillow.OPEN]
    bombs = (pillow.DecompressionBombError, pillow.DecompressionBombWarning)
    try:
        opened = pillow.open(
            io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats
        )
        with opened as image:
            _check_kind(image, name)
            if pillow.MAX_IMAGE_PIXELS and image.width * image.height > pillow.MAX_IMAGE_PIXELS:
                raise _bomb(f"{image.width}x{image.height} pixels", name)
            image.load()
            return _to_rgb(ImageOps.exif_transpose(image), name)
    except bombs as error:
        raise _bomb(str(error).rstrip("."), name) from None
    except pillow.UnidentifiedImageError:
        raise ValueError(
            f"{name}: {_called(source)} is no picture in a format that is read here; convert it "
            f"to one of {', '.join(formats)}"
        ) from None
    except _Refused:
        raise
    except _READ_ERRORS as error:
        raise _broken(_called(source), name, error) from error


def _from_pillow(image: Any, name: str) -> np.ndarray:
    """An image of the caller's: its pixels may still be in a file, so reading them may fail."""
    try:
        _check_kind(image, name)
        return _to_rgb(image, name)
    except _Refused:
        raise
    except _READ_ERRORS as error:
        raise _broken("the PIL image", name, error) from error


class _Refused(ValueError):
    """Already says what is wrong with which part."""


def _broken(what: str, name: str, error: BaseException) -> ValueError:
    return ValueError(
        f"{name}: {what} is broken or truncated ({type(error).__name__}: {error}): save or "
        "download it again"
    )


def _bomb(what: str, name: str) -> ValueError:
    return _Refused(
        f"{name} is above Pillow's limit against decompression bombs ({what}): scale the picture "
        "down, or raise PIL.Image.MAX_IMAGE_PIXELS if you trust the file"
    )


def _check_kind(image: Any, name: str) -> None:
    """Refuses what would lose something without a word: more frames, more bits."""
    # MPO is how phones write JPEG with a preview or depth map behind the picture.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise _Refused(
            f"{name} has {image.n_frames} frames ({image.format}): give it as a video, or one "
            "frame of it as an image (image.copy() is the frame it stands at)"
        )
    if image.mode == "F" or image.mode.startswith("I"):
        raise _Refused(
            f"{name} has more than 8 bits per pixel (mode {image.mode}), which would be clipped to "
            "white: scale it to 8 bits first, for 16 bits with "
            "Image.fromarray((numpy.asarray(image) >> 8).astype('uint8'))"
        )
    if image.width < 1 or image.height < 1:
        raise _Refused(f"{name}: {image.width}x{image.height} pixels are no picture")


def _to_rgb(image: Any, name: str) -> np.ndarray:
    from PIL import Image

    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (_WHITE,) * 4)
        image = Image.alpha_composite(paper, image)
    return np.asarray(image.convert("RGB"))


def _from_array(array: np.ndarray, name: str) -> np.ndarray:
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.dtype != np.uint8:
        raise ValueError(
            f"{name} is an array of {array.dtype}: give uint8 in 0 .. 255 (values in 0 .. 1 as "
            "(x * 255).round().astype('uint8'), 16 bits as (x >> 8).astype('uint8'))"
        )
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f"{name} is an array of shape {array.shape}: give [rows, columns, 3] (colours last; "
            "transpose(1, 2, 0) moves them there)"
        )
    if array.size == 0:
        raise ValueError(f"{name}: an array of shape {array.shape} is no picture")
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if channels == 4:
        alpha = array[..., 3:] / _WHITE
        return np.round(alpha * array[..., :3] + (1 - alpha) * _WHITE).astype(np.uint8)
    return array


def _called(source: pathlib.Path | bytes) -> str:
    return f"the {len(source):,} bytes" if isinstance(source, bytes) else str(source)
