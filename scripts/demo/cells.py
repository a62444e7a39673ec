"""Draws coloured shapes and digits: one in a cell of a picture. Knows pixels, no question."""

import functools
import math
import random
from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from demo.words import COLOURS, SHAPES

CELL = 32  # pixels along a side: one token of the model
Thing = tuple[str, str]  # a shape or a digit, and its colour


def draw(
    things: Mapping[int, Thing], rng: random.Random, *, side: int, scale: int = 1
) -> np.ndarray:
    """A picture of side x side cells, each thing a little moved and sized inside its cell.

    Args:
        things: cell, counted row by row -> what is in it.
        rng: moves and sizes them.
        side: cells along a side.
        scale: how much larger the picture is than the model sees it.

    Returns:
        uint8 [rows, columns, 3].
    """
    cell = CELL * scale
    grey = rng.choice((rng.randrange(0, 30), rng.randrange(225, 256)))
    image = Image.new("RGB", (side * cell, side * cell), (grey, grey, grey))
    canvas = ImageDraw.Draw(image)
    for place, (kind, colour) in things.items():
        row, column = divmod(place, side)
        radius = cell * rng.uniform(0.30, 0.40)
        room = cell / 2 - radius - scale
        x = (column + 0.5) * cell + rng.uniform(-room, room)
        y = (row + 0.5) * cell + rng.uniform(-room, room)
        tint = tuple(min(255, max(0, c + rng.randrange(-12, 13))) for c in COLOURS[colour])
        if kind in SHAPES:
            _shape(canvas, kind, x, y, radius, tint)
        else:
            font = _font(round(2.3 * radius))
            canvas.text((x, y), kind, fill=tint, font=font, anchor="mm", stroke_width=scale // 2)
    return np.asarray(image)


def _shape(canvas: ImageDraw.ImageDraw, kind: str, x, y, radius, fill) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        canvas.ellipse(box, fill=fill)
    elif kind == "ring":
        canvas.ellipse(box, outline=fill, width=max(2, round(radius * 0.35)))
    elif kind == "square":
        inner = radius * 0.88
        canvas.rectangle((x - inner, y - inner, x + inner, y + inner), fill=fill)
    elif kind == "triangle":
        canvas.polygon(_corners(x, y, radius * 1.1, 3), fill=fill)
    elif kind == "diamond":
        canvas.polygon(_corners(x, y, radius * 1.1, 4), fill=fill)
    else:
        arm = radius * 0.32
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)


def _corners(x: float, y: float, radius: float, count: int) -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / count for i in range(count)]
    return [(x + radius * math.sin(t), y - radius * math.cos(t)) for t in turns]


@functools.cache
def _font(size: int):
    return ImageFont.load_default(size)
