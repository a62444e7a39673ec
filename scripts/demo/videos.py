"""Questions about short videos of one thing after the other, and about when they are seen.

Held out are triples of (shape or digit, colour, which scene). A scene lasts a second.
"""

import random

import numpy as np

from demo import cells
from demo.sample import Chat, assistant, user
from demo.split import is_held_out
from demo.words import COLOURS, SHAPES, article
from qwen_jax.prompt.media_options import MediaOptions
from qwen_jax.prompt.preprocessor import VideoRules
from qwen_jax.prompt.video import sample_indices, timestamps

KINDS = ("at", "when", "first", "last")
_RATES = (2, 4, 8)


def lesson(rng: random.Random) -> Chat:
    """A video and some questions about it."""
    scenes = [_thing(rng, i, held_out=False) for i in range(rng.randint(2, 4))]
    return _chat(rng, scenes, [(rng.choice(KINDS), None) for _ in range(rng.randint(2, 3))])


def examination(rng: random.Random) -> Chat:
    """One question about a held-out scene."""
    scenes = [_thing(rng, i, held_out=False) for i in range(rng.randint(2, 4))]
    which = rng.randrange(len(scenes))
    scenes[which] = _thing(rng, which, held_out=True)
    kinds = ["at", "when", *(["first"] if which == 0 else [])]
    kinds += ["last"] if which == len(scenes) - 1 else []
    return _chat(rng, scenes, [(rng.choice(kinds), which)])


def _thing(rng: random.Random, scene: int, *, held_out: bool) -> cells.Thing:
    while True:
        thing = rng.choice(SHAPES), rng.choice(list(COLOURS))
        if is_held_out(*thing, "scene", scene) == held_out:
            return thing


def _chat(
    rng: random.Random, scenes: list[cells.Thing], asked: list[tuple[str, int | None]]
) -> Chat:
    rate = rng.choice(_RATES)
    scale = rng.choice((1, 1, 2))
    stills = [cells.draw({0: thing}, rng, side=1, scale=scale) for thing in scenes]
    frames = np.repeat(np.stack(stills), rate, axis=0)
    chosen = sample_indices(len(frames), rate, VideoRules(), MediaOptions())
    seconds = timestamps(chosen.tolist(), rate, VideoRules().pixels.temporal_patch_size)
    turns = [_question(rng, scenes, seconds, kind, which) for kind, which in asked]
    (question, answer), *more = turns
    clip = {"type": "video", "video": (frames, {"fps": float(rate)})}
    messages = [user([clip, {"type": "text", "text": question}]), assistant(answer)]
    for question, answer in more:
        messages += [user(question), assistant(answer)]
    return Chat(messages, seen=scenes)


def _question(rng, scenes, seconds, kind: str, which: int | None) -> tuple[str, str]:
    if which is None:
        which = {"first": 0, "last": len(scenes) - 1}.get(kind, rng.randrange(len(scenes)))
    what, colour = scenes[which]
    if kind == "when":
        which = scenes.index(scenes[which])  # of two alike the first
        return f"When is the {colour} {what} first seen?", f"At {seconds[which]:.1f} seconds."
    asked = f"What is seen at {seconds[which]:.1f} seconds?" if kind == "at" else ""
    return asked or f"What is seen {kind}?", f"{article(f'{colour} {what}')}."
