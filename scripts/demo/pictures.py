"""Questions about pictures of nine cells: colours, shapes, places, numbers of things, digits.

Held out are triples of (shape or digit, colour, place). A picture to learn from holds none of them,
and a question to examine with is about one. Colours and shapes are asked for by their place, so
that nobody answers who does not know where things are.
"""

import random
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

from demo import cells
from demo.sample import Chat, assistant, user
from demo.split import is_held_out
from demo.words import COLOURS, DIGITS, PLACES, SHAPES, article

Layout = dict[int, cells.Thing]
KINDS = ("colour", "shape", "place", "count", "digit")
TURNS = (3, 6)  # questions about one picture, least and most
FEW_TURNS = (1, 3)  # of them, before one about all of its things
_DIGIT_SHARE = 0.3
_TOLD_SHARE = 0.6  # of lessons that end with all there is: many things to look up at once


def lesson(rng: random.Random) -> Chat:
    """A picture and some questions about it."""
    layout = _layout(rng)
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(*TURNS))]
    turns = [turn for kind in kinds if (turn := _question(rng, layout, kind))]
    if rng.random() < _TOLD_SHARE:
        tell = rng.choice((_by_place, _by_thing))
        turns.append(tell(layout))  # the last, so that no answer can be read off it
    return _chat(rng, layout, turns or [_nothing(rng, layout)])


def places_lesson(rng: random.Random) -> Chat:
    """A picture, and where its things are."""
    return _where(rng, _layout(rng))


def _where(rng: random.Random, layout: Layout) -> Chat:
    found = [_question(rng, layout, "place") for _ in range(rng.randint(*FEW_TURNS))]
    turns = list(dict.fromkeys(turn for turn in found if turn))
    return _chat(rng, layout, [*turns, _by_order(rng, layout)])


def alike_lesson(rng: random.Random) -> Chat:
    """A picture of one or two colours, so that a thing is not found by its colour alone."""
    colours = rng.sample(list(COLOURS), rng.randint(1, 2))
    return _where(rng, _layout(rng, colours, distinct=True))


def shapes_lesson(rng: random.Random) -> Chat:
    """A picture whose things are asked for by their shapes alone."""
    layout = _layout(rng)
    asked = [_of_shape(rng, layout) for _ in range(rng.randint(*FEW_TURNS))]
    turns = list(dict.fromkeys(turn for turn in asked if turn))
    return _chat(rng, layout, [*turns, _colours_of(rng, layout)])


def examination(rng: random.Random, kind: str) -> Chat:
    """One question of a kind, about a held-out thing (counts: about new pictures)."""
    while True:
        layout = _layout(rng)
        place = rng.choice(list(layout))
        layout[place] = _thing(
            rng, place, tuple(COLOURS), held_out=kind != "count", digit=kind == "digit"
        )
        turn = _question(rng, layout, kind, None if kind == "count" else place)
        if turn:
            return _chat(rng, layout, [turn])


def _layout(
    rng: random.Random, colours: Sequence[str] = tuple(COLOURS), *, distinct: bool = False
) -> Layout:
    layout: Layout = {}
    for place in sorted(rng.sample(range(len(PLACES)), rng.randint(2, 7))):
        while place not in layout:
            digit = rng.random() < _DIGIT_SHARE
            thing = _thing(rng, place, colours, held_out=False, digit=digit)
            if not (distinct and thing in layout.values()):
                layout[place] = thing
    return layout


def _thing(
    rng: random.Random, place: int, colours: Sequence[str], *, held_out: bool, digit: bool
) -> cells.Thing:
    while True:
        thing = rng.choice(DIGITS if digit else SHAPES), rng.choice(colours)
        if is_held_out(*thing, place) == held_out:
            return thing


def _chat(rng: random.Random, layout: Layout, turns: list[tuple[str, str]]) -> Chat:
    picture = cells.draw(layout, rng, side=3, scale=rng.choice((1, 1, 1, 2)))
    (question, answer), *more = turns
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    messages = [user(parts), assistant(answer)]
    for question, answer in more:
        messages += [user(question), assistant(answer)]
    seen = [layout.get(i, ("nothing",)) for i in range(len(PLACES))]
    return Chat(messages, seen=seen, where=[tuple(place.split()) for place in PLACES])


