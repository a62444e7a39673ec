"""Bounds of numbers in JSON schemas, written so that llguidance keeps them. Knows JSON schema only.

Where the bound nearer to zero is a whole number that is excluded, and the other is less than one
away, llguidance 1.9 lets the excluded number through: 0 < x <= 0.5 allows 0. So the bound becomes
the nearest number that is allowed: the next float, or beside zero 1e-30, as small as it takes.
"""

import math
from collections.abc import Mapping
from typing import Any

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_VALUES = ("const", "enum", "default", "examples")
_LEAST = 1e-30
_WHOLE = 2**53  # above, floats have no fractions


def nearest_bounds(schema: Any) -> Any:
    """The same schema, with such bounds moved, wherever in it they are."""
    if isinstance(schema, list):
        return [nearest_bounds(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, dict):
            found[key] = {name: nearest_bounds(one) for name, one in value.items()}
        else:
            found[key] = value if key in _VALUES else nearest_bounds(value)
    found = _moved(found, "Minimum", "Maximum", 1)
    return _moved(found, "Maximum", "Minimum", -1)


def _moved(schema: Mapping[str, Any], side: str, other: str, sign: int) -> dict[str, Any]:
    """With the bound of one side moved away from zero, if it is such a one."""
    moved, edge = dict(schema), _number(schema.get(f"exclusive{side}"))
    if edge is None or not edge.is_integer() or edge * sign < 0 or (sign < 0 and not edge):
        return moved
    others = map(_number, (schema.get(other.lower()), schema.get(f"exclusive{other}")))
    if any(bound is not None and abs(bound - edge) < 1 for bound in others):
        nearest = math.nextafter(edge, sign * math.inf) if edge else _LEAST
        given = _number(schema.get(side.lower()))
        moved[side.lower()] = nearest if given is None else sign * max(sign * nearest, sign * given)
        del moved[f"exclusive{side}"]
    return moved


def _number(value: Any) -> float | None:
    """A number small enough to have a fraction."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) >= _WHOLE:
        return None
    return float(value)
