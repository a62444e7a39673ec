"""Pictures and videos, ready for the vision tower: the front door of the host's image work.

Knows the order of the steps: read, choose frames, resize, cut into patches, name by content. The
steps are in `image_files`, `video`, `resize` and `patches`. Does not know prompts or weights.
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Sequence

import numpy as np

from qwen_jax.prompt import image_files, resize, video
from qwen_jax.prompt.media import Kind, Media
from qwen_jax.prompt.media_options import MediaOptions, image_bounds
from qwen_jax.prompt.patches import Grid, PatchBatch, pack_patches, patchify
from qwen_jax.prompt.preprocessor import PixelRules, VisionRules


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture or a video as patches.

    Attributes:
        kind: "image" or "video".
        patches: uint8 [U, C * Z * Y * X], in merge-block order.
        grid: slices in time, rows and columns of patches.
        merge_size: patches along each side of a token.
        num_pixels: that are seen, over all frames.
        timestamps: seconds of each slice of a video; none for an image.
        digest: of the resized pixels: equal digests have equal features.
        name: what to call it in errors.
    """

    kind: Kind
    patches: np.ndarray
    grid: Grid
    merge_size: int
    num_pixels: int
    timestamps: tuple[float, ...]
    digest: str
    name: str

    @property
    def token_rows(self) -> int:
        """Rows of tokens in a slice."""
        return self.grid[1] // self.merge_size

    @property
    def token_columns(self) -> int:
        """Columns of tokens in a slice."""
        return self.grid[2] // self.merge_size

    @property
    def num_tokens(self) -> int:
        """Placeholder tokens, over all slices; text around them is not counted."""
        return self.grid[0] * self.token_rows * self.token_columns


def prepare(
    media: Sequence[Media], rules: VisionRules, options: MediaOptions | None = None
) -> list[Picture]:
    """Reads pictures and videos, several at once in threads, and returns them in their order.

    Args:
        media: what was asked for.
        rules: the checkpoint's.
        options: for all; a part's own options go before them.

    Raises:
        ValueError: the first that cannot be used, and why.
        ModuleNotFoundError: the extra `vision` (Pillow) or `video` (PyAV) is not installed.
    """
    base = options or MediaOptions()

    def one(item: Media) -> Picture:
        try:
            wishes = item.options.over(base)
        except ValueError as error:
            raise ValueError(f"{item.name}: {error}") from None
        if item.kind == "image":
            return _image(item, rules.image, wishes)
        return _video(item, rules, wishes)

    if len(media) < 2:
        return [one(item) for item in media]
    workers = min(len(media), os.cpu_count() or 1)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        return list(pool.map(one, media))


def pack(
    pictures: Sequence[Picture], *, num_patches: int, num_segments: int, side: int
) -> PatchBatch:
    """Pictures one behind the other in a bucket of fixed size; see `patches.pack_patches`.

    Args:
        pictures: at least one.
        num_patches, num_segments: the bucket.
        side: of the tower's table of learned positions, ``num_position_embeddings ** 0.5``.
    """
    return pack_patches(
        [picture.patches for picture in pictures],
        [picture.grid for picture in pictures],
        num_patches=num_patches,
        num_segments=num_segments,
        merge_size=pictures[0].merge_size if pictures else 1,
        side=side,
    )


def _image(item: Media, rules: PixelRules, options: MediaOptions) -> Picture:
    pixels = image_files.read_picture(item.source, item.name)
    try:
        low, high = image_bounds(rules, options)
        height, width = pixels.shape[:2]
        size = resize.image_size(
            height, width, factor=rules.factor, min_pixels=low, max_pixels=high
        )
    except ValueError as error:
        raise ValueError(f"{item.name}: {error}") from None
    return _picture(item, resize.resize(pixels, size)[None], rules, ())


def _video(item: Media, rules: VisionRules, options: MediaOptions) -> Picture:
    if rules.video is None:
        raise ValueError(
            f"{item.name}: this checkpoint has no video_preprocessor_config.json, which says how "
            "videos are prepared; copy it from the published model"
        )
    image_files.pillow_image(item.name)
    clip = video.read_clip(item.source, rules.video, options, item.name)
    return _picture(item, clip.frames, rules.video.pixels, clip.timestamps)


def _picture(
    item: Media, frames: np.ndarray, rules: PixelRules, timestamps: tuple[float, ...]
) -> Picture:
    patches, grid = patchify(
        frames,
        patch_size=rules.patch_size,
        temporal_patch_size=rules.temporal_patch_size,
        merge_size=rules.merge_size,
    )
    digest = hashlib.blake2b(repr(frames.shape).encode(), digest_size=16)
    digest.update(np.ascontiguousarray(frames).data)
    return Picture(
        kind=item.kind,
        patches=patches,
        grid=grid,
        merge_size=rules.merge_size,
        num_pixels=frames.shape[0] * frames.shape[1] * frames.shape[2],
        timestamps=timestamps,
        digest=digest.hexdigest(),
        name=item.name,
    )