def _question(
    rng: random.Random, layout: Layout, kind: str, place: int | None = None
) -> tuple[str, str] | None:
    """Question and answer; None where this picture has nothing of the kind to ask for."""
    if kind == "count":
        return _count(rng, layout)
    fits = [p for p, (what, _) in layout.items() if (what in DIGITS) == (kind == "digit")]
    if kind == "place":
        fits = _alone(layout)
    elif kind == "shape" and place is None and rng.random() < 0.15:
        return _nothing(rng, layout)
    if place is None and fits:
        place = rng.choice(fits)
    if place not in fits:
        return None
    what, colour = layout[place]
    where = PLACES[place]
    if kind == "colour":
        return f"What colour is the shape at the {where}?", f"{colour.capitalize()}."
    if kind == "shape":
        return f"What is at the {where}?", f"{article(f'{colour} {what}')}."
    if kind == "digit":
        return f"Which digit is at the {where}?", f"{what}."
    return f"Where is the {colour} {what}?", f"At the {where}."


def _of_shape(rng: random.Random, layout: Layout) -> tuple[str, str] | None:
    """The colour or the place of a thing that its shape tells apart."""
    kind, places = rng.choice(("colour", "place")), _lone_shapes(rng, layout)
    if not places:
        return None
    what, colour = layout[places[0]]
    if kind == "colour":
        return f"What colour is the {what}?", f"{colour.capitalize()}."
    return f"Where is the {what}?", f"At the {PLACES[places[0]]}."


def _colours_of(rng: random.Random, layout: Layout) -> tuple[str, str]:
    things = [layout[place] for place in _lone_shapes(rng, layout)]
    if not things:
        return _nothing(rng, layout)
    told = ", ".join(f"{what}: {colour}" for what, colour in things)
    return f"Which colours have these: {', '.join(what for what, _ in things)}?", f"{told}."


def _nothing(rng: random.Random, layout: Layout) -> tuple[str, str]:
    place = rng.choice([p for p in range(len(PLACES)) if p not in layout])
    return f"What is at the {PLACES[place]}?", "Nothing."


def _by_place(layout: Layout) -> tuple[str, str]:
    things = [" ".join(reversed(layout.get(i, ("nothing",)))) for i in range(len(PLACES))]
    told = [f"{place}: {thing}" for place, thing in zip(PLACES, things, strict=True)]
    return "Describe the picture.", f"I see: {', '.join(told)}."


def _by_thing(layout: Layout) -> tuple[str, str]:
    told = [f"{colour} {what}: {PLACES[i]}" for i, (what, colour) in sorted(layout.items())]
    return "List all things.", f"There are: {', '.join(told)}."


def _by_order(rng: random.Random, layout: Layout) -> tuple[str, str]:
    """Many things to look up, in an order that is not the picture's."""
    places = _shuffled(rng, _alone(layout))
    if not places:
        return _nothing(rng, layout)
    names = [" ".join(reversed(layout[place])) for place in places]
    told = [f"{name}: {PLACES[place]}" for name, place in zip(names, places, strict=True)]
    return f"Where are these: {', '.join(names)}?", f"{', '.join(told)}."


def _lone_shapes(rng: random.Random, layout: Layout) -> list[int]:
    """Places of the things whose shape is there once, in any order."""
    return _shuffled(rng, _alone({place: what for place, (what, _) in layout.items()}))


def _alone(found: Mapping[int, Hashable]) -> list[int]:
    """Places of what is there once."""
    times = Counter(found.values())
    return [place for place, what in found.items() if times[what] == 1]


def _shuffled(rng: random.Random, places: list[int]) -> list[int]:
    return rng.sample(places, len(places))


def _count(rng: random.Random, layout: Layout) -> tuple[str, str]:
    colours = [colour for _, colour in layout.values()]
    if rng.random() < 0.5:
        return "How many things are there?", f"{len(colours)}."
    colour = rng.choice(colours)
    return f"How many {colour} things are there?", f"{colours.count(colour)}."
