"""Features of pictures: computed once, kept for a while, and cut to the chunks of a prefill.

Knows pictures by their content, the vision tower and shape buckets; knows no request and no page.
Features are kept on the host: an accelerator's memory is planned for weights and cache, and a chunk
of a prompt needs no more than its own tokens' rows.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from qwen_jax.model.cache import VisualRows
from qwen_jax.model.vision import VisionBatch, jit_encode
from qwen_jax.prompt import images
from qwen_jax.prompt.images import Picture
from qwen_jax.prompt.preprocessor import PixelRules, VisionRules
from qwen_jax.prompt.vision_prompt import VisionPrompt
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig, VisionConfig
from qwen_jax.weights.params import Vision, Weights

_KEPT_BYTES = 2**31  # four of the largest pictures of the widest model
_BATCH_PATCHES = 16384  # smaller pictures are encoded together up to this many

_Key = tuple[str, tuple[float, ...], tuple[float, ...]]


@dataclasses.dataclass(frozen=True)
class Features:
    """What the tower made of pictures, on the host.

    Attributes:
        rows: [M, D], one per placeholder token.
        levels: [J, M, D], DeepStack.
    """

    rows: np.ndarray
    levels: np.ndarray

    @property
    def num_bytes(self) -> int:
        return self.rows.nbytes + self.levels.nbytes


class FeatureStore:
    """Runs the tower for pictures that were not seen lately.

    Args:
        weights, config, runtime: the tower.
        rules: of the checkpoint's preprocessor, for the colours' mean and deviation.
        max_bytes: of host memory for features; those least lately used go first.

    Attributes:
        encoded: pictures that the tower has worked on so far.
    """

    def __init__(
        self,
        weights: Vision,
        config: VisionConfig,
        runtime: Runtime,
        rules: VisionRules,
        *,
        max_bytes: int = _KEPT_BYTES,
    ):
        self._weights, self._config, self._runtime = weights, config, runtime
        self._rules, self._max_bytes = rules, max_bytes
        self._kept: collections.OrderedDict[_Key, Features] = collections.OrderedDict()
        self.encoded = 0

    @classmethod
    def make(
        cls, params: Weights, config: ModelConfig, runtime: Runtime, rules: VisionRules | None
    ) -> "FeatureStore | None":
        """The store of a model; None for one that sees nothing."""
        if config.vision is None or params.vision is None or rules is None:
            return None
        return cls(params.vision, config.vision, runtime, rules)

    def of(self, pictures: Sequence[Picture]) -> Features:
        """The features of a prompt's pictures, one behind the other in their order."""
        wanted = {self._key(picture): picture for picture in pictures}
        found = {key: self._kept[key] for key in wanted if key in self._kept}
        new = [picture for key, picture in wanted.items() if key not in found]
        for batch in self._batches(new):
            for picture, features in zip(batch, self._encode(batch), strict=True):
                found[self._key(picture)] = features
        self._keep(found)
        each = [found[self._key(picture)] for picture in pictures]
        if len(each) == 1:
            return each[0]
        return Features(
            np.concatenate([x.rows for x in each]), np.concatenate([x.levels for x in each], axis=1)
        )

    def _pixel_rules(self, picture: Picture) -> PixelRules:
        if picture.kind == "image":
            return self._rules.image
        assert self._rules.video is not None
        return self._rules.video.pixels

    def _key(self, picture: Picture) -> _Key:
        rules = self._pixel_rules(picture)
        return picture.digest, rules.mean, rules.std

    def _batches(self, pictures: list[Picture]) -> Iterator[list[Picture]]:
        """Neighbours of equal mean and deviation, as many as go together."""
        batch: list[Picture] = []
        for picture in pictures:
            used = sum(len(x.patches) for x in batch) + len(picture.patches)
            slices = sum(x.grid[0] for x in batch) + picture.grid[0]
            full = used > _BATCH_PATCHES or slices > self._runtime.buckets.segments[-1]
            if batch and (full or self._key(picture)[1:] != self._key(batch[0])[1:]):
                yield batch
                batch = []
            batch.append(picture)
        if batch:
            yield batch

    @property
    def shapes(self) -> list[int]:
        """Numbers of patches that images are encoded with; only long videos need more."""
        return [size for size in self._runtime.buckets.patches if size <= _BATCH_PATCHES]

    def warm_up(self, num_patches: int) -> None:
        """Compiles the tower for images of so many patches, one of `shapes`."""
        sizes, merge = self._config.sizes, self._config.spatial_merge_size
        patch = sizes["C"] * sizes["Z"] * sizes["Y"] * sizes["X"]
        black = np.zeros((merge**2, patch), np.uint8)
        one = Picture("image", black, (1, merge, merge), merge, 0, (), "", "the warm-up")
        self._encode([one], num_patches)

    def _encode(self, batch: list[Picture], num_patches: int = 0) -> list[Features]:
        """The features of each picture, computed with at least ``num_patches`` patches."""
        buckets = self._runtime.buckets
        used = sum(len(x.patches) for x in batch)
        packed = images.pack(
            batch,
            num_patches=buckets.pick("patches", max(used, num_patches)),
            num_segments=buckets.pick("segments", sum(x.grid[0] for x in batch)),
            side=round(self._config.num_position_embeddings**0.5),
        )
        rules = self._pixel_rules(batch[0])
        features = jit_encode(
            self._weights,
            VisionBatch(*(getattr(packed, f.name) for f in dataclasses.fields(packed))),
            self._config,
            self._runtime,
            mean=rules.mean,
            std=rules.std,
        )
        rows, levels = jax.device_get((features.rows, features.levels))
        self.encoded += len(batch)
        ends = np.cumsum([picture.num_tokens for picture in batch])
        # Copies: a view would keep its whole batch alive.
        return [
            Features(
                rows[end - x.num_tokens : end].copy(), levels[:, end - x.num_tokens : end].copy()
            )
            for x, end in zip(batch, ends.tolist(), strict=True)
        ]

    def _keep(self, used: dict[_Key, Features]) -> None:
        for key, features in used.items():
            self._kept[key] = features
            self._kept.move_to_end(key)
        total = sum(x.num_bytes for x in self._kept.values())
        while total > self._max_bytes:
            total -= self._kept.popitem(last=False)[1].num_bytes


