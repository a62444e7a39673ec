"""A plan held against the compiler: temporaries and messages of the program that would run.

Knows plans and compiled steps; needs libtpu, and no TPU.
"""

import dataclasses
import math

from qwen_jax.planner.collectives import Collective
from qwen_jax.planner.compiled import Compiled, compile_step, topology_devices
from qwen_jax.planner.plan import Plan
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.requantize import requantized


def check(config: ModelConfig, plan: Plan) -> Plan:
    """The plan with temporaries, and decode's collectives, as compiled.

    Raises:
        ModuleNotFoundError: libtpu is missing.
        ValueError: the compiler knows no such topology.
    """
    decode, prefill = compile_plan(config, plan)
    counted = [
        Collective(op, "compiled program", size, count, plan.topology.devices)
        for (op, size), count in decode.collectives.items()
    ]
    return dataclasses.replace(
        plan,
        temporary=max(decode.temporary, prefill.temporary),
        collectives=tuple(sorted(counted, key=lambda c: -c.sent)),
        source="compiled",
    )


def compile_plan(config: ModelConfig, plan: Plan) -> tuple[Compiled, Compiled]:
    """The decode step of the whole batch, and a prefill chunk, as compiled for the topology."""
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
    width = math.ceil(load.context / load.page_size)
    given = {"pages": load.batch * width, "table_width": width}
    decode = compile_step(stored, runtime, tokens=load.batch, rows=load.batch, **given)
    prefill = compile_step(stored, runtime, tokens=load.chunk, rows=1, **given)
    return decode, prefill
