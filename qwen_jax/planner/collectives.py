"""What devices must tell each other in a step, by arithmetic from the rules.

Knows where the model adds up or gathers over mesh axes (`moe`, `attention`, `step`); a test holds
the list equal to what XLA makes of small models.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np

from qwen_jax import expert_dispatch
from qwen_jax import sharding as sharding_lib
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of message of a step.

    Attributes:
        op: in XLA's words, "all-reduce", "all-gather", "reduce-scatter" …
        where: what it is for.
        bytes: of its whole result on each device, each time.
        count: times per step.
        ways: devices that take part.
        share: of the bytes that travel at all, where the rest is room for the worst case.
    """

    op: str
    where: str
    bytes: int
    count: int
    ways: int
    share: float = 1.0

    @property
    def sent(self) -> float:
        """Bytes that each device must send per step at least (ring or better)."""
        results = {"all-reduce": 2, "reduce-scatter": self.ways}.get(self.op, 1)
        return self.count * results * self.share * self.bytes * (self.ways - 1) / self.ways


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
    sparse = sum(map(text.is_moe, range(layers)))
    wanted = [
        ("all-reduce", "embedding", stream // split, 1, part("V")),
        ("all-reduce", "attention", stream // split, layers, part("N")),
        ("all-reduce", "rows", queries, layers, part("B")),
        ("all-reduce", "dense MLP", stream // split, layers - sparse, part("I")),
        ("all-gather", "logits", rows * text.vocab_size * 4, 1, part("V")),
        ("all-gather", "queries", queries, layers, split),
        ("all-gather", "keys", keys, 2 * layers, split),
    ]
    found = []
    for op, where, size, count, ways in wanted:
        if ways > 1 and count:
            found.append(Collective(op, where, size, count, ways))
    return found + (of_experts(config, runtime, runtime.dispatch, tokens) if sparse else [])


def of_experts(config: ModelConfig, runtime: Runtime, form: str, tokens: int) -> list[Collective]:
    """The collectives of all sparse layers of one step, in a form of `expert_dispatch`."""
    text = config.text
    given = {"tokens": tokens, "width": text.hidden_size, "dtype": runtime.dtype}
    where = {"mesh": runtime.mesh, "rules": runtime.rules}
    form = expert_dispatch.resolve(form, **where, **given)
    sparse = sum(map(text.is_moe, range(text.num_hidden_layers)))
    sent = expert_dispatch.messages(
        form, **where, **given, experts=text.num_experts, active=text.num_experts_per_tok
    )
    return [Collective(m.op, f"experts, {form}", m.bytes, sparse, m.ways, m.share) for m in sent]


def imbalance(config: ModelConfig, runtime: Runtime, tokens: int, *, draws: int = 256) -> float:
    """How much more expert weight the busiest device reads than the average one, at least 1.

    A uniform router is drawn ``draws`` times: what few tokens choose falls unevenly on devices.
    """
    experts, active = config.text.num_experts, config.text.num_experts_per_tok
    ways = sharding_lib.ways(runtime.mesh, runtime.rules.axes("E"))
    if not experts or ways == 1:
        return 1.0
    drawn = min(tokens, 8 * math.ceil(experts / active))  # by then all are in use
    return _imbalance(experts, active, ways, drawn, draws)


@functools.lru_cache(maxsize=256)
def _imbalance(experts: int, active: int, ways: int, tokens: int, draws: int) -> float:
    rng = np.random.default_rng(0)
    used = np.zeros((draws, experts), bool)
    for _ in range(tokens):
        chosen = rng.random((draws, experts)).argpartition(active, axis=1)[:, :active]
        np.put_along_axis(used, chosen, True, axis=1)
    per_device = used.reshape(draws, ways, -1).sum(-1)
    return float(per_device.max(-1).mean() / per_device.mean())
