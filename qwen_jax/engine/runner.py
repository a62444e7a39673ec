"""What the device holds, and the programs that work on it, fed with steps.

Knows arrays, programs and shapes; knows no queue and no event. Calls return before the device is
done: a `Flight` is a step on its way, and `land` waits for it.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from qwen_jax import sampling
from qwen_jax import sharding as sharding_lib
from qwen_jax.engine import feeding, programs
from qwen_jax.engine.feeding import Shapes
from qwen_jax.engine.pictures import FeatureStore
from qwen_jax.engine.row import Row
from qwen_jax.engine.scheduler import MOST_STEPS, Part, Step
from qwen_jax.engine.slots import FULL, Slots, penalises
from qwen_jax.engine.token_logprobs import most_wanted
from qwen_jax.engine.views import Views
from qwen_jax.generation_state import Options, Rows
from qwen_jax.model.cache import VisualRows, grow_cache, make_cache
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Weights

FEWEST_LOGPROBS = 32  # that a program reports, so that few numbers of them reach the compiler


@dataclasses.dataclass
class Pass:
    """A forward pass on its way; its rows have yet to choose.

    Attributes:
        step: what was planned.
        choosers: rows that choose, but for those that do not any more.
        x_TD, x_SD: from `programs.forward`.
        masks: of structured output, for rows that have one.
    """

    step: Step
    choosers: list[Part]
    x_TD: jax.Array
    x_SD: jax.Array
    masks: dict[Row, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Flight:
    """A step on its way.

    Attributes:
        step: what was planned.
        choosers: row b of ``made`` is that of ``choosers[b]``.
        made: None where nobody chooses.
        after: int32 [T], the tokens that ``prompt`` has logprobs of, where wanted.
        prompt: those logprobs.
    """

    step: Step
    choosers: list[Part]
    made: programs.Made | None = None
    after: np.ndarray | None = None
    prompt: sampling.Logprobs | None = None

    def land(self) -> None:
        """Waits for the device, and brings what it made to the host."""
        self.made, self.prompt = jax.device_get((self.made, self.prompt))


class Runner:
    """Runs steps.

    Args:
        params, config, runtime: the model.
        features: of pictures; None where the model sees none.
        max_rows: most rows at once.
        max_tokens: most tokens of a ragged step.
        max_model_len: the longest context.
        num_pages: of the cache, to begin with.
    """

    def __init__(
        self,
        params: Weights,
        config: ModelConfig,
        runtime: Runtime,
        features: FeatureStore | None,
        *,
        max_rows: int,
        max_tokens: int,
        max_model_len: int,
        num_pages: int,
    ):
        self.params, self.config, self.runtime = params, config, runtime
        self.views = Views(features)
        width = -(-max_model_len // runtime.page_size)
        self.shapes = Shapes.make(
            runtime.buckets, max_rows=max_rows, max_tokens=max_tokens, width=width
        )
        self._unmasked: dict[int, jax.Array] = {}
        self._slots = Slots(self.shapes.rows[-1], self.config.text.vocab_size)
        self._counts: sampling.Counts | None = None
        self._cache = make_cache(config.text, runtime, num_pages)
        self._carry = self._place(programs.empty_carry(self._slots.size))
        self._table = self._place(self._slots.table())

    # ---- what is kept ----------------------------------------------------------------------------

    def seat(self, row: Row) -> None:
        """Takes the settings of a row that has got a slot."""
        self._slots.seat(row)
        self.recount(row)

    def recount(self, row: Row) -> None:
        """Counts a row's tokens anew, where its choices depend on them."""
        if not penalises(row):
            return
        job, size = row.sequence.job, self.config.text.vocab_size
        seen = np.zeros(size, bool)
        seen[list(job.prompt)] = True
        new = row.tokens[len(job.prompt) :]
        output = np.bincount(np.array(new, np.int64), minlength=size).astype(np.int32)
        assert row.slot is not None
        self.run_recount(row.slot, seen, output)

    def grow(self, num_pages: int) -> None:
        """Makes the cache larger."""
        self._cache = grow_cache(self._cache, num_pages)

    @property
    def num_pages(self) -> int:
        """Of the cache."""
        return self._cache.num_pages

    @property
    def lost(self) -> bool:
        """Whether an error has taken the cache with it."""
        return any(x.is_deleted() for x in jax.tree.leaves(self._cache))

    @property
    def num_slots(self) -> int:
        """Rows that the device can keep."""
        return self._slots.size

    def reset(self) -> None:
        """Makes everything anew after an error, empty."""
        num_pages = self._cache.num_pages
        del self._cache  # its memory is needed
        self._counts = None
        self._cache = make_cache(self.config.text, self.runtime, num_pages)
        self._carry = self._place(programs.empty_carry(self._slots.size))

    # ---- steps -----------------------------------------------------------------------------------

    def forward(self, step: Step) -> Pass:
        """Starts the forward pass of a ragged step."""
        size = self.shapes.for_step(step.parts)
        fed = feeding.feed(step.parts, size, self.shapes)
        streams = self.run_forward(fed, self.views.rows(step.parts, size[0]))
        return Pass(step, [part for part in step.parts if part.chooses], *streams)

    def choose(self, passed: Pass) -> Flight:
        """Starts the choice of the rows that still choose after a forward pass."""
        flight = Flight(passed.step, passed.choosers)
        asked = list(feeding.prompt_logprobs_asked(passed.step.parts))
        if asked:
            flight.after = feeding.targets(passed.step.parts, passed.x_TD.shape[0])
            most = self._logprobs(asked)
            flight.prompt = self.run_targets_logprobs(passed.x_TD, flight.after, most)
        if any(part.chooses for part in passed.choosers):
            seats, options = self._seats(passed.choosers, 1, passed.masks)
            flight.made = self.run_choose(passed.x_SD, seats, options)
        _start_copy(flight)
        return flight

    def stretch(self, step: Step) -> Flight:
        """Starts decode steps."""
        seats, options = self._seats(step.parts, MOST_STEPS, {})
        table = feeding.page_table(step.parts, seats.slots.shape[0], self.shapes.width)
        flight = Flight(step, step.parts, self.run_stretch(seats, table, step.steps, options))
        _start_copy(flight)
        return flight

    # ---- programs --------------------------------------------------------------------------------

    def run_forward(self, fed: programs.Feed, visual: VisualRows | None):
        """`programs.forward`: the streams [T, D] and [S, D]."""
        x_TD, x_SD, self._cache = programs.forward(
            *self._model, fed, visual, self._carry, self._cache
        )
        return x_TD, x_SD

    def run_choose(self, x_SD: jax.Array, seats: programs.Seats, options: Options) -> programs.Made:
        """`programs.choose`."""
        made, self._carry, counts = programs.choose(
            *self._model,
            x_SD,
            seats,
            self._settings(),
            self._carry,
            self._counts_for(options),
            options=options,
        )
        self._counts = self._counts if counts is None else counts
        return made

    def run_stretch(
        self, seats: programs.Seats, table: np.ndarray, steps: int, options: Options
    ) -> programs.Made:
        """`programs.stretch`."""
        made, self._carry, counts, self._cache = programs.stretch(
            *self._model,
            seats,
            self._settings(),
            self._carry,
            self._counts_for(options),
            self._cache,
            table,
            np.int32(steps),
            options=options,
        )
        self._counts = self._counts if counts is None else counts
        return made

    def run_recount(self, slot: int, prompt: np.ndarray, output: np.ndarray) -> None:
        """`programs.recount`."""
        self._counts = programs.recount(self._all_counts(), np.int32(slot), prompt, output)

    def run_targets_logprobs(self, x_TD: jax.Array, after: np.ndarray, num_logprobs: int | None):
        """`programs.targets_logprobs`."""
        return programs.targets_logprobs(*self._model, x_TD, after, num_logprobs=num_logprobs)

    @property
    def _model(self):
        return self.params, self.config, self.runtime

    def _settings(self) -> Rows:
        if self._slots.changed:
            self._table = self._place(self._slots.table())
        return self._table

    def _seats(
        self, choosers: list[Part], new_tokens: int, masks: Mapping[Row, np.ndarray]
    ) -> tuple[programs.Seats, Options]:
        """Who chooses, and which program does it."""
        size = self.shapes.for_rows(len(choosers))
        seats = feeding.seats(choosers, size, self._slots.size)
        rows = [part.row if part.chooses else None for part in choosers]
        choosing = [row for row in rows if row is not None]
        features = self._slots.features(choosing)
        if features is FULL:
            all_masks = self._slots.masks(rows, size, masks)
            placed = self.no_masks(size) if all_masks is None else self._place(all_masks)
            seats = dataclasses.replace(seats, masks=placed)
        asked = (row.sequence.job.params.logprobs for row in choosing)
        return seats, Options(features, new_tokens, self._logprobs(asked))

    def _logprobs(self, asked: Iterable[int | None]) -> int | None:
        most = most_wanted(asked, self.config.text.vocab_size)
        if most is None or most == -1:
            return most
        return min(max(most, FEWEST_LOGPROBS), self.config.text.vocab_size)

    def _counts_for(self, options: Options) -> sampling.Counts | None:
        return self._all_counts() if options.features.penalties else None

    def _all_counts(self) -> sampling.Counts:
        if self._counts is None:
            empty = sampling.Counts.empty(self._slots.size, self.config.text.vocab_size)
            self._counts = self._place(empty)
        assert self._counts is not None
        return self._counts

    def no_masks(self, size: int) -> jax.Array:
        """Masks of ``size`` rows that leave every token."""
        if size not in self._unmasked:
            words = -(-self.config.text.vocab_size // 32)
            every = np.full((size, words), 0xFFFFFFFF, np.uint32)
            self._unmasked[size] = self._place(every)
        return self._unmasked[size]

    def _place(self, tree):
        return sharding_lib.replicate(tree, self.runtime.mesh)


def _start_copy(flight: Flight) -> None:
    for array in jax.tree.leaves((flight.made, flight.prompt)):
        array.copy_to_host_async()
