"""Counts the work of a chat template while it renders, by rewriting the parsed template.

Every pass of a loop or macro, and every operation whose cost grows with its operands, is charged to
a `Meter`. Counting is by work, not by time, so the limit never depends on the machine.

Knows Jinja's syntax tree and what operations cost. Does not know which are offered, or messages.
"""

import contextvars
import datetime
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Sized, ValuesView
from typing import Any

import jinja2
from jinja2 import nodes, runtime
from jinja2.visitor import NodeTransformer

from qwen_jax.prompt.taint import as_text, join

PIECE_UNITS = 16  # a string object made by split or list
PASS_UNITS = 32  # a pass of a loop
_ITEM_UNITS = 4  # an item looked at
_CALL_UNITS = 16  # a filter or test called for an item
_BASE_BUDGET = 1 << 24  # units: about one character each, whatever the messages hold
_BUDGET_PER_CHAR = 64  # a real template copies or searches each character of the input 10 times
_MAX_DEPTH = 200

_PAIRING_FILTERS = {"select", "reject", "selectattr", "rejectattr", "map"}
_SPREADING_FILTERS = {"list", "sort", "unique", "dictsort", "groupby"}
_COMPARING_TESTS = {"in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "lessthan", "le", "<=",
                    "gt", ">", "greaterthan", "ge", ">="}  # fmt: skip


class TemplateLimit(jinja2.TemplateRuntimeError):
    """The template did more work, or asked for more memory, than any real one needs."""


class Meter:
    """Work a rendering may still do, in units of about one character, and the time it is told."""

    def __init__(self, inputs: Iterable[str], now: datetime.datetime):
        self.left = _BASE_BUDGET + _BUDGET_PER_CHAR * sum(map(len, inputs))
        self.now = now

    def charge(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TemplateLimit("the chat template does more work than any real one: stopped")

    def size_of(self, value: Any, depth: int = 0) -> int:
        """Characters and items in a nested value, counted as often as they are reached.

        Charges while it walks, so that small values which share their parts cannot be walked long.
        """
        if isinstance(value, str):
            return len(value)
        if isinstance(value, dict):
            value = [*value.keys(), *value.values()]
        elif isinstance(value, KeysView | ValuesView | ItemsView):
            value = list(value)
        if isinstance(value, list | tuple):
            if depth > _MAX_DEPTH:
                raise TemplateLimit(f"values are nested deeper than {_MAX_DEPTH} levels")
            size = len(value) * _ITEM_UNITS
            self.charge(size)
            for item in value:
                inner = self.size_of(item, depth + 1)
                self.charge(inner)
                size += inner
            return size
        return len(value) if isinstance(value, Sized) else 0


METER: contextvars.ContextVar[Meter] = contextvars.ContextVar("meter")


def render(template: jinja2.Template, meter: Meter, variables: dict[str, Any]) -> str:
    """Render under a meter. Raises jinja2.TemplateError or what the template's operations raise."""
    token = METER.set(meter)
    try:
        return template.render(variables)
    finally:
        METER.reset(token)


# Hidden filters, which the rewriting puts around expressions. Their names hold a space, so that a
# template cannot spell them. They take the context so that Jinja cannot evaluate them, and all that
# is inside them, when it compiles.


@jinja2.pass_context
def _pass(context: runtime.Context, value: Any) -> bool:
    METER.get().charge(PASS_UNITS)
    return True


@jinja2.pass_context
def measured(context: runtime.Context, value: Any, spread: int = 1) -> Any:
    if isinstance(value, Iterator):
        value = list(value)
    meter = METER.get()
    meter.charge(meter.size_of(value) * spread + 1)
    return value


@jinja2.pass_context
def _paired(context: runtime.Context, value: Any, *args: Any) -> Any:
    value = measured(context, value)
    meter = METER.get()
    count = len(value) if isinstance(value, Sized) else 1
    meter.charge(count * (_CALL_UNITS + meter.size_of(args)))
    return value


@jinja2.pass_context
def _sliced(context: runtime.Context, value: Any) -> Any:
    METER.get().charge(len(value) if isinstance(value, Sized) else 1)
    return value


@jinja2.pass_context
def made(context: runtime.Context, value: Any) -> Any:
    if isinstance(value, Sized):
        METER.get().charge(len(value))
    return value


@jinja2.pass_context
def _concat(context: runtime.Context, first: Any, *others: Any) -> str:
    return joined(as_text(measured(context, value)) for value in (first, *others))


@jinja2.pass_context
def finalize(context: runtime.Context, value: Any) -> Any:
    """What an output expression prints."""
    return value if isinstance(value, str) else as_text(measured(context, value))


def joined(pieces: Iterable[str], separator: str = "") -> str:
    """Join strings, charging for each before the whole is made."""
    meter, kept = METER.get(), []
    for piece in pieces:
        meter.charge(len(piece) + len(separator) + 1)
        kept.append(piece)
    return join(separator, kept)


class Metering(NodeTransformer):
    """Puts hidden filters around all whose cost is not bounded by the template's size."""

    def _body(self, node: Any) -> Any:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_hidden("pass", nodes.Const(0)), lineno=node.lineno))
        return node

    visit_Macro = visit_CallBlock = _body

    def visit_For(self, node: nodes.For) -> nodes.For:
        self._body(node)
        if node.test is not None:
            node.test = nodes.And(_hidden("pass", nodes.Const(0)), node.test)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        return _hidden("concat", node.nodes[0], node.nodes[1:])

    def visit_Compare(self, node: nodes.Compare) -> nodes.Expr:
        self.generic_visit(node)
        node.expr = _measure(node.expr)
        for operand in node.ops:
            operand.expr = _measure(operand.expr)
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Expr:
        self.generic_visit(node)
        if node.name in _COMPARING_TESTS:
            node.node = _measure(node.node)
            node.args = [_measure(arg) for arg in node.args]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            node.node = _hidden("sliced", node.node)
        else:
            node.arg = _measure(node.arg)
        return node

    def visit_Pair(self, node: nodes.Pair) -> nodes.Pair:
        self.generic_visit(node)
        node.key = _measure(node.key)
        return node

    def visit_Filter(self, node: nodes.Filter) -> nodes.Expr:
        self.generic_visit(node)
        node.args = [_measure(arg) for arg in node.args]
        for keyword in node.kwargs:
            keyword.value = _measure(keyword.value)
        if node.node is not None:  # None: a {% filter %} block
            if node.name in _PAIRING_FILTERS:
                node.node = _hidden("paired", node.node, node.args)
            else:
                spread = PIECE_UNITS if node.name in _SPREADING_FILTERS else 1
                node.node = _hidden("measured", node.node, [nodes.Const(spread)])
        return _hidden("made", node)


def _hidden(name: str, node: nodes.Expr, args: list[nodes.Expr] | None = None) -> nodes.Filter:
    return nodes.Filter(node, f" {name}", args or [], [], None, None)


def _measure(node: nodes.Expr) -> nodes.Expr:
    return node if isinstance(node, nodes.Const) else _hidden("measured", node)


HIDDEN_FILTERS = {
    " pass": _pass,
    " measured": measured,
    " paired": _paired,
    " sliced": _sliced,
    " made": made,
    " concat": _concat,
}