def positions_of(vision: VisionPrompt | None, window: tuple[int, int]) -> np.ndarray:
    """int32 [3, n]: rotary positions of the tokens ``window`` of a prompt."""
    start, stop = window
    if vision is not None:
        return vision.window(start, stop)
    return np.broadcast_to(np.arange(start, stop, dtype=np.int32), (3, stop - start))


def visual_rows(
    visions: Sequence[VisionPrompt | None],
    features: Sequence[Features | None],
    windows: Sequence[tuple[int, int]],
    size: int,
) -> VisualRows | None:
    """Features for the tokens of a chunk; None where none of them stands for a picture.

    Args:
        visions, features: of each row's prompt, None for text alone.
        windows: which tokens of its prompt each row brings.
        size: T of the chunk, which also bounds the features it can need.
    """
    source = np.full(size, -1, np.int32)
    pieces: list[tuple[Features, np.ndarray]] = []
    start = used = 0
    for vision, seen, (first, stop) in zip(visions, features, windows, strict=True):
        if vision is not None and seen is not None:
            rows = vision.feature_rows(first, stop)
            wanted = rows[rows >= 0]
            place = start + np.flatnonzero(rows >= 0)
            source[place] = used + np.arange(len(wanted), dtype=np.int32)
            used += len(wanted)
            pieces.append((seen, wanted))
        start += stop - first
    if not used:
        return None
    like = pieces[0][0]
    rows_MD = np.zeros((size, *like.rows.shape[1:]), like.rows.dtype)
    levels_JMD = np.zeros((len(like.levels), *rows_MD.shape), like.levels.dtype)
    np.concatenate([x.rows[i] for x, i in pieces], out=rows_MD[:used])
    np.concatenate([x.levels[:, i] for x, i in pieces], axis=1, out=levels_JMD[:, :used])
    return VisualRows(rows_MD, levels_JMD, source)  # type: ignore[arg-type]  (jit takes them)
