"""Mixture of experts: route, sort by expert, expert matmuls, combine.

Knows which devices hold which experts; the matmuls over sorted rows are
`pallas_kernels.ragged_dot`. No expert has a capacity: every token reaches every expert it chose.

    token      0     1     2            rows sorted by expert
    experts   3,0   0,2   0,3    ->     0: t0 t1 t2 | 2: t1 | 3: t0 t2
                                        group_sizes = [3, 0, 1, 2]
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.ragged_dot import ragged_dot
from qwen_jax import sharding as sharding_lib
from qwen_jax.model import dispatch
from qwen_jax.model.routing import Routing, route
from qwen_jax.runtime import Runtime
from qwen_jax.weights import quant
from qwen_jax.weights.config import TextConfig
from qwen_jax.weights.params import Mlp, Moe
from qwen_jax.weights.quant import QArray, Weight


def mlp(weights: Mlp, x_TD: jax.Array) -> jax.Array:
    """A dense gated MLP. Source: transformers Qwen3MoeMLP."""
    gate_up = quant.einsum("TD,DPI->TPI", x_TD, weights.gate_up)
    hidden = jax.nn.silu(gate_up[:, 0]) * gate_up[:, 1]
    return quant.einsum("TI,ID->TD", hidden, weights.down)


def moe(
    weights: Moe, x_TD: jax.Array, is_token: jax.Array, config: TextConfig, runtime: Runtime
) -> tuple[jax.Array, Routing, jax.Array]:
    """One sparse layer: [T, D] in, [T, D] out, zero for padding; and what `route` returns.

    How tokens and experts come together over devices is the form of `dispatch` that the runtime
    names. Source: transformers Qwen3MoeSparseMoeBlock.
    """
    mesh, rules = runtime.mesh, dispatch.router_rules(runtime, *x_TD.shape)
    x_TD = sharding_lib.constrain(x_TD, "T D", mesh, rules)
    routing, shares_TR = _route_where_they_are(weights.router, x_TD, is_token, config, mesh, rules)
    out = dispatch.run(
        partial(_experts, config=config, runtime=runtime),
        (weights.gate_up, weights.down),
        x_TD,
        routing,
        specs=(
            _weight_spec(weights.gate_up, "E P D F", runtime),
            _weight_spec(weights.down, "E F D", runtime),
        ),
        num_experts=config.num_experts,
        runtime=runtime,
    )
    return out, routing, shares_TR


def _route_where_they_are(router, x_TD, is_token, config: TextConfig, mesh, rules):
    """`route`, with tokens left on the devices of T: XLA would gather all logits for top-k."""
    rules = sharding_lib.for_tokens(rules, mesh, x_TD.shape[0])
    split, rows = (sharding_lib.spec(dims, mesh, rules) for dims in ("T", "T ."))
    here = sharding_lib.per_shard(
        partial(route, config=config),
        mesh,
        in_specs=(PartitionSpec(), rows, split),
        out_specs=rows,
    )
    return here(router, x_TD, is_token)


def _experts(
    weights, first, x_TD, routing: Routing, *, config: TextConfig, runtime: Runtime
) -> jax.Array:
    """Rows sorted by expert through the experts held here; float32 [T, D], a partial sum."""
    gate_up, down = weights
    tokens, active = routing.experts.shape
    chosen = routing.experts.reshape(-1)
    order = jnp.argsort(chosen, stable=True)
    group_sizes = jnp.bincount(chosen, length=config.num_experts)
    impl = runtime.kernel("ragged_dot")

    def dot(x, w: Weight, activation=None, out_dtype=None):
        values, scale, blocks = (
            (w.values, w.scale, w.blocks) if isinstance(w, QArray) else (w, None, None)
        )
        return ragged_dot(
            x,
            values,
            group_sizes,
            scale=scale,
            blocks=blocks,
            activation=activation,
            first_expert=first,
            impl=impl,
            out_dtype=out_dtype,
        )

    hidden_MF = dot(x_TD[order // active], gate_up, activation="swiglu")
    out_MD = dot(hidden_MF, down, out_dtype=jnp.float32)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(order.size), unique_indices=True)
    out_TAD = out_MD[back].reshape(tokens, active, -1)
    return jnp.einsum("TAD,TA->TD", out_TAD, routing.weights, precision="highest")


def _weight_spec(w: Weight, dims: str, runtime: Runtime):
    """How `per_shard` sees a weight; scales follow the values, but a single one stays whole."""
    spec = sharding_lib.spec(dims, runtime.mesh, runtime.rules)
    if not isinstance(w, QArray):
        return spec
    scale = [axes if n > 1 else None for axes, n in zip(spec, w.scale.shape, strict=True)]
    return QArray(spec, PartitionSpec(*scale), w.blocks)
