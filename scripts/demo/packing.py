"""Samples to batches of one fixed shape: the batch of a step follows from the seed and the step.

Knows lines (see `kernels`), rows and the tower's arrays; knows no weight.
"""

import dataclasses
import random
from collections.abc import Mapping

import jax
import numpy as np
from flax import struct

from demo import lessons
from demo.encode import Encoded, Encoder
from demo.kernels import PATCH_LINE, TEXT_LINE
from qwen_jax.prompt.images import Picture
from qwen_jax.prompt.patches import coordinates, interpolation
from qwen_jax.weights.config import ModelConfig

NAMED_WEIGHT = 0.3  # of a word for what a picture's token shows, beside 1 for a token of an answer
WORDS = 2  # for what a row of the tower shows, at most: a shape or a digit, and its colour
MISFITS = 8  # samples that find no room before a batch counts as full


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a batch.

    Attributes:
        lines: of `TEXT_LINE` tokens.
        rows: samples and stretches of padding, at most.
        learned: tokens to predict, at most.
        pictures: pictures and videos, at most: lines of `PATCH_LINE` patches.
    """

    lines: int
    rows: int
    learned: int
    pictures: int

    @classmethod
    def of(cls, lines: int) -> "Shape":
        """Room in the proportions of the mixture."""
        return cls(lines, lines * 10, lines * TEXT_LINE * 5 // 8, lines * 5 // 4)


@struct.dataclass
class Batch:
    """One step's arrays; T tokens, U patches.

    Attributes:
        tokens: int32 [T].
        positions: int32 [3, T].
        row_starts: int32 [rows + 1]; stretches of padding are rows too.
        source: int32 [T], a token's row of the features, -1 for text.
        learned: int32 [n], tokens whose successors are to be predicted.
        targets: int32 [n], those successors.
        weights: float32 [n], of each prediction; 0 for padding.
        sample: int32 [n], which sample's answer it is part of, in the order they were put; else -1.
        patches: uint8 [U, C * Z * Y * X].
        coordinates, taps, tap_weights, segment_starts: as in `VisionBatch`.
        kept: float32 [U / 4], 0 for pictures whose last layer is hidden.
        shown: int32 [U / 4, 2], what a row of the tower shows, -1 where there is no more to tell.
    """

    tokens: jax.Array
    positions: jax.Array
    row_starts: jax.Array
    source: jax.Array
    learned: jax.Array
    targets: jax.Array
    weights: jax.Array
    sample: jax.Array
    patches: jax.Array
    coordinates: jax.Array
    taps: jax.Array
    tap_weights: jax.Array
    segment_starts: jax.Array
    kept: jax.Array
    shown: jax.Array


def make(
    encoder: Encoder,
    shape: Shape,
    *,
    seed: int,
    step: int,
    mixture: Mapping[str, float] = lessons.MIXTURE,
) -> Batch:
    """The batch of a step."""
    rng = random.Random(f"batch {seed} {step}")
    packer = Packer(encoder.config, shape, rng)
    misfits = 0
    while misfits < MISFITS:
        misfits += not packer.put(encoder.encode(lessons.sample(rng, mixture)))
    return packer.batch()


class Packer:
    """Takes samples while there is room.

    rng: shuffles blocks and hides layers, as is done to learn; None: as in serving.
    """

    def __init__(self, config: ModelConfig, shape: Shape, rng: random.Random | None):
        self._shape, self._rng, self._config = shape, rng, config
        self._room = [TEXT_LINE] * shape.lines
        self._lines: list[list[tuple[Encoded, int, int]]] = [[] for _ in range(shape.lines)]
        self._count = 0
        self._pictures: list[Picture] = []
        self._learned = 0

    def put(self, sample: Encoded) -> bool:
        """Puts a sample into the fullest line that has room; False: there is none."""
        length, learned = len(sample.tokens), int(sample.learned.sum()) + len(sample.named)
        fits = [i for i, room in enumerate(self._room) if room >= length]
        rows = self._count + self._shape.lines
        if (
            not fits
            or rows >= self._shape.rows
            or self._learned + learned > self._shape.learned
            or len(self._pictures) + len(sample.pictures) > self._shape.pictures
        ):
            return False
        line = min(fits, key=self._room.__getitem__)
        ready = sample if self._rng is None else _reordered(sample, self._rng)
        self._lines[line].append((ready, len(self._pictures), self._count))
        self._count += 1
        self._room[line] -= length
        self._learned += learned
        self._pictures += sample.pictures
        return True

    def batch(self) -> Batch:
        """The arrays."""
        total = self._shape.lines * TEXT_LINE
        tokens, positions = np.zeros(total, np.int32), np.zeros((3, total), np.int32)
        source, starts = np.full(total, -1, np.int32), [0]
        shown = np.full((self._shape.pictures * PATCH_LINE // 4, WORDS), -1, np.int32)
        targets: list[tuple[int, int, float, int]] = []
        for line, samples in enumerate(self._lines):
            at = line * TEXT_LINE
            for sample, picture, number in samples:
                stop = at + len(sample.tokens)
                tokens[at:stop], positions[:, at:stop] = sample.tokens, sample.positions
                if sample.visual is not None:
                    first = picture * (PATCH_LINE // 4)
                    source[at:stop] = np.where(sample.visual >= 0, sample.visual + first, -1)
                    for row, word in sample.shown:
                        told = shown[first + row]
                        told[np.count_nonzero(told >= 0)] = word
                (places,) = np.nonzero(sample.learned)
                targets += [(at + p - 1, sample.tokens[p], 1.0, number) for p in places]
                targets += [(at + p, word, NAMED_WEIGHT, -1) for p, word in sample.named]
                starts.append(stop)
                at = stop
            starts.append((line + 1) * TEXT_LINE)
        starts += [total] * (self._shape.rows + 1 - len(starts))
        targets += [(0, 0, 0.0, -1)] * (self._shape.learned - len(targets))
        learned, wanted, weights, sample_numbers = zip(*targets, strict=True)
        return Batch(
            tokens=tokens,
            positions=positions,
            row_starts=np.asarray(starts, np.int32),
            source=source,
            learned=np.asarray(learned, np.int32),
            targets=np.asarray(wanted, np.int32),
            weights=np.asarray(weights, np.float32),
            sample=np.asarray(sample_numbers, np.int32),
            shown=shown,
            **self._tower(),
        )

    def _tower(self) -> dict[str, np.ndarray]:
        vision, lines = self._config.vision, self._shape.pictures
        assert vision is not None
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        side = round(vision.num_position_embeddings**0.5)
        patches = np.zeros((lines * PATCH_LINE, width), np.uint8)
        where = np.zeros((lines * PATCH_LINE, 2), np.int32)
        taps = np.zeros((4, lines * PATCH_LINE), np.int32)
        tap_weights = np.zeros((4, lines * PATCH_LINE), np.float32)
        kept = np.zeros((lines, PATCH_LINE // 4), np.float32)
        starts = [0]
        for line, picture in enumerate(self._pictures):
            at, count = line * PATCH_LINE, len(picture.patches)
            order = self._shuffled(picture)
            patches[at : at + count] = picture.patches
            where[at : at + count] = coordinates(picture.grid, picture.merge_size)[order]
            mixed = interpolation(picture.grid, picture.merge_size, side)
            taps[:, at : at + count], tap_weights[:, at : at + count] = (x[:, order] for x in mixed)
            kept[line] = self._rng is None or self._rng.random() < 0.5
            slice_ = picture.grid[1] * picture.grid[2]
            starts += [at + slice_ * (i + 1) for i in range(picture.grid[0])]
            if starts[-1] < at + PATCH_LINE:
                starts.append(at + PATCH_LINE)
        most = lines * PATCH_LINE // 4 + 1
        starts += [starts[-1]] * (most - len(starts))
        return {
            "patches": patches,
            "coordinates": where,
            "taps": taps,
            "tap_weights": tap_weights,
            "segment_starts": np.asarray(starts, np.int32),
            "kept": kept.reshape(-1),
        }

    def _shuffled(self, picture: Picture) -> np.ndarray:
        """Patches of a slice with their merge blocks in any order.

        The tower is told of each block that it stands elsewhere. So it learns to look at blocks one
        by one, and where they are can only be known from the decoder's three-axis positions.
        """
        slices, rows, columns = picture.grid
        blocks = np.arange(slices * rows * columns).reshape(slices, -1, picture.merge_size**2)
        order = list(range(blocks.shape[1]))
        if self._rng is not None:
            self._rng.shuffle(order)
        return blocks[:, order].reshape(-1)


def _reordered(sample: Encoded, rng: random.Random) -> Encoded:
    """A sample whose pictures' tokens come in any order, each with its own place and feature row.

    So their order says nothing, and their three-axis positions alone say where they are.
    """
    if sample.visual is None:
        return sample
    visual, positions = sample.visual.copy(), sample.positions.copy()
    moved, row = np.arange(len(visual)), 0
    for picture in sample.pictures:
        if picture.kind == "image":
            (slots,) = np.nonzero((visual >= row) & (visual < row + picture.num_tokens))
            order = np.array(rng.sample(slots.tolist(), len(slots)))
            visual[slots], positions[:, slots] = sample.visual[order], sample.positions[:, order]
            moved[order] = slots
        row += picture.num_tokens
    named = tuple((int(moved[token]), word) for token, word in sample.named)
    return dataclasses.replace(sample, visual=visual, positions=positions, named=named)
