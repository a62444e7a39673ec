"""The settings of every slot, as arrays for the device.

Knows sampling parameters and slots; knows no token but those that settings name. All slots are one
table, sent to the device when a row is seated, so that a step names slots and nothing else.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from qwen_jax import sampling
from qwen_jax.engine.row import Row
from qwen_jax.generation_state import Rows

_STOP_IDS = 16  # places for ids that end a text, at least: few widths reach the compiler
_BIASES = 512  # and for biased ids

PLAIN = sampling.Features(greedy_only=False, penalties=False, bias=False, min_tokens=False)
FULL = sampling.Features(greedy_only=False)
"""The two kinds of program: FULL ones take masks and counts, which cost memory to read."""


class Slots:
    """Settings of ``size`` slots for a vocabulary of ``vocab_size``.

    Attributes:
        changed: whether a row was seated since `table` was called.
    """

    def __init__(self, size: int, vocab_size: int):
        self.size, self._vocab_size = size, vocab_size
        self.changed = True
        free = sampling.RowSampling.make([sampling.RowSettings()] * size, vocab_size)
        self._sampling = _widened(free, _STOP_IDS, _BIASES)
        self._max_tokens, self._rope_delta = (np.zeros(size, np.int32) for _ in range(2))
        self._features = [PLAIN] * size
        self._allowed: dict[int, np.ndarray] = {}

    def seat(self, row: Row) -> None:
        """Puts a row's settings into its slot."""
        slot, job = row.slot, row.sequence.job
        assert slot is not None
        one = sampling.RowSampling.make([settings(row)], self._vocab_size)
        widths = (one.stop_ids.shape[1], one.bias_ids.shape[1])
        self._sampling = _widened(self._sampling, *widths)
        one = _widened(one, self._sampling.stop_ids.shape[1], self._sampling.bias_ids.shape[1])
        for field in dataclasses.fields(one):
            if field.name != "allowed":
                getattr(self._sampling, field.name)[slot] = getattr(one, field.name)[0]
        self._max_tokens[slot] = job.max_tokens
        self._rope_delta[slot] = job.vision.delta if job.vision else 0
        self._allowed.pop(slot, None)
        if one.allowed is not None:
            self._allowed[slot] = np.asarray(one.allowed)[0]
        of = sampling.Features.of(one)
        needs_masks = slot in self._allowed or row.constraint is not None
        full = of.penalties or of.bias or of.min_tokens or needs_masks
        self._features[slot] = FULL if full else PLAIN
        self.changed = True

    def table(self) -> Rows:
        """All slots, as NumPy arrays for jit; a copy, since the device may read them late."""
        self.changed = False
        rows = Rows(self._sampling, self._max_tokens, self._rope_delta)  # type: ignore[arg-type]
        return jax.tree.map(np.copy, rows)

    def features(self, rows: list[Row]) -> sampling.Features:
        """The kind of program that does for all of these rows."""
        # A row that runs has a slot.
        full = any(self._features[row.slot] is FULL for row in rows)  # type: ignore[index]
        return FULL if full else PLAIN

    def masks(
        self, rows: Sequence[Row | None], size: int, given: Mapping[Row, np.ndarray]
    ) -> np.ndarray | None:
        """uint32 [size, ceil(V/32)]: which ids rows may choose; None where all may choose all.

        rows: None for one that does not choose. given: what structured output allows rows.
        """
        if not any(row in given or row.slot in self._allowed for row in rows if row is not None):
            return None
        masks = np.full((size, -(-self._vocab_size // 32)), 0xFFFFFFFF, np.uint32)
        for b, row in enumerate(rows):
            if row is None:
                continue
            if row in given:
                masks[b] = given[row]
            if row.slot in self._allowed:
                masks[b] &= self._allowed[row.slot]
        return masks


def penalises(row: Row) -> bool:
    """Whether a row's choices depend on the tokens that it has had."""
    of = row.sequence.job.params
    return (of.presence_penalty, of.frequency_penalty, of.repetition_penalty) != (0, 0, 1)


def settings(row: Row) -> sampling.RowSettings:
    """What a row asks for; raises ValueError where that leaves no token."""
    job, params = row.sequence.job, row.sequence.job.params
    return sampling.RowSettings(
        temperature=params.temperature,
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition=params.repetition_penalty,
        presence=params.presence_penalty,
        frequency=params.frequency_penalty,
        seed=job.seed,
        min_tokens=params.min_tokens,
        bias=dict(params.logit_bias or {}),
        allowed=params.allowed_token_ids,
        stop_ids=job.stop_ids,
    )


def _widened(rows: sampling.RowSampling, stop_ids: int, biases: int) -> sampling.RowSampling:
    """The same with places for at least so many ids; NumPy arrays, as all of a slot are."""

    def pad(x, width: int, fill: float) -> np.ndarray:
        return np.pad(x, ((0, 0), (0, max(width - x.shape[1], 0))), constant_values=fill)

    return dataclasses.replace(
        rows,
        stop_ids=pad(rows.stop_ids, stop_ids, -1),  # type: ignore[arg-type]
        bias_ids=pad(rows.bias_ids, biases, -1),  # type: ignore[arg-type]
        bias=pad(rows.bias, biases, 0.0),  # type: ignore[arg-type]
    )
