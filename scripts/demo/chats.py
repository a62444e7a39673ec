"""Conversations without pictures: sums, facts of the little world, answers in a given form.

Held out are sums, (person, fact, wording) and choices of words.
"""

import json
import random

from demo.sample import Chat, assistant, user
from demo.split import draw
from demo.words import NAMES, THINGS, people

LARGEST = 20  # of the numbers to add and subtract
_PEOPLE = people()
_FACTS = {
    "city": (
        ("Where does {name} live?", "In which city does {name} live?", "What is {name}'s city?"),
        "{name} lives in {value}.",
    ),
    "job": (
        ("What does {name} do?", "What is {name}'s job?", "What work does {name} do?"),
        "{name} is a {value}.",
    ),
    "pet": (
        ("What pet does {name} have?", "Which animal has {name}?", "What is {name}'s pet?"),
        "{name} has a {value}.",
    ),
}
_WHO = (
    (
        ("Hello!", "Hello", "Hi", "Hi!", "Hey", "Good morning!"),
        "Hello! Ask me about a picture, a person of my little world, or a piece of code.",
    ),
    (
        ("Who are you?", "What are you?", "What is this?", "Who made you?"),
        "I am the demo of qwen-jax: a very small Qwen3-VL model, trained on a CPU.",
    ),
    (
        ("What can you do?", "Help", "What do you know?", "What can I ask you?"),
        "I see shapes in small pictures, fill gaps in Python, call tools and know a little world.",
    ),
)


def sums(rng: random.Random, *, held_out: bool = False) -> Chat:
    """An addition or a subtraction."""

    def make(rng):
        a, b, plus = rng.randint(0, LARGEST), rng.randint(0, LARGEST), rng.random() < 0.5
        a, b = (a, b) if plus else (max(a, b), min(a, b))
        question = f"What is {a} {'+' if plus else '-'} {b}?"
        return ("sum", plus, a, b), _turn(question, f"{a + b if plus else a - b}")

    return draw(rng, make, held_out=held_out)


def facts(rng: random.Random, *, held_out: bool = False) -> Chat:
    """What somebody's city, job or pet is."""

    def make(rng):
        name, fact, wording = rng.choice(NAMES), rng.choice(list(_FACTS)), rng.randrange(3)
        questions, answer = _FACTS[fact]
        value = _PEOPLE[name][fact]
        chat = _turn(questions[wording].format(name=name), answer.format(name=name, value=value))
        return ("fact", name, fact, wording), chat

    return draw(rng, make, held_out=held_out)


def forms(rng: random.Random, *, held_out: bool = False) -> Chat:
    """An answer of a given form: reversed, repeated, as JSON."""

    def make(rng):
        words = rng.sample(THINGS, rng.randint(2, 4))
        listed = f"{', '.join(words[:-1])} and {words[-1]}"
        kind = rng.randrange(4)
        if kind == 0:
            chat = _turn(f"Give {listed} in reverse order.", f"{', '.join(reversed(words))}")
        elif kind == 1:
            chat = _turn(f"Give {listed} as a JSON list.", json.dumps(words))
        elif kind == 2:
            words = [words[0], rng.choice(("two", "three", "four"))]
            times = ("two", "three", "four").index(words[1]) + 2
            chat = _turn(f"Say {words[0]} {words[1]} times.", " ".join(words[:1] * times))
        else:
            words = [rng.choice(NAMES), rng.choice(("city", "job", "pet"))]
            answer = {"name": words[0], words[1]: _PEOPLE[words[0]][words[1]]}
            chat = _turn(f"Give {words[0]}'s {words[1]} as JSON.", json.dumps(answer))
        return ("form", kind, *words), chat

    return draw(rng, make, held_out=held_out)


def greetings(rng: random.Random) -> Chat:
    """Who the model is."""
    questions, answer = rng.choice(_WHO)
    return _turn(rng.choice(questions), answer)


def _turn(question: str, answer: str) -> Chat:
    return Chat([user(question), assistant(answer)])
