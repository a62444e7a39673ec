"""Named real shapes of `ragged_dot`: one list for tests, benchmarks and tuning.

Knows the published models' expert sizes and how strategies cut them; knows no checkpoint and no
weights.
"""

import dataclasses
from collections.abc import Iterator

# Model: width D, hidden width F of an expert, experts R, experts per token A.
MODELS = {
    "30B-A3B": (2048, 768, 128, 8),
    "235B-A22B": (4096, 1536, 128, 8),
    "480B-A35B": (6144, 2560, 160, 8),
    # The random model that the CPU benchmark times beside transformers.
    "cpu-bench": (1024, 256, 64, 8),
}
DECODE_TOKENS = (1, 8, 32, 128, 256)
PREFILL_TOKENS = (512, 2048, 8192)
# Shard: ways the experts are split, ways each expert's F is split.
SHARDS = {"whole": (1, 1), "ep8": (8, 1), "tp4": (1, 4)}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: x [rows, inner] times w [experts, inner, (2,) outer], routed over ``total``."""

    name: str
    rows: int
    inner: int
    outer: int
    experts: int
    total: int
    activation: str | None

    @property
    def w_shape(self) -> tuple[int, ...]:
        """Shape of w."""
        pair = (2,) if self.activation else ()
        return (self.experts, *pair, self.inner, self.outer)


def cases(model: str, shard: str = "whole") -> Iterator[Case]:
    """Every decode and prefill size of a model's two expert products, as one shard sees them.

    Args:
        model: a key of `MODELS`.
        shard: a key of `SHARDS`.
    """
    D, F, R, A = MODELS[model]
    expert_ways, hidden_ways = SHARDS[shard]
    E, F = R // expert_ways, F // hidden_ways
    kinds = [("decode", t) for t in DECODE_TOKENS] + [("prefill", t) for t in PREFILL_TOKENS]
    for kind, tokens in kinds:
        name = f"{model}/{shard}/{kind}-{tokens}"
        yield Case(f"{name}/gate_up", tokens * A, D, F, E, R, "swiglu")
        yield Case(f"{name}/down", tokens * A, F, D, E, R, None)
