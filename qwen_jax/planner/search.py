"""Which mesh and strategy: all of a topology, ranked; and what fits where nothing does.

Knows `make_plan`; the rule is stated once, in `rank`.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from qwen_jax import sharding as sharding_lib
from qwen_jax.planner.chips import Topology
from qwen_jax.planner.plan import Load, Plan, make_plan
from qwen_jax.sharding import Rules
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.quant import FORMATS

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
        mesh: None: every mesh of the axes expert and tensor.
        strategy: "auto": every named one.

    Raises:
        ValueError: nothing divides; it says why for the last one tried.
    """
    found: dict[tuple, Plan] = {}
    problem = None
    names = sharding_lib.STRATEGIES if strategy == "auto" else (strategy,)
    for sizes in meshes(topology.devices) if mesh is None else (mesh,):
        for name in names:
            try:
                plan = make_plan(
                    config, topology, load, mesh=sizes, strategy=name, dispatch=dispatch
                )
            except ValueError as error:
                problem = error
                continue
            key = (plan.weights, plan.cache, plan.collectives, plan.imbalance)
            found.setdefault(key, plan)
    if not found:
        raise ValueError(f"plan: no mesh of {topology} holds this model: {problem}") from problem
    return sorted(found.values(), key=rank)


def meshes(devices: int) -> Iterator[Mapping[str, int]]:
    """Every way to write ``devices`` as expert * tensor, without axes of size 1."""
    for expert in range(devices, 0, -1):
        if devices % expert == 0:
            sizes = {"expert": expert, "tensor": devices // expert}
            yield {axis: n for axis, n in sizes.items() if n > 1} or {"tensor": 1}


def propose(config: ModelConfig, topology: Topology, load: Load) -> Plan | None:
    """What fits where a plan does not: narrower weights or cache, then the next larger slice."""
    forms: list[str | None] = [load.quantization]
    if config.quantization is None and load.quantization is None:
        forms += list(FORMATS)
    for larger in _slices(topology):
        for form in forms:
            for kv in dict.fromkeys((load.kv_dtype, "int8")):
                wish = dataclasses.replace(load, quantization=form, kv_dtype=kv)
                try:
                    best = search(config, larger, wish)[0]
                except ValueError:  # nothing divides over so many devices
                    continue
                if best.fits:
                    return best
    return None


def _slices(topology: Topology) -> Iterator[Topology]:
    """The topology itself, then twice as many chips again and again, as square as may be."""
    shape = list(topology.shape)
    while True:
        yield dataclasses.replace(topology, shape=tuple(shape))
        smallest = shape.index(min(shape))
        shape[smallest] *= 2
        if topology.chip.platform == "gpu" and shape[0] > 8:
            return  # beyond one host of eight the links are others
        count = 1
        for n in shape:
            count *= n
        if count > _MOST_CHIPS:
            return
