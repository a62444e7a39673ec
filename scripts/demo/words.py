"""The words of the generated world. Knows lists; every other module chooses from them."""

import random

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (245, 135, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
DIGITS = tuple("0123456789")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)
NAMES = (
    *("Mira", "Tom", "Lena", "Omar", "Ruth", "Ivan", "Nora", "Hugo", "Alma", "Finn", "Iris"),
    *("Karl", "Lucy", "Marc", "Nina", "Otto", "Rosa", "Saul", "Tara", "Vera", "Anna", "Boris"),
    *("Clara", "David", "Elsa", "Frank", "Greta", "Henry", "Jonas", "Kira", "Leo", "Maya"),
)
CITIES = (
    *("Oslo", "Paris", "Rome", "Cairo", "Lima", "Tokyo", "Berlin", "Madrid", "Athens"),
    *("Dublin", "Vienna", "Prague", "Boston", "Delhi", "Seoul", "Lisbon", "Warsaw", "Geneva"),
    *("Nairobi", "Sydney"),
)
JOBS = (
    *("baker", "doctor", "pilot", "teacher", "painter", "farmer"),
    *("singer", "lawyer", "nurse", "writer", "chemist", "sailor"),
)
PETS = ("dog", "cat", "parrot", "rabbit", "horse", "turtle", "hamster", "goldfish")
THINGS = (
    *("apple", "bread", "chair", "table", "lamp", "book", "cup", "key", "shoe", "coat"),
    *("river", "stone", "cloud", "tree", "flower", "window", "door", "garden", "bridge"),
    "train",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
LANGUAGES = ("French", "German", "Spanish", "Italian", "Polish", "Greek")
CURRENCIES = ("euros", "dollars", "pounds", "yen", "francs")
ROOMS = ("kitchen", "bedroom", "garage", "office", "hall")


def people() -> dict[str, dict[str, str]]:
    """Everybody's city, job and pet: the same in every run."""
    rng = random.Random("the little world")
    return {
        name: {"city": rng.choice(CITIES), "job": rng.choice(JOBS), "pet": rng.choice(PETS)}
        for name in NAMES
    }


def article(phrase: str) -> str:
    """``"orange ring"`` -> ``"An orange ring"``."""
    return f"{'An' if phrase[0] in 'aeiou' else 'A'} {phrase}"
