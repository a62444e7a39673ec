"""Which mesh and strategy: all of a topology, ranked; and what fits where nothing does.

Knows `make_plan`; the rule is stated once, in `rank`.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from qwen_jax import sharding as sharding_lib
from qwen_jax.engine.capacity import weight_bytes
from qwen_jax.planner.chips import Topology
from qwen_jax.planner.plan import Load, Plan, abstract_runtime, make_plan
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.quant import FORMATS
from qwen_jax.weights.requantize import requantized

_MOST_CHIPS = 1024


def rank(plan: Plan) -> tuple:
    """Sorts plans, the best first.

    What fits; then what this chip has kernels of its own for (not XLA's); then most decode tokens
    per second; least sent; least memory. The bound is what a perfect program would reach, so plans
    within a percent count as equal, and the one with fewer bytes on the links is taken: the overlap
    that hides them is never perfect.
    """
    sent = sum(c.sent for c in plan.collectives)
    foreign = sum(name == "xla" for name in plan.kernels.values())
    return (
        not plan.fits,
        foreign,
        -round(plan.decode_tokens_per_s, -_digits(plan)),
        sent,
        plan.peak,
    )


def _digits(plan: Plan) -> int:
    return len(str(int(plan.decode_tokens_per_s))) - 3


def search(
    config: ModelConfig,
    topology: Topology,
    load: Load,
    *,
    mesh: Mapping[str, int] | None = None,
    strategy: str | Rules = "auto",
    dispatch: str = "auto",
) -> list[Plan]:
    """Plans, the best first (`rank`): of every mesh and strategy, or of those that are given.

    Of strategies that mean the same on a mesh the first is kept. What does not divide is left out.

    Args:
        config, topology, load, dispatch: as for `make_plan`.
        mesh: None: every mesh of the axes that a strategy tells apart (`_axes`).
        strategy: "auto": every named one.

    Raises:
        ValueError: nothing divides; it says why for the last one tried.
    """
    found: dict[tuple, Plan] = {}
    problem = None
    names = sharding_lib.STRATEGIES if strategy == "auto" else (strategy,)
    for name in names:
        axes = _axes(sharding_lib.strategy(name))
        for sizes in meshes(topology.devices, axes) if mesh is None else (mesh,):
            try:
                plan = make_plan(
                    config, topology, load, mesh=sizes, strategy=name, dispatch=dispatch
                )
            except ValueError as error:
                problem = error
                continue
            key = (plan.weights, plan.cache, plan.collectives, plan.imbalance, plan.prefill)
            found.setdefault(key, plan)
    if not found:
        raise ValueError(f"plan: no mesh of {topology} holds this model: {problem}") from problem
    return sorted(found.values(), key=rank)


def _axes(rules: Rules) -> tuple[str, ...]:
    """Mesh axes to split devices over: data only where it is not used as expert is."""
    used = [set(axes) for _, axes in rules.table]
    rows = any("data" in axes for axes in used)
    apart = any(("data" in axes) != ("expert" in axes) for axes in used)
    return sharding_lib.AXES if rows and apart else ("expert", "tensor")


def meshes(devices: int, axes: Sequence[str] = ("expert", "tensor")) -> Iterator[Mapping[str, int]]:
    """Every way to write ``devices`` as a product over ``axes``, without axes of size 1."""
    for sizes in _factors(devices, len(axes)):
        pairs = zip(axes, sizes, strict=True)
        yield {axis: n for axis, n in pairs if n > 1} or {axes[-1]: 1}


def _factors(number: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Every way to write ``number`` as an ordered product of so many."""
    if parts == 1:
        yield (number,)
        return
    for first in range(number, 0, -1):
        if number % first == 0:
            yield from ((first, *rest) for rest in _factors(number // first, parts - 1))


def propose(config: ModelConfig, topology: Topology, load: Load) -> Plan | None:
    """What fits where a plan does not: narrower weights or cache, then the next larger slice."""
    forms: list[str | None] = [load.quantization]
    if config.quantization is None and load.quantization is None:
        forms += list(FORMATS)
    for larger in _slices(topology):
        for form in forms:
            if _too_much(config, larger, load, form):
                continue
            for kv in dict.fromkeys((load.kv_dtype, "int8")):
                wish = dataclasses.replace(load, quantization=form, kv_dtype=kv)
                try:
                    best = search(config, larger, wish)[0]
                except ValueError:  # nothing divides over so many devices
                    continue
                if best.fits:
                    return best
    return None


def _too_much(config: ModelConfig, topology: Topology, load: Load, form: str | None) -> bool:
    """Whether weights in this form exceed the memory of all devices together."""
    whole = abstract_runtime({"tensor": 1}, "replicated", load)
    together = topology.devices * topology.chip.memory * load.utilization
    return weight_bytes(requantized(config, form), whole) > together


def _slices(topology: Topology) -> Iterator[Topology]:
    """The topology itself, then twice as many chips again and again, as square as may be.

    The last of the shortest sides is doubled: 2x2, 2x4, 4x4, 4x8 … are the slices that there are.
    """
    yield topology
    shape, gpu = list(topology.shape), topology.chip.platform == "gpu"
    most = 8 if gpu else _MOST_CHIPS  # beyond one host of GPUs the links are others
    while True:
        shape[max(i for i, n in enumerate(shape) if n == min(shape))] *= 2
        if math.prod(shape) > most:
            return
        if gpu or math.prod(shape) > 2:  # of a TPU: one chip of a host, or all four
            yield dataclasses.replace(topology, shape=tuple(shape))
