"""The curriculum: every lesson, and which share of the samples it is. Knows names and numbers."""

import random
from collections.abc import Callable, Mapping

from demo import chats, code, pictures, tools, videos
from demo.sample import Sample

LESSONS: Mapping[str, Callable[[random.Random], Sample]] = {
    "pictures": pictures.lesson,
    "videos": videos.lesson,
    "tools": tools.lesson,
    "gaps": code.gap,
    "reading": code.reading,
    "sums": chats.sums,
    "facts": chats.facts,
    "forms": chats.forms,
    "greetings": chats.greetings,
}
MIXTURE: Mapping[str, float] = {
    "pictures": 0.40,
    "videos": 0.08,
    "tools": 0.12,
    "gaps": 0.12,
    "reading": 0.06,
    "sums": 0.08,
    "facts": 0.07,
    "forms": 0.06,
    "greetings": 0.01,
}


def sample(rng: random.Random, mixture: Mapping[str, float] = MIXTURE) -> Sample:
    """One sample of the mixture."""
    (name,) = rng.choices(list(mixture), list(mixture.values()))
    return LESSONS[name](rng)


def only(*names: str) -> dict[str, float]:
    """The mixture of some lessons, in their usual proportions.

    Raises:
        ValueError: there is no lesson of a name.
    """
    unknown = sorted(set(names) - set(LESSONS))
    if unknown:
        raise ValueError(f"lessons {unknown} are unknown; there are {', '.join(LESSONS)}")
    return {name: MIXTURE[name] for name in names}
