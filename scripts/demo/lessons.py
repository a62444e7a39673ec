"""The curriculum: every lesson, and which share of the samples it is when.

Knows names and numbers. Pictures come first and most; the rest of the time is for words and code.
Where a thing is, is learned in three steps. By its colour, which is enough where every colour is
there once. Then shapes are asked for alone: without that lesson they are never looked up, however
many pictures have few colours. Once they are, those pictures teach to look for both.
"""

import random
from collections.abc import Callable, Collection, Mapping

from demo import chats, code, functions, pictures, tools, videos
from demo.sample import Sample

LESSONS: Mapping[str, Callable[[random.Random], Sample]] = {
    "pictures": pictures.lesson,
    "places": pictures.places_lesson,
    "alike": pictures.alike_lesson,
    "shapes": pictures.shapes_lesson,
    "videos": videos.lesson,
    "tools": tools.lesson,
    "gaps": code.gap,
    "reading": code.reading,
    "functions": functions.reading,
    "holes": functions.gap,
    "sums": chats.sums,
    "facts": chats.facts,
    "forms": chats.forms,
    "greetings": chats.greetings,
}
MIXTURE: Mapping[str, float] = {
    "pictures": 0.15,
    "places": 0.05,
    "alike": 0.15,
    "videos": 0.08,
    "tools": 0.13,
    "gaps": 0.13,
    "reading": 0.04,
    "functions": 0.05,
    "holes": 0.08,
    "sums": 0.09,
    "facts": 0.05,
    "forms": 0.08,
    "greetings": 0.01,
}
_SEEING: Mapping[str, float] = {**MIXTURE, "pictures": 0.5, "places": 0.4, "alike": 0.6}
_SHAPES: Mapping[str, float] = {**MIXTURE, "shapes": 0.25}
_LAST: Mapping[str, float] = {
    **MIXTURE,
    "pictures": 0.18,
    "places": 0.03,
    "alike": 0.12,
    "shapes": 0.06,
    "tools": 0.17,
    "gaps": 0.06,
    "holes": 0.16,
    "sums": 0.15,
    "forms": 0.10,
}
_AGAIN: Mapping[str, float] = {**_LAST, "pictures": 0.45, "alike": 0.08, "sums": 0.30}
# (step, its mixture and that of those after it)
STAGES = ((0, _SEEING), (3000, MIXTURE), (4000, _SHAPES), (7500, _LAST), (12000, _AGAIN))


def sample(rng: random.Random, mixture: Mapping[str, float] = MIXTURE) -> Sample:
    """One sample of a mixture."""
    (name,) = rng.choices(list(mixture), list(mixture.values()))
    return LESSONS[name](rng)


def mixture_at(step: int, names: Collection[str] = ()) -> dict[str, float]:
    """The weights of lessons at a step, or those that some lessons have at last.

    Raises:
        ValueError: there is no lesson of a name.
    """
    unknown = sorted(set(names) - set(LESSONS))
    if unknown:
        raise ValueError(f"lessons {unknown} are unknown; there are {', '.join(LESSONS)}")
    if names:
        return {name: STAGES[-1][1][name] for name in names}
    return dict([mixture for first, mixture in STAGES if first <= step][-1])
