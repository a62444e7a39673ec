"""What a compiled program does, read from its text: messages, copies, kernels.

Knows XLA's notation; knows no model.
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence

_BITS = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"(pred|[a-z]+\d+\w*)\[([\d,]*)\](\{[^}]*\})?")
_COLLECTIVE = re.compile(
    r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|ragged-all-to-all|"
    r"collective-permute)(-start)?\("
)
# "%ragged_dot_bfloat16.2 = f32[...] custom-call(...), custom_call_target="tpu_custom_call"
_CALL = re.compile(r'%(\w+)\S* = .* custom-call\(.*custom_call_target="tpu_custom_call"')
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) (\w[\w-]*)\(")
_FUSED = re.compile(r"calls=%?([\w.-]+)")
_MOVES = ("copy", "copy-start", "transpose")


def collectives_of(text: str) -> dict[tuple[str, int], int]:
    """(op, bytes of its result on a device) -> how often, from a compiled program's text."""
    found: collections.Counter = collections.Counter()
    for result, op, started in _COLLECTIVE.findall(text):
        shapes = [_bytes(dtype, shape) for dtype, shape, _ in _SHAPE.findall(result)]
        # What is started has its operands beside its results.
        size = max(shapes) if started else sum(shapes)
        found[op, size] += 1
    return dict(found)


def copies_of(text: str, *, least: int = 1 << 20) -> list[int]:
    """Bytes of the arrays of at least ``least`` bytes that a program copies within HBM.

    A copy inside of a fusion is none: it is the order in which the fusion reads an operand. A
    fusion that does nothing but copy is one. What goes to VMEM (``S(1)`` in its layout) is read
    there ahead of its use, once, as its user would have read it; what comes from there was made
    there, and is put away until it is used again.
    """
    computations = _computations(text)
    fused = {name for body in computations.values() for *_, name in body if name is not None}
    sizes = []
    for name, body in computations.items():
        if name in fused:
            continue
        for result, op, callee in body:
            # What is started has its result first, then its operand.
            shapes = _SHAPE.findall(result) or [("pred", "0", "")]
            outside = all("S(1)" not in layout for *_, layout in shapes)
            if outside and _moves(op, callee, computations):
                sizes.append(_bytes(*shapes[0][:2]))
    return sorted((n for n in sizes if n >= least), reverse=True)


def calls_of(text: str) -> dict[str, int]:
    """Pallas kernel -> how often a compiled program for TPU calls it."""
    return dict(sorted(collections.Counter(_CALL.findall(text)).items()))


def _computations(text: str) -> dict[str, list[tuple[str, str, str | None]]]:
    """Name -> its instructions: result, op, and the computation that a fusion calls."""
    body: list[tuple[str, str, str | None]] = []
    found = {}
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            found[header[1]] = body = []
        elif part := _INSTRUCTION.match(line):
            callee = _FUSED.search(line) if part[2] == "fusion" else None
            body.append((part[1], part[2], callee and callee[1]))
    return found


def _moves(op: str, callee: str | None, computations: Mapping[str, Sequence]) -> bool:
    """Whether an instruction is a copy, or a fusion of nothing else."""
    if op != "fusion":
        return op in _MOVES
    inside = [x for x in computations[callee or ""] if x[1] not in ("parameter", "bitcast")]
    return bool(inside) and all(_moves(op, callee, computations) for _, op, callee in inside)


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.match(dtype)
    width = max(1, int(bits[1]) // 8) if bits else 1
    return width * math.prod(int(n) for n in shape.split(",") if n)
