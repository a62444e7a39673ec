"""Conversations in which a function is to be called, or not, and what it returned to be told.

Held out are choices of a function and its arguments.
"""

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

from demo.chats import facts
from demo.sample import Chat, assistant, user
from demo.split import draw
from demo.words import CITIES, CURRENCIES, DAYS, LANGUAGES, NAMES, ROOMS, THINGS

Slots = Mapping[str, Callable[[random.Random], Any]]


@dataclasses.dataclass(frozen=True)
class Tool:
    """A function, how it is asked for, what it may return, and how that is told.

    Attributes:
        name, about: of the definition.
        slots: parameter -> draws an argument; its Python type is the parameter's.
        asked: wordings of a request.
        returned, told: what comes back, with ``{n}`` for a number, and the answer.
    """

    name: str
    about: str
    slots: Slots
    asked: tuple[str, ...]
    returned: str
    told: str

    def definition(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """In OpenAI's form."""
        types = {str: "string", int: "integer"}
        properties = {name: {"type": types[type(value)]} for name, value in arguments.items()}
        return {
            "type": "function",
            "function": {
                "name": self.name,
                "description": self.about,
                "parameters": {
                    "type": "object",
                    "properties": properties,
                    "required": list(properties),
                },
            },
        }


def _of(words: tuple[str, ...]) -> Callable[[random.Random], str]:
    return lambda rng: rng.choice(words)


def _number(least: int, most: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(least, most)


def _path(rng: random.Random) -> str:
    return f"{rng.choice(('src', 'lib', 'tests'))}/{rng.choice(THINGS)}.py"


TOOLS = (
    Tool(
        "get_weather",
        "Get the weather of a city.",
        {"city": _of(CITIES)},
        ("What is the weather in {city}?", "How warm is it in {city}?", "Is it cold in {city}?"),
        "{n} degrees",
        "It is {n} degrees in {city}.",
    ),
    Tool(
        "get_time",
        "Get the time of a city.",
        {"city": _of(CITIES)},
        ("What time is it in {city}?", "How late is it in {city}?", "Tell me the time in {city}."),
        "{n}:00",
        "It is {n}:00 in {city}.",
    ),
    Tool(
        "set_timer",
        "Set a timer.",
        {"minutes": _number(1, 59)},
        ("Set a timer for {minutes} minutes.", "Wake me in {minutes} minutes."),
        "ok",
        "The timer is set for {minutes} minutes.",
    ),
    Tool(
        "call_person",
        "Call somebody.",
        {"name": _of(NAMES)},
        ("Call {name}.", "Please phone {name}.", "I want to talk to {name}."),
        "ok",
        "I am calling {name}.",
    ),
    Tool(
        "buy",
        "Buy things.",
        {"item": _of(THINGS), "count": _number(1, 20)},
        ("Buy {count} of {item}.", "I need {item}, {count} of it.", "Order {item} x {count}."),
        "ok",
        "Bought: {count} of {item}.",
    ),
    Tool(
        "translate",
        "Translate a word.",
        {"word": _of(THINGS), "language": _of(LANGUAGES)},
        ("Translate {word} into {language}.", "How do you say {word} in {language}?"),
        "{word}o",
        "In {language} it is {word}o.",
    ),
    Tool(
        "convert_money",
        "Convert an amount of money.",
        {"amount": _number(1, 99), "currency": _of(CURRENCIES)},
        ("Convert {amount} into {currency}.", "How much is {amount} in {currency}?"),
        "{n}",
        "It is {n} {currency}.",
    ),
    Tool(
        "light",
        "Switch the light of a room.",
        {"room": _of(ROOMS), "state": _of(("on", "off"))},
        ("Switch {state} the light in the {room}.", "{room}: light {state}, please."),
        "ok",
        "The light in the {room} is {state}.",
    ),
    Tool(
        "add_event",
        "Put an event into the calendar.",
        {"person": _of(NAMES), "day": _of(DAYS)},
        ("I meet {person} on {day}.", "Note: {day} with {person}.", "Plan {day} with {person}."),
        "ok",
        "You meet {person} on {day}.",
    ),
    Tool(
        "run_tests",
        "Run the tests of a file.",
        {"path": _path},
        ("Run the tests of {path}.", "Does {path} pass?", "Test {path}, please."),
        "{n} passed",
        "{n} tests of {path} passed.",
    ),
    Tool(
        "read_file",
        "Read a file.",
        {"path": _path},
        ("Show me {path}.", "What is in {path}?", "Open {path}."),
        "x = {n}",
        "The file {path} says x = {n}.",
    ),
)


def lesson(rng: random.Random, *, held_out: bool = False) -> Chat:
    """A request among some tools; half of the time also what came back and how it is told."""
    if not held_out and rng.random() < 0.1:
        return Chat(facts(rng).messages, _offer(rng, rng.sample(TOOLS, 2)))

    def make(rng):
        tool = rng.choice(TOOLS)
        arguments = {name: slot(rng) for name, slot in tool.slots.items()}
        return (tool.name, *arguments.values()), (tool, arguments)

    tool, arguments = draw(rng, make, held_out=held_out)
    others = rng.sample([other for other in TOOLS if other != tool], rng.randint(0, 2))
    offered = [tool, *others]
    rng.shuffle(offered)
    call = {"type": "function", "function": {"name": tool.name, "arguments": arguments}}
    request = rng.choice(tool.asked).format(**arguments)
    request = request[0].upper() + request[1:]
    messages = [user(request), {"role": "assistant", "content": "", "tool_calls": [call]}]
    if not held_out and rng.random() < 0.5:
        found = {**arguments, "n": rng.randint(1, 23)}
        messages.append({"role": "tool", "content": tool.returned.format(**found)})
        messages.append(assistant(tool.told.format(**found)))
    return Chat(messages, _offer(rng, offered))


def _offer(rng: random.Random, tools: list[Tool]) -> list[dict[str, Any]]:
    return [tool.definition({n: slot(rng) for n, slot in tool.slots.items()}) for tool in tools]
