"""Pixels to patches, and where each patch stands: order, grid, positions, segments.

Knows numpy arrays of pixels and grids of patches. Does not know files, prompts or weights.

Every array over patches (U) is in *merge-block order*: slice by slice in time, in each the blocks
of 2 x 2 patches that become one token, row by row, and in each block its rows. A grid of 4 x 6:

     0  1 |  4  5 |  8  9
     2  3 |  6  7 | 10 11
    ------+-------+------
    12 13 | 16 17 | 20 21
    14 15 | 18 19 | 22 23
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int, int]  # slices in time, rows and columns of patches


def patchify(
    frames: np.ndarray, *, patch_size: int, temporal_patch_size: int, merge_size: int
) -> tuple[np.ndarray, Grid]:
    """Cuts frames into patches; the last frame is repeated until the patches in time are full.

    Args:
        frames: uint8 [frames, rows, columns, C]; a picture is one frame. Rows and columns are
            multiples of ``patch_size * merge_size``.
        patch_size, temporal_patch_size, merge_size: Y = X, Z, and the side of a merge block.

    Returns:
        uint8 [U, C * Z * Y * X], colour slowest, and the grid.
        Source: transformers Qwen2VLImageProcessorPil.patchify, Qwen3VLVideoProcessor.patchify.
    """
    missing = -frames.shape[0] % temporal_patch_size
    if missing:
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
    count, rows, columns, channels = frames.shape
    grid = (count // temporal_patch_size, rows // patch_size, columns // patch_size)
    assert (rows, columns) == (grid[1] * patch_size, grid[2] * patch_size)
    blocks = frames.reshape(
        grid[0],
        temporal_patch_size,
        grid[1] // merge_size,
        merge_size,
        patch_size,
        grid[2] // merge_size,
        merge_size,
        patch_size,
        channels,
    )
    # slice, Z, block row, row in it, Y, block column, column in it, X, C ->
    # slice, block row, block column, row in it, column in it, C, Z, Y, X
    ordered = blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
    width = channels * temporal_patch_size * patch_size**2
    return ordered.reshape(grid[0] * grid[1] * grid[2], width), grid


def pixel_values(patches: np.ndarray, *, mean: Sequence[float], std: Sequence[float]) -> np.ndarray:
    """Bytes to the normalised float32 values the tower was trained on.

    A byte has one value per channel, so a table of 256 makes it exact to the last bit:
    ``(float32(byte * (1/255)) - mean) / std``. Source: transformers image_transforms.py rescale
    and normalize.

    Args:
        patches: uint8 [U, C * Z * Y * X].
        mean, std: [C].
    """
    scaled = (np.arange(256) * (1 / 255)).astype(np.float32)
    table = (scaled - np.asarray(mean, np.float32)[:, None]) / np.asarray(std, np.float32)[:, None]
    by_channel = patches.reshape(patches.shape[0], len(table), -1)
    values = np.empty(by_channel.shape, np.float32)
    for channel, of_byte in enumerate(table):
        values[:, channel] = of_byte[by_channel[:, channel]]
    return values.reshape(patches.shape)


def coordinates(grid: Grid, merge_size: int) -> np.ndarray:
    """Row and column of every patch, for the rotary embedding: int32 [U, 2].

    They start over in every slice. Source: transformers vision_utils.py get_vision_position_ids.
    """
    slices, rows, columns = grid
    row, column = np.meshgrid(
        np.arange(rows, dtype=np.int32), np.arange(columns, dtype=np.int32), indexing="ij"
    )
    both = np.stack([row, column], axis=-1).reshape(
        rows // merge_size, merge_size, columns // merge_size, merge_size, 2
    )
    return np.tile(both.transpose(0, 2, 1, 3, 4).reshape(-1, 2), (slices, 1))


def interpolation(grid: Grid, merge_size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Which four learned positions every patch mixes, and how much of each.

    The corners of the grid meet the corners of the ``side`` x ``side`` table (align_corners), and
    in between it is bilinear, in float32. Source: transformers vision_utils.py
    get_vision_interpolation_indices_and_weights.

    Returns:
        int32 [4, U] rows of the flat table (upper left, upper right, lower left, lower right) and
        float32 [4, U] weights.
    """
    slices, rows, columns = grid
    at = coordinates((1, rows, columns), merge_size)
    row_taps, row_weights = _axis_taps(at[:, 0], rows, side)
    column_taps, column_weights = _axis_taps(at[:, 1], columns, side)
    taps = row_taps[:, None] * side + column_taps[None, :]  # [2, 2, patches of a slice]
    weights = row_weights[:, None] * column_weights[None, :]
    return np.tile(taps.reshape(4, -1), slices), np.tile(weights.reshape(4, -1), slices)


