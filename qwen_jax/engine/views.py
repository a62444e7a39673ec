"""The pictures of rows whose prompts are on their way into the cache.

Knows rows and feature stores; knows no page and no program.
"""

import weakref
from collections.abc import Sequence

from qwen_jax.engine.pictures import Features, FeatureStore, visual_rows
from qwen_jax.engine.row import Row
from qwen_jax.engine.scheduler import Part
from qwen_jax.model.cache import VisualRows


class Views:
    """Features for steps; ``store`` is None where the model sees none."""

    def __init__(self, store: FeatureStore | None):
        self.store = store
        self._seen: weakref.WeakKeyDictionary[Row, Features] = weakref.WeakKeyDictionary()

    def rows(self, parts: Sequence[Part], size: int) -> VisualRows | None:
        """What the tokens of a step show, if any; ``size`` is T.

        The features of a prompt are kept until its last chunk, whatever the store drops meanwhile.
        """
        if self.store is None:
            return None
        visions = [part.row.sequence.job.vision if part.known else None for part in parts]
        windows = [(part.start, part.start + part.take) for part in parts]
        shown = []
        for part, vision, window in zip(parts, visions, windows, strict=True):
            seen = None
            if vision is not None and (vision.feature_rows(*window) >= 0).any():
                seen = self._seen.get(part.row) or self.store.of(vision.pictures)
                self._seen[part.row] = seen
            shown.append(seen)
            if part.known and part.chooses:
                self._seen.pop(part.row, None)
        return visual_rows(visions, shown, windows, size)
