"""Times the forms of expert dispatch against each other: one sparse layer, on the devices here.

    python scripts/bench_dispatch.py --mesh expert=8 --strategy ep --tokens 8 2048
    XLA_FLAGS=--xla_force_host_platform_device_count=8 python scripts/bench_dispatch.py

A line for each number of tokens and form: milliseconds (the best of several runs), bytes that a
device sends as planned, and the collectives of the compiled program. A form that cannot run here
says why. Virtual CPU devices show that it works and what is sent, not what links would take.
"""

import argparse
import dataclasses
import sys
import time

import jax
import jax.numpy as jnp

from qwen_jax import sharding
from qwen_jax.expert_dispatch import FORMS
from qwen_jax.model.moe import moe
from qwen_jax.planner.collectives import of_experts
from qwen_jax.planner.program_text import collectives_of
from qwen_jax.runtime import Runtime
from qwen_jax.weights import derive, presets


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="Qwen3-30B-A3B", help="a preset's name")
    parser.add_argument("--mesh", default="auto")
    parser.add_argument("--strategy", default="ep")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8, 2048])
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args(argv)
    whole = presets.preset(args.model)
    # Embedding and head are not timed, and whole on every device they would fill a host's memory.
    text = dataclasses.replace(whole.text, num_hidden_layers=1, vocab_size=64)
    config = dataclasses.replace(whole, vision=None, text=text)
    print(f"{'tokens':>8} {'form':18} {'ms':>9} {'MB sent':>9}  collectives")
    weights = None
    for tokens in args.tokens:
        for form in FORMS:
            try:
                runtime = Runtime.make(
                    mesh=args.mesh,
                    strategy=args.strategy,
                    dtype=args.dtype,
                    dispatch=form,
                    config=config,
                )
            except ValueError as error:
                print(f"{tokens:8} {form:18} {error}")
                continue
            if weights is None:
                params = derive.init(config, 0, runtime.dtype, runtime.mesh, runtime.rules)
                weights = params.layers[0].mlp
            print(f"{tokens:8} {form:18} {line(config, runtime, weights, tokens, args.repeat)}")


def line(config, runtime: Runtime, weights, tokens: int, repeat: int) -> str:
    """Time, planned bytes and compiled collectives of one form."""

    def layer(weights, x):
        is_token = jnp.ones(tokens, bool)
        x = sharding.constrain(x, "T D", runtime.mesh, runtime.rules)
        return moe(weights, x, is_token, config.text, runtime)[0]

    x = jax.random.normal(jax.random.key(0), (tokens, config.text.hidden_size), runtime.dtype)
    program = jax.jit(layer).lower(weights, x).compile()
    x = jax.device_put(x, program.input_shardings[0][1])
    best = min(timed(program, weights, x) for _ in range(repeat + 1))
    sent = sum(c.sent for c in of_experts(config, runtime, runtime.dispatch, tokens))
    found = ", ".join(f"{n} x {op}" for (op, _), n in collectives_of(program.as_text()).items())
    return f"{best * 1e3:9.2f} {sent / 1e6:9.3f}  {found}"


def timed(program, *given) -> float:
    """Seconds of one run."""
    begun = time.perf_counter()
    program(*given).block_until_ready()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main(sys.argv[1:])
