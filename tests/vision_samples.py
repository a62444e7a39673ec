"""Deterministic pictures, prompts and sizes that the vision tests and their goldens share."""

import dataclasses
import io

import numpy as np

SIZES = {  # height, width, min_pixels, max_pixels
    "enlarged": (100, 150, 65536, 16777216),
    "as it is": (256, 320, 65536, 16777216),
    "half to even, down": (48, 3200, 65536, 16777216),
    "half to even, up": (1008, 1040, 65536, 16777216),
    "shrunk": (5000, 4001, 65536, 16777216),
    "one pixel": (1, 1, 65536, 16777216),
    "thin": (10, 2000, 65536, 16777216),
    "thin and shrunk": (20, 4000, 1024, 4096),
    "small limits": (2100, 1900, 1024, 1000000),
    "at the upper limit": (4096, 4096, 65536, 16777216),
    "above it by a row": (4112, 4096, 65536, 16777216),
    "at the lower limit": (256, 256, 65536, 16777216),
    "rounds to nothing": (15, 500, 65536, 16777216),
}
VIDEO_SIZES = {  # frames, height, width, min_pixels, max_pixels
    "five count as four": (5, 1080, 1920, 4096, 9000000),
    "seven count as eight": (7, 720, 1280, 4096, 7000000),
    "as it is": (4, 64, 96, 4096, 25165824),
    "enlarged": (2, 20, 40, 4096, 25165824),
    "below a token, scaled first": (4, 17, 300, 4096, 25165824),
    "both sides below": (3, 7, 9, 4096, 25165824),
    "long": (768, 1080, 1920, 4096, 25165824),
    "long and thin": (600, 40, 7000, 4096, 25165824),
    "few pixels": (2, 33, 33, 200000, 25165824),
}
SAMPLINGS = {  # frames, fps of the video, fps wanted, frames wanted
    "two per second": (250, 25.0, None, None),
    "odd count": (90, 30.0, None, 5),
    "at least four": (40, 30.0, None, None),
    "fewer than four": (3, 30.0, None, None),
    "at most 768": (40000, 25.0, None, None),
    "slow": (1000, 23.976, 0.5, None),
    "all": (12, 4.0, 60.0, None),
    "halves round to even": (8, 30.0, None, 3),
    "fraction": (301, 29.97, 1.3, None),
}
GRIDS = {
    "one token": [(1, 2, 2)],
    "one row": [(1, 2, 10)],
    "square": [(1, 16, 18)],
    "table's own": [(1, 48, 48)],
    "above the table": [(1, 50, 94)],
    "two pictures": [(1, 4, 6), (1, 8, 2)],
    "video and picture": [(3, 4, 6), (1, 6, 4)],
}
MIXES = {  # runs of text, images and videos, as they come in a prompt
    "text": [7],
    "image first": [("image", (1, 4, 6)), 3],
    "image last": [5, ("image", (1, 8, 4))],
    "two images": [2, ("image", (1, 4, 6)), 1, ("image", (1, 10, 2)), 4],
    "nothing between": [2, ("image", (1, 2, 2)), ("image", (1, 4, 4)), 1],
    "video": [3, ("video", (3, 4, 6)), 5],
    "one slice": [1, ("video", (1, 6, 8)), 1],
    "image and video": [
        3,
        ("image", (1, 6, 6)),
        2,
        ("video", (2, 4, 8)),
        2,
        ("image", (1, 2, 8)),
        9,
    ],
    "two videos": [1, ("video", (2, 4, 4)), 3, ("video", (4, 2, 6)), 1],
    "wide": [4, ("image", (1, 2, 40)), 2],
    "long text after a small image": [1, ("image", (1, 2, 2)), 30],
}
START, END, IMAGE, VIDEO, TEXT = 151652, 151653, 151655, 151656, 100


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """uint8 noise over a gradient: sharp edges, flat parts, and both ends of the scale."""
    count = int(np.prod(shape))
    raw = np.random.PCG64(seed).random_raw(-(-count // 8)).view(np.uint8)[:count].reshape(shape)
    ramp = np.linspace(-80, 335, shape[1]).reshape(1, -1, *[1] * (len(shape) - 2))
    return np.clip(ramp + raw / 2 - 64, 0, 255).astype(np.uint8)


def pictures() -> dict[str, object]:
    """Pillow images of several sizes and modes, and arrays, by name."""
    from PIL import Image

    def image(rows: int, columns: int, mode: str = "RGB", seed: int = 0):
        channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
        pixels = noise(rows, columns, channels, seed=seed)
        return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)

    rgb = image(90, 130, seed=1)
    rgba = image(90, 130, "RGBA", seed=2)
    palette = rgb.quantize(17)
    clear = palette.copy()
    clear.info["transparency"] = 3
    keyed = rgb.copy()
    keyed.info["transparency"] = rgb.getpixel((5, 5))
    cmyk = Image.merge("CMYK", [image(90, 130, "L", seed) for seed in (3, 4, 5, 6)])
    return {
        "enlarged": image(100, 150, seed=7),
        "no resize": image(256, 320, seed=8),
        "odd": image(333, 517, seed=9),
        "full hd": image(1080, 1920, seed=10),
        "tall": image(1500, 33, seed=11),
        "one pixel": image(1, 1, seed=12),
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "L": rgb.convert("L"),
        "P": palette,
        "P, one colour clear": clear,
        "PA": clear.convert("PA"),
        "RGB, one colour clear": keyed,
        "CMYK": cmyk,
        "1": rgb.convert("1"),
        "YCbCr": rgb.convert("YCbCr"),
        "HSV": rgb.convert("HSV"),
        "array": noise(77, 210, 3, seed=13),
        "array with alpha": noise(77, 210, 4, seed=14),
        "array of grey": noise(77, 210, 1, seed=15),
    }


@dataclasses.dataclass(frozen=True)
class Mix:
    """A prompt of `MIXES`: ids, kind of each token, and the grids of its pictures."""

    ids: list[int]
    kinds: list[int]
    images: list[tuple[int, int, int]]
    videos: list[tuple[int, int, int]]


def mix(runs: list) -> Mix:
    """Lays out runs as a processor does, timestamps and all."""
    ids: list[int] = []
    images, videos = [], []
    for run in runs:
        if isinstance(run, int):
            ids += [TEXT] * run
            continue
        kind, (slices, rows, columns) = run
        (images if kind == "image" else videos).append((slices, rows, columns))
        pad = IMAGE if kind == "image" else VIDEO
        for _ in range(slices):
            stamp = [TEXT] * 6 if kind == "video" else []
            ids += [*stamp, START, *[pad] * (rows * columns // 4), END]
    kinds = [{IMAGE: 1, VIDEO: 2}.get(token, 0) for token in ids]
    return Mix(ids, kinds, images, videos)


def encoded(image, kind: str, **options) -> bytes:
    """A Pillow image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()
