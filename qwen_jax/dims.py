"""The glossary of dimensions, and the small algebra that all layouts are written in.

Knows letters and sizes; knows nothing of arrays' contents, meshes or models. A *dims* string names
one letter per axis of an array of ours ("E P D F"); a *layout* string describes an array of
somebody else's, whose axes may fuse several letters ("(N H) D": one axis of size N*H, then D).
"""

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

GLOSSARY: Mapping[str, str] = {
    "T": "tokens of the flat ragged batch",
    "S": "key positions",
    "B": "rows (sequences) of the batch",
    "D": "model width (of the text decoder, or of the vision tower inside it)",
    "N": "query heads",
    "K": "key/value heads",
    "G": "query heads per key/value head, N / K",
    "H": "head dimension",
    "I": "hidden width of a dense MLP",
    "E": "experts held in a weight",
    "A": "active experts per token",
    "F": "hidden width of one expert",
    "P": "the pair gate, up",
    "R": "router outputs (one per expert, never sharded like E)",
    "V": "vocabulary",
    "U": "image patches",
    "C": "colour channels of a patch",
    "Z": "frames of a patch",
    "Y": "rows of a patch",
    "X": "columns of a patch",
    "Q": "the triple query, key, value of a fused projection",
    "J": "DeepStack levels",
    "L": "learned vision positions",
    "M": "width of merged patches, D times the merge block",
    "W": "hidden width of a patch merger",
    "O": "output width of a patch merger: the text decoder's D",
}

Sizes = Mapping[str, int]
_AXIS = re.compile(r"\(([^()]*)\)|(\S+)")


@functools.lru_cache
def parse(dims: str) -> tuple[str, ...]:
    """Splits a dims string into its letters: ``"E P D F"`` -> ``("E", "P", "D", "F")``.

    Raises:
        ValueError: a letter is not in the glossary, or stands twice.
    """
    letters = tuple(dims.split())
    unknown = [x for x in letters if x not in GLOSSARY]
    if unknown:
        raise ValueError(f"dims {dims!r}: {unknown} not in the glossary; known: {list(GLOSSARY)}")
    if len(set(letters)) != len(letters):
        raise ValueError(f"dims {dims!r}: a letter stands twice")
    return letters


@functools.lru_cache
def groups(layout: str) -> tuple[tuple[str, ...], ...]:
    """Splits a layout string into axes: ``"(N H) D"`` -> ``(("N", "H"), ("D",))``.

    Raises:
        ValueError: a letter is not in the glossary or stands twice, or an axis is empty.
    """
    found = tuple(parse(fused or single) for fused, single in _AXIS.findall(layout))
    if not all(found):
        raise ValueError(f"layout {layout!r}: an axis without a letter")
    parse(" ".join(letter for axis in found for letter in axis))
    return found


def shape(layout: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape of an array in ``layout`` (a dims string is a layout too)."""
    return tuple(math.prod(sizes[x] for x in axis) for axis in groups(layout))


def rearrange(x: np.ndarray, layout: str, dims: str, sizes: Sizes) -> np.ndarray:
    """Views ``x``, given in ``layout``, as an array in ``dims``; copies only if numpy must.

    Args:
        x: an array of shape ``shape(layout, sizes)``.
        layout: its layout, e.g. ``"(N H) D"``.
        dims: the wanted dims, e.g. ``"D N H"``: a permutation of the layout's letters.
        sizes: the size of each letter.

    Raises:
        ValueError: the letters differ, or ``x`` has another shape.
    """
    order = [letter for axis in groups(layout) for letter in axis]
    wanted = parse(dims)
    if sorted(order) != sorted(wanted):
        raise ValueError(f"layout {layout!r} and dims {dims!r} do not name the same letters")
    if x.shape != shape(layout, sizes):
        raise ValueError(f"shape {x.shape} is not {layout!r} = {shape(layout, sizes)}")
    split = x.reshape([sizes[letter] for letter in order])
    return split.transpose([order.index(letter) for letter in wanted])
