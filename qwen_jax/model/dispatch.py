"""Tokens to their experts and sums back, inside one `shard_map`; the forms of `expert_dispatch`.

Knows which devices hold which experts, and collectives; what an expert computes is given as a
function. An all-to-all in pictures: two devices with two tokens and two experts each, A = 2

    device 0   t0 -> 0,1    t1 -> 1,3        sends itself [t0 t1], device 1 [t1 .]
    device 1   t2 -> 3,0    t3 -> 2,3        sends device 0 [t2 .], itself [t2 t3]
    device 0 got [t0 t1 | t2 .], runs experts 0 and 1, and sends the weighed sums back likewise

A token goes to a device once, however many of its experts are there. Every sender has a slot of
T / n rows at every receiver, so nothing can overflow, and nobody asks where its rows begin.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from qwen_jax import sharding as sharding_lib
from qwen_jax.model.routing import Routing
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import Rules

Experts = Callable[[Any, jax.Array | int, jax.Array, Routing], jax.Array]


def router_rules(runtime: Runtime, tokens: int, width: int) -> Rules:
    """How the stream lies where a layer routes it: split only if tokens travel one by one."""
    rules, mesh = runtime.rules, runtime.mesh
    ways = sharding_lib.ways(mesh, rules.axes("E") + rules.axes("F"))
    travels = runtime.dispatch_of(tokens, width).endswith("all-to-all")
    return rules if travels and tokens % ways == 0 else rules.replicate("T")


def run(
    experts: Experts,
    weights: tuple[Any, ...],
    x_TD: jax.Array,
    routing: Routing,
    *,
    specs: tuple[Any, ...],
    num_experts: int,
    runtime: Runtime,
) -> jax.Array:
    """Each token's weighed sum over its experts: [T, D] in x's dtype.

    Args:
        experts: (weights of this device, its first expert, [T, D], routing) -> float32 [T, D], the
            weighed sums over the experts here, a slice of their hidden width if rules split F.
        weights: expert weights, with E in front.
        x_TD: the stream, laid out by `router_rules`.
        routing: of all tokens.
        specs: the partitions of ``weights``.
        num_experts: R.
        runtime: where everything lies, and the form.
    """
    mesh, owners, hidden = runtime.mesh, runtime.rules.axes("E"), runtime.rules.axes("F")
    form = runtime.dispatch_of(*x_TD.shape)
    whole, ways = form == "all-reduce", sharding_lib.ways(mesh, owners + hidden)
    given = _over(mesh, owners) if form.endswith("all-to-all") else PartitionSpec()
    tokens, more = x_TD.shape[0], 0 if whole else -x_TD.shape[0] % ways
    if more:
        x_TD, routing = _padded(x_TD, routing, more, num_experts)

    def local(weights, x, routing: Routing):
        per_device = num_experts // sharding_lib.ways(mesh, owners)
        first = sharding_lib.shard_index(mesh, owners) * per_device
        here = partial(experts, weights, first)
        if whole:
            out = sharding_lib.reduce_over(here(x, routing), mesh, owners + hidden)
        elif form == "reduce-scatter":
            out = sharding_lib.scatter_over(here(x, routing), mesh, owners + hidden)
        else:
            send = _ragged if form.startswith("ragged") else _equal
            out = _there_and_back(here, x, routing, send, num_experts, mesh, owners)
            out = sharding_lib.scatter_over(out, mesh, hidden)
        return out.astype(x.dtype)

    kept = PartitionSpec() if whole else _over(mesh, owners + hidden)
    out = sharding_lib.per_shard(local, mesh, (specs, given, PartitionSpec()), kept)(
        weights, x_TD, routing
    )
    if more:  # whole before and after: a cut through split rows would move them one by one
        out = sharding_lib.constrain(out, ". .", mesh, runtime.rules)[:tokens]
        out = sharding_lib.constrain(out, ". .", mesh, runtime.rules)
    return sharding_lib.constrain(out, "T D", mesh, runtime.rules)


def _over(mesh: Mesh, axes: Sequence[str]) -> PartitionSpec:
    return PartitionSpec(sharding_lib.live(mesh, axes) or None)


def _padded(x_TD: jax.Array, routing: Routing, more: int, num_experts: int):
    """So many tokens added, so that devices split them evenly; they go to no expert."""
    rows = ((0, more), (0, 0))
    experts = jnp.pad(routing.experts, rows, constant_values=num_experts)
    return jnp.pad(x_TD, rows), Routing(experts, jnp.pad(routing.weights, rows))


def _there_and_back(here, x_UD, routing: Routing, send, num_experts: int, mesh: Mesh, owners):
    """Of the U tokens of this device: float32 [U, D]. Sums travel in x's dtype."""
    n, me = sharding_lib.ways(mesh, owners), sharding_lib.shard_index(mesh, owners)
    axes = sharding_lib.live(mesh, owners)
    owner_TA = routing.experts // (num_experts // n)  # n for padding
    goes = jnp.any(owner_TA[:, :, None] == jnp.arange(n), axis=1)
    goes = goes.reshape(n, -1, n)  # [device it is on, its place there, device it goes to]
    counts = jnp.sum(goes, axis=1, dtype=jnp.int32)
    leaves, comes = goes[me].T, goes[:, :, me]  # [to, U], [from, U]
    exchange = partial(send, me=me, axes=axes)

    rows = exchange(x_UD[_packed(leaves)], counts[me], counts[:, me])
    out_TD = here(_unpacked(rows, comes).reshape(-1, x_UD.shape[1]), routing)
    sums = out_TD.reshape(rows.shape).astype(x_UD.dtype)
    sums = jnp.take_along_axis(sums, _packed(comes)[:, :, None], axis=1)
    back = _unpacked(exchange(sums, counts[:, me], counts[me]), leaves)
    return jnp.sum(jnp.where(leaves[:, :, None], back, 0), axis=0, dtype=jnp.float32)


def _packed(goes: jax.Array) -> jax.Array:
    """[n, U] -> int32 [n, U]: the tokens that go, then the others."""
    return jnp.argsort(~goes, axis=1, stable=True)


def _unpacked(rows: jax.Array, goes: jax.Array) -> jax.Array:
    """Rows [n, U, D] in the order of `_packed`, each at its token; any row where none went."""
    at = jnp.maximum(jnp.cumsum(goes, axis=1) - 1, 0)
    return jnp.take_along_axis(rows, at[:, :, None], axis=1)


def _equal(rows: jax.Array, sent: jax.Array, got: jax.Array, *, me, axes) -> jax.Array:
    """Slot j of [n, U, D] to device j; whole slots travel."""
    del sent, got, me
    return jax.lax.all_to_all(rows, axes, split_axis=0, concat_axis=0, tiled=True)


def _ragged(rows: jax.Array, sent: jax.Array, got: jax.Array, *, me, axes) -> jax.Array:
    """The first ``sent[j]`` rows of slot j to device j, which gets them in slot ``me``."""
    n, each, width = rows.shape
    starts = jnp.arange(n, dtype=jnp.int32) * each
    flat = rows.reshape(n * each, width)
    mine = jnp.full(n, me * each, jnp.int32)
    out = jax.lax.ragged_all_to_all(
        flat, jnp.zeros_like(flat), starts, sent, mine, got, axis_name=axes
    )
    return out.reshape(rows.shape)
