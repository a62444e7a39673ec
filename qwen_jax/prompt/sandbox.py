"""Runs a chat template that may be hostile: no attributes to climb out by, bounded work and memory.

A template comes with a checkpoint, so from anyone. Jinja's immutable sandbox keeps it away from
Python's internals but lets it loop for ever and double strings until memory ends. Here all work is
metered (`sandbox_meter`), methods are an allow-list, and what cannot be bounded (formatting with
widths, most filters that amplify) is not offered.

Knows Jinja. Does not know messages, tokens or models.
"""

import json
from collections.abc import Callable, Iterable, Sized
from typing import Any

import jinja2
from jinja2 import ext, filters, nodes, runtime, sandbox, utils

from qwen_jax.prompt.sandbox_meter import (
    HIDDEN_FILTERS,
    METER,
    PASS_UNITS,
    PIECE_UNITS,
    Metering,
    TemplateLimit,
    finalize,
    joined,
    made,
)
from qwen_jax.prompt.taint import as_text, original, twins_in

MAX_TEMPLATE_CHARS = 1 << 17  # published ones have at most 7,000
_MAX_INT_BITS = 4096
_LOCALS = ("_block_vars", "_loop_vars")

_FILTERS = frozenset((
    "abs", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr",
    "reverse", "safe", "select", "selectattr", "sort", "title", "trim", "unique", "upper",
))  # fmt: skip
_STR_METHODS = frozenset((
    "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
    "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "join",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex",
    "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip", "swapcase",
    "title", "upper",
))  # fmt: skip
_METHODS: tuple[tuple[type | tuple[type, ...], frozenset[str]], ...] = (
    (str, _STR_METHODS),
    (dict, frozenset(("get", "items", "keys", "values"))),
    ((list, tuple), frozenset(("count", "index"))),
    ((int, float, bytes, range, type), frozenset()),
)


class _Generation(ext.Extension):
    """`{% generation %}…{% endgeneration %}` marks what is trained on; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(utils.Namespace):
    def __repr__(self) -> str:  # Jinja's prints all it holds, which nothing measures
        return "<namespace>"


class TemplateEnvironment(sandbox.ImmutableSandboxedEnvironment):
    """The environment of Hugging Face chat templates (trim_blocks, lstrip_blocks, loop controls,
    `tojson` without HTML escapes, `raise_exception`, `strftime_now`), with metered work."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(joined)  # type: ignore[assignment]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[ext.LoopControlExtension, _Generation],
            finalize=finalize,
            optimized=False,  # no expression is evaluated before rendering, where it is metered
        )
        self.filters = {name: filters.FILTERS[name] for name in _FILTERS}
        self.filters |= {
            "string": as_text,
            "tojson": _tojson,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
        }
        self.filters |= HIDDEN_FILTERS
        del self.globals["lipsum"]
        self.globals |= {"namespace": _Namespace}
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        return super()._generate(Metering().visit(source), *args, **kwargs)

    def wrap_str_format(self, value: Any) -> None:
        """Formatting is not offered at all (a width can ask for any amount of memory)."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, allowed in _METHODS:
            if isinstance(obj, kind):
                return attr in allowed
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: runtime.Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        # Jinja adds its local variables, for functions that take the context.
        given = {name: value for name, value in kwargs.items() if name not in _LOCALS}
        meter = METER.get()
        meter.charge(PASS_UNITS + meter.size_of([*args, *given.values()]))
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            return _call_str_method(owner, obj, args, given)
        return made(context, super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: runtime.Context, operator: str, left: Any, right: Any) -> Any:
        meter = METER.get()
        if operator == "%" and isinstance(left, str | bytes):
            raise jinja2.exceptions.SecurityError("string formatting with % is not offered")
        if operator == "*":
            meter.charge(_product_units(left, right))
        if operator == "**" and not (abs(right) <= 64 and abs(left) <= 1 << 64):
            raise TemplateLimit(f"{left!r:.50} ** {right!r:.50} is too large")
        if operator == "+":
            meter.charge(sum(len(side) for side in (left, right) if isinstance(side, Sized)))
        return super().call_binop(context, operator, left, right)


def _product_units(left: Any, right: Any) -> int:
    if isinstance(left, Sized) or isinstance(right, Sized):
        sequence, times = (left, right) if isinstance(left, Sized) else (right, left)
        return len(sequence) * max(times, 0) if isinstance(times, int) else 0
    bits = sum(side.bit_length() for side in (left, right) if isinstance(side, int))
    if bits > _MAX_INT_BITS:
        raise TemplateLimit("a product of integers is too large")
    return 1


def _call_str_method(owner: str, method: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
    meter, name = METER.get(), method.__name__
    meter.charge(len(owner))
    if name == "join":
        return _join_strings(owner, *args)
    if name == "replace":
        meter.charge(_replaced_units(owner, *args, **kwargs))
    if name in ("split", "rsplit", "splitlines"):
        separator = args[0] if args and isinstance(args[0], str) else None
        # Without a separator there may be a piece for every other character.
        pieces = owner.count(separator) + 1 if separator else len(owner) // 2 + 1
        meter.charge(pieces * PIECE_UNITS)
    result = method(*args, **kwargs)
    if isinstance(result, str):
        meter.charge(len(result))
    return result


def _replaced_units(text: str, old: str, new: str, count: int = -1) -> int:
    hits = text.count(old) if count is None or count < 0 else min(text.count(old), count)
    return len(text) + hits * len(new)


def _join_strings(separator: str, values: Iterable[Any]) -> str:
    values = list(values)
    if not all(isinstance(value, str) for value in values):
        raise TypeError("join expects strings")
    return joined(values, separator)


def _join(values: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    if attribute is not None:
        raise jinja2.TemplateRuntimeError("join(attribute=…) is not offered: use map(attribute=…)")
    return joined(map(as_text, values), as_text(d))


def _replace(value: Any, old: str, new: str, count: int | None = None) -> str:
    text = as_text(value)
    METER.get().charge(_replaced_units(text, old, new, -1 if count is None else count))
    return text.replace(old, new, -1 if count is None else count)


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    size = width if isinstance(width, int) else len(width)
    METER.get().charge(size * (value.count("\n") + value.count("\r") + 2))
    return filters.FILTERS["indent"](value, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    size = indent if isinstance(indent, int) else len(indent or "")
    if size > 16 or sum(map(len, separators or ())) > 16:
        raise TemplateLimit("tojson: indent and separators may have at most 16 characters")
    text = json.dumps(
        original(value),
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
    twins = twins_in(value)
    return text if twins is None else twins.mark(text)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return METER.get().now.strftime(format)
