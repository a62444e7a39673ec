"""Mixture of experts: route, sort by expert, expert matmuls, combine.

Knows which devices hold which experts; the matmuls over sorted rows are
`pallas_kernels.ragged_dot`. No expert has a capacity: every token reaches every expert it chose.

    token      0     1     2            rows sorted by expert
    experts   3,0   0,2   0,3    ->     0: t0 t1 t2 | 2: t1 | 3: t0 t2
                                        group_sizes = [3, 0, 1, 2]
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels.ragged_dot import ragged_dot
from qwen_jax import sharding as sharding_lib
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
) -> tuple[jax.Array, Routing]:
    """One sparse layer: [T, D] in, [T, D] out, zero for padding; and where its tokens went.

    Every device sees all tokens, computes the rows of the experts (and the slice of F) it holds,
    weighs and adds them up per token, and the partial sums are added over the devices.
    Source: transformers Qwen3MoeSparseMoeBlock.
    """
    mesh, rules = runtime.mesh, runtime.rules
    routing = route(weights.router, x_TD, is_token, config)
    axes = rules.axes("E") + rules.axes("F")

    def local(gate_up: Weight, down: Weight, x_TD, routing: Routing):
        first = sharding_lib.shard_index(mesh, rules.axes("E")) * gate_up.shape[0]
        out = _experts(gate_up, down, x_TD, routing, first, config, runtime)
        return sharding_lib.reduce_over(out, mesh, axes)

    replicated = PartitionSpec()
    out = sharding_lib.per_shard(
        local,
        mesh,
        in_specs=(
            _weight_spec(weights.gate_up, "E P D F", runtime),
            _weight_spec(weights.down, "E F D", runtime),
            replicated,
            replicated,
        ),
        out_specs=replicated,
    )(weights.gate_up, weights.down, x_TD, routing)
    return sharding_lib.constrain(out.astype(x_TD.dtype), "T D", mesh, rules), routing


def _experts(gate_up, down, x_TD, routing: Routing, first, config: TextConfig, runtime: Runtime):
    """Rows sorted by expert through the experts held here; float32 [T, D], a partial sum."""
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
