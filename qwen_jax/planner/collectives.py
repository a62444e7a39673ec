"""What devices must tell each other in a step, by arithmetic from the rules.

Knows where the model adds up or gathers over mesh axes (`moe`, `attention`, `step`); a test holds
the list equal to what XLA makes of small models.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from qwen_jax import sharding as sharding_lib
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.params import Mlp, table


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of message of a step.

    Attributes:
        op: "all-reduce" or "all-gather".
        where: what it is for.
        bytes: of its whole result on each device, each time.
        count: times per step.
        ways: devices that take part.
    """

    op: str
    where: str
    bytes: int
    count: int
    ways: int

    @property
    def sent(self) -> float:
        """Bytes that each device must send per step at least (ring or better)."""
        passes = 2 if self.op == "all-reduce" else 1
        return self.count * passes * self.bytes * (self.ways - 1) / self.ways


def of_step(config: ModelConfig, runtime: Runtime, *, tokens: int, rows: int) -> list[Collective]:
    """The collectives of one step of ``tokens`` tokens in ``rows`` rows."""
    text = config.text
    itemsize = jnp.dtype(runtime.dtype).itemsize

    def part(letters: str) -> int:
        axes = [axis for letter in letters for axis in runtime.rules.axes(letter)]
        return sharding_lib.ways(runtime.mesh, axes)

    split = part("T") if tokens % part("T") == 0 else 1
    stream = tokens * text.hidden_size * itemsize
    head = tokens * text.head_dim * itemsize
    queries = head * text.num_attention_heads // part("N")
    keys = head * max(1, text.num_key_value_heads // part("K"))
    layers = text.num_hidden_layers
    sparse = sum(not isinstance(layer.mlp, Mlp) for layer in table(config).layers)
    wanted = [
        ("all-reduce", "embedding", stream // split, 1, part("V")),
        ("all-reduce", "attention", stream // split, layers, part("N")),
        ("all-reduce", "rows", queries, layers, part("B")),
        # Partial sums of experts are added in float32.
        ("all-reduce", "experts", tokens * text.hidden_size * 4, sparse, part("EF")),
        ("all-reduce", "dense MLP", stream // split, layers - sparse, part("I")),
        ("all-gather", "logits", rows * text.vocab_size * 4, 1, part("V")),
        ("all-gather", "queries", queries, layers, split),
        ("all-gather", "keys", keys, 2 * layers, split),
        ("all-gather", "tokens for experts", stream, sparse, split),
    ]
    found = []
    for op, where, size, count, ways in wanted:
        if ways > 1 and count:
            found.append(Collective(op, where, size, count, ways))
    return found


def imbalance(config: ModelConfig, runtime: Runtime, tokens: int, *, draws: int = 256) -> float:
    """How much more expert weight the busiest device reads than the average one, at least 1.

    A uniform router is drawn ``draws`` times: what few tokens choose falls unevenly on devices.
    """
    experts, active = config.text.num_experts, config.text.num_experts_per_tok
    ways = sharding_lib.ways(runtime.mesh, runtime.rules.axes("E"))
    if not experts or ways == 1:
        return 1.0
    rng = np.random.default_rng(0)
    used = np.zeros((draws, experts), bool)
    for _ in range(min(tokens, 8 * math.ceil(experts / active))):  # by then all are in use
        chosen = rng.random((draws, experts)).argpartition(active, axis=1)[:, :active]
        np.put_along_axis(used, chosen, True, axis=1)
    per_device = used.reshape(draws, ways, -1).sum(-1)
    return float(per_device.max(-1).mean() / per_device.mean())
