"""Compiles what requests will need, by running each program once with nothing to do.

Knows shapes and programs; knows no request. What is rare is not among them, and compiles when it
comes: more than 32 logprobs, more than 16 ids that end a text or 512 biased ones, long videos.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from qwen_jax.engine import feeding
from qwen_jax.engine.runner import FEWEST_LOGPROBS, Runner
from qwen_jax.engine.scheduler import MOST_STEPS
from qwen_jax.engine.slots import FULL, PLAIN
from qwen_jax.generation_state import Options
from qwen_jax.model.cache import VisualRows

Progress = Callable[[int, int], None]


def warm_up(runner: Runner, progress: Progress | None) -> None:
    """Runs every program of a runner; ``progress`` gets the programs done, and all there are."""
    nothing = np.zeros(runner.config.text.vocab_size, np.int32)
    store = runner.views.store
    calls = [
        *([] if store is None else [partial(store.warm_up, size) for size in store.shapes]),
        *_forwards(runner),
        *_choices(runner),
        lambda: runner.run_recount(runner.num_slots, nothing > 0, nothing),
    ]
    for done, call in enumerate(calls):
        if progress is not None:
            progress(done, len(calls))
        jax.block_until_ready(call())
    if progress is not None:
        progress(len(calls), len(calls))


def _forwards(runner: Runner) -> list[Callable]:
    shapes, calls = runner.shapes, []
    logprobs = min(FEWEST_LOGPROBS, runner.config.text.vocab_size)
    for size in (*shapes.ragged, *((b, b) for b in shapes.rows)):
        fed = feeding.feed([], size, shapes)
        calls.append(lambda fed=fed: runner.run_forward(fed, None))
        if size in shapes.ragged and runner.views.store is not None:
            visual = _no_picture(runner, size[0])
            calls.append(lambda fed=fed, visual=visual: runner.run_forward(fed, visual))
        after = np.full(size[0], -1, np.int32)
        calls.append(
            lambda fed=fed, after=after: runner.run_targets_logprobs(
                runner.run_forward(fed, None)[0], after, logprobs
            )
        )
    return calls


def _choices(runner: Runner) -> list[Callable]:
    shapes, calls = runner.shapes, []
    logprobs = min(FEWEST_LOGPROBS, runner.config.text.vocab_size)
    empty = feeding.feed([], shapes.ragged[0], shapes)
    for rows in shapes.rows:
        seats = feeding.seats([], rows, runner.num_slots)
        table = feeding.page_table([], rows, shapes.width)
        for features in (PLAIN, FULL):
            if features is FULL:
                seats = dataclasses.replace(seats, masks=runner.no_masks(rows))
            options = Options(features, MOST_STEPS)
            calls.append(lambda s=seats, t=table, o=options: runner.run_stretch(s, t, 1, o))
            for count in (None, logprobs):
                options = Options(features, 1, count)
                calls.append(
                    lambda s=seats, o=options: runner.run_choose(
                        runner.run_forward(empty, None)[1], s, o
                    )
                )
    return calls


def _no_picture(runner: Runner, size: int) -> VisualRows:
    """Features for no token of a chunk, in the shapes that pictures bring."""
    vision, width = runner.config.vision, runner.config.text.hidden_size
    assert vision is not None
    levels = len(vision.deepstack_visual_indexes)
    dtype = jnp.dtype(runner.runtime.dtype)
    return VisualRows(
        jnp.zeros((size, width), dtype),
        jnp.zeros((levels, size, width), dtype),
        jnp.full(size, -1, jnp.int32),
    )
