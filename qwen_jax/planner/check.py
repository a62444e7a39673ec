"""A plan held against the compiler: bytes and messages of the programs that would run.

Knows plans and compiled steps; needs libtpu, and no TPU.
"""

import dataclasses
import math
from collections.abc import Mapping

from qwen_jax.engine.capacity import weight_bytes
from qwen_jax.planner.collectives import Collective
from qwen_jax.planner.compiled import Compiled, compile_step, topology_devices
from qwen_jax.planner.plan import Plan
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.requantize import requantized


@dataclasses.dataclass(frozen=True)
class Checked:
    """A step as planned and as compiled. Bytes are per device.

    Attributes:
        arguments: planned: the weights that the step reads, without the vision tower, and cache.
        temporary: planned: besides.
        compiled: what the compiler says.
    """

    arguments: int
    temporary: int
    compiled: Compiled

    @property
    def peak(self) -> int:
        """As planned."""
        return self.arguments + self.temporary

    @property
    def off(self) -> float:
        """How much more is planned than compiled, as a share of the latter."""
        return self.peak / self.compiled.peak - 1


def check(config: ModelConfig, plan: Plan) -> Plan:
    """The plan with temporaries, and decode's collectives, as compiled.

    Raises:
        ModuleNotFoundError: libtpu is missing.
        ValueError: the compiler knows no such topology.
    """
    steps = {name: step.compiled for name, step in check_steps(config, plan).items()}
    counted = [
        Collective(op, "compiled program", size, count, plan.topology.devices)
        for (op, size), count in steps["decode"].collectives.items()
    ]
    return dataclasses.replace(
        plan,
        step_bytes={name: step.temporary for name, step in steps.items()},
        collectives=tuple(sorted(counted, key=lambda c: -c.sent)),
        source="compiled",
    )


def check_steps(config: ModelConfig, plan: Plan) -> Mapping[str, Checked]:
    """The decode step of the whole batch, and a prefill chunk, compiled for the topology.

    Raises:
        ModuleNotFoundError: libtpu is missing.
        ValueError: the compiler knows no such topology.
    """
    load = plan.load
    stored = requantized(config, load.quantization)
    runtime = Runtime.make(
        mesh=plan.mesh,
        strategy=plan.rules,
        dtype=load.dtype,
        kv_cache_dtype=load.kv_dtype,
        page_size=load.page_size,
        devices=topology_devices(plan.topology.jax_name),
        config=stored,
        dispatch=plan.dispatch,
    )
    read = weight_bytes(dataclasses.replace(stored, vision=None), runtime)
    width = math.ceil(load.context / load.page_size)
    found = {}
    for name, (tokens, rows) in load.steps.items():
        program = compile_step(
            stored, runtime, tokens=tokens, rows=rows, pages=load.batch * width, table_width=width
        )
        found[name] = Checked(read + plan.cache, plan.step_bytes[name], program)
    return found
