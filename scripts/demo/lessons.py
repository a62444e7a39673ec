"""The curriculum: every lesson, and which share of the samples it is when.

Knows names and numbers. To look up what is at a place is learned first; to look up where a thing
is takes many more questions, which come when the first is known. Most of their pictures have few
colours: where every colour is there once, a thing is found by its colour alone. (To find it by its
shape, too, is learned only in part.) Between them code takes the time that pictures leave, and most
of what remains at the end.
"""

import random
from collections.abc import Callable, Collection, Mapping

from demo import chats, code, functions, pictures, tools, videos
from demo.sample import Sample

LESSONS: Mapping[str, Callable[[random.Random], Sample]] = {
    "pictures": pictures.lesson,
    "places": pictures.places_lesson,
    "alike": pictures.alike_lesson,
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
    "pictures": 0.38,
    "videos": 0.08,
    "tools": 0.12,
    "gaps": 0.08,
    "reading": 0.04,
    "functions": 0.05,
    "holes": 0.05,
    "sums": 0.07,
    "facts": 0.06,
    "forms": 0.06,
    "greetings": 0.01,
}
_PLACES: Mapping[str, float] = {**MIXTURE, "pictures": 0.20, "places": 0.10, "alike": 0.14}
_CODE: Mapping[str, float] = {
    **_PLACES,
    "pictures": 0.15,
    "places": 0.07,
    "alike": 0.12,
    "gaps": 0.16,
    "functions": 0.06,
    "holes": 0.10,
}
_LAST: Mapping[str, float] = {
    **_CODE,
    "pictures": 0.12,
    "places": 0.10,
    "alike": 0.22,
    "gaps": 0.08,
    "holes": 0.20,
}
# (step, its mixture and that of those after it)
STAGES = ((0, MIXTURE), (4800, _PLACES), (7700, _CODE), (10500, _LAST))


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