def _axis_taps(index: np.ndarray, length: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """The two neighbours in the table along one axis, int32 [2, n], and their float32 weights."""
    source = index.astype(np.float32) * np.float32(side - 1) / np.float32(max(length - 1, 1))
    below = np.floor(source)
    steps = np.array([[0], [1]], np.float32)
    weights = np.maximum(1 - np.abs(source - below - steps), 0, dtype=np.float32)
    taps = np.minimum(below.astype(np.int32) + steps.astype(np.int32), side - 1)
    return taps, weights


@dataclasses.dataclass(frozen=True)
class PatchBatch:
    """Several pictures and videos side by side, padded: the host's half of a tower's input.

    Attributes:
        patches: uint8 [U, C * Z * Y * X].
        coordinates: int32 [U, 2], row and column.
        taps, tap_weights: int32 and float32 [4, U], learned positions to mix.
        segment_starts: int32 [segments + 1], non-decreasing: slice s owns the patches
            ``segment_starts[s]:segment_starts[s + 1]`` and no patch looks out of its slice. Unused
            segments are empty, and what lies behind the last one is padding.
    """

    patches: np.ndarray
    coordinates: np.ndarray
    taps: np.ndarray
    tap_weights: np.ndarray
    segment_starts: np.ndarray


def pack_patches(
    patches: Sequence[np.ndarray],
    grids: Sequence[Grid],
    *,
    num_patches: int,
    num_segments: int,
    merge_size: int,
    side: int,
) -> PatchBatch:
    """Puts pictures one behind the other, in their order, into arrays of one fixed size.

    Args:
        patches: uint8 [U_i, C * Z * Y * X] of each picture or video.
        grids: of each.
        num_patches, num_segments: the bucket; both at least what the pictures need.
        merge_size, side: of merge blocks, and of the table of learned positions.

    Raises:
        ValueError: there is no picture, or they do not fit the bucket.
    """
    used = sum(len(x) for x in patches)
    lengths = [rows * columns for slices, rows, columns in grids for _ in range(slices)]
    assert used == sum(lengths)
    if not patches or used > num_patches or len(lengths) > num_segments:
        raise ValueError(
            f"{len(patches)} pictures with {used:,} patches in {len(lengths)} segments do not fit "
            f"a bucket of {num_patches:,} patches and {num_segments} segments"
        )
    room = np.zeros((num_patches, patches[0].shape[1]), np.uint8)
    np.concatenate(patches, out=room[:used])
    places = np.zeros((num_patches, 2), np.int32)
    taps, weights = np.zeros((4, num_patches), np.int32), np.zeros((4, num_patches), np.float32)
    start = 0
    for grid in grids:
        stop = start + grid[0] * grid[1] * grid[2]
        places[start:stop] = coordinates(grid, merge_size)
        taps[:, start:stop], weights[:, start:stop] = interpolation(grid, merge_size, side)
        start = stop
    starts = np.full(num_segments + 1, used, np.int32)
    starts[: len(lengths)] = np.cumsum([0, *lengths[:-1]])
    return PatchBatch(room, places, taps, weights, starts)
