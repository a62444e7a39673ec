"""Small Python functions that do what their names say: to complete, and to fill in.

The standard library is far beyond so small a model; this is Python that it can know. Held out are
functions with some names: what they do is learned with others. Knows text; knows no token.
"""

import keyword
import random
import re

from demo.sample import Gap, Text
from demo.split import is_held_out

# {a}, {b}: two values; {many}, {one}: a list, and one of what is in it.
FORMS = (
    "def add({a}, {b}):\n    return {a} + {b}\n",
    "def subtract({a}, {b}):\n    return {a} - {b}\n",
    "def multiply({a}, {b}):\n    return {a} * {b}\n",
    "def divide({a}, {b}):\n    return {a} / {b}\n",
    "def is_equal({a}, {b}):\n    return {a} == {b}\n",
    "def is_smaller({a}, {b}):\n    return {a} < {b}\n",
    "def swap({a}, {b}):\n    return {b}, {a}\n",
    "def larger({a}, {b}):\n    if {a} > {b}:\n        return {a}\n    return {b}\n",
    "def smaller({a}, {b}):\n    if {a} < {b}:\n        return {a}\n    return {b}\n",
    "def is_even({a}):\n    return {a} % 2 == 0\n",
    "def is_odd({a}):\n    return {a} % 2 == 1\n",
    "def double({a}):\n    return 2 * {a}\n",
    "def square({a}):\n    return {a} * {a}\n",
    "def negate({a}):\n    return -{a}\n",
    "def absolute({a}):\n    if {a} < 0:\n        return -{a}\n    return {a}\n",
    "def factorial({a}):\n    if {a} < 2:\n        return 1\n    return {a} * factorial({a} - 1)\n",
    "def fibonacci({a}):\n    if {a} < 2:\n        return {a}\n"
    "    return fibonacci({a} - 1) + fibonacci({a} - 2)\n",
    "def first({many}):\n    return {many}[0]\n",
    "def last({many}):\n    return {many}[-1]\n",
    "def is_empty({many}):\n    return len({many}) == 0\n",
    "def count({many}):\n    return len({many})\n",
    "def backwards({many}):\n    return {many}[::-1]\n",
    "def average({many}):\n    return sum({many}) / len({many})\n",
    "def total({many}):\n    result = 0\n    for {one} in {many}:\n        result += {one}\n"
    "    return result\n",
    "def largest({many}):\n    result = {many}[0]\n    for {one} in {many}:\n"
    "        if {one} > result:\n            result = {one}\n    return result\n",
    "def smallest({many}):\n    result = {many}[0]\n    for {one} in {many}:\n"
    "        if {one} < result:\n            result = {one}\n    return result\n",
    "def contains({many}, {a}):\n    for {one} in {many}:\n        if {one} == {a}:\n"
    "            return True\n    return False\n",
    "def positive({many}):\n    return [{one} for {one} in {many} if {one} > 0]\n",
    "def doubled({many}):\n    return [2 * {one} for {one} in {many}]\n",
    "def squares({many}):\n    return [{one} * {one} for {one} in {many}]\n",
    "def quicksort({many}):\n    if len({many}) < 2:\n        return {many}\n"
    "    pivot, rest = {many}[0], {many}[1:]\n"
    "    small = [{one} for {one} in rest if {one} < pivot]\n"
    "    large = [{one} for {one} in rest if {one} >= pivot]\n"
    "    return quicksort(small) + [pivot] + quicksort(large)\n",
)
PAIRS = (
    *(("a", "b"), ("x", "y"), ("n", "m"), ("left", "right"), ("first", "second"), ("low", "high")),
    *(("start", "stop"), ("width", "height"), ("this", "other"), ("old", "new"), ("i", "j")),
    *(("number", "other"), ("value", "limit"), ("size", "step"), ("key", "default")),
)
LISTS = (
    *(("items", "item"), ("values", "value"), ("numbers", "number"), ("words", "word")),
    *(("names", "name"), ("lines", "line"), ("keys", "key"), ("rows", "row"), ("data", "x")),
    *(("prices", "price"), ("sizes", "size"), ("points", "point"), ("parts", "part")),
    *(("entries", "entry"), ("results", "each"), ("array", "element")),
)
MOST = 3  # functions in a text
_WORD = re.compile(r"[A-Za-z_]\w*")
_LINE = re.compile(r"(?<=\n) +(.+)")


def function(rng: random.Random, *, held_out: bool = False) -> str:
    """A function."""
    while True:
        form, (a, b), (many, one) = rng.choice(FORMS), rng.choice(PAIRS), rng.choice(LISTS)
        names = {"a": a, "b": b, "many": many, "one": one}
        used = [name for slot, name in names.items() if f"{{{slot}}}" in form]
        if len(set(used)) == len(used) and is_held_out("function", form, *used) == held_out:
            return form.format(**names)


def reading(rng: random.Random) -> Text:
    """Some functions, one after the other, and the end."""
    text = "\n\n".join(function(rng) for _ in range(rng.randint(1, MOST)))
    return Text(text, ends=True, cut=rng.randrange(len(text)))


def body(rng: random.Random) -> Gap:
    """All of a held-out function but its first line."""
    text = function(rng, held_out=True)
    first = text.index("\n") + 1
    return Gap(text[:first], text[first:], "", wrapped=False)


def gap(rng: random.Random, *, held_out: bool = False) -> Gap:
    """A name or a line taken out of a function; to learn from, with others before and after it."""
    text = function(rng, held_out=held_out)
    if rng.random() < 0.5:
        words = [m for m in _WORD.finditer(text) if not keyword.iskeyword(m.group())]
        first, last = rng.choice(words).span()
    else:
        first, last = rng.choice(list(_LINE.finditer(text))).span(1)
    others = [] if held_out else [function(rng) for _ in range(rng.randint(0, MOST - 1))]
    at = rng.randint(0, len(others))
    before = "".join(f"{other}\n\n" for other in others[:at])
    after = "".join(f"\n\n{other}" for other in others[at:])
    wrapped = held_out or rng.random() < 0.8
    return Gap(before + text[:first], text[first:last], text[last:] + after, wrapped)
