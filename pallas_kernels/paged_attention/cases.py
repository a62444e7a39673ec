"""Named real shapes of `paged_attention`: one list for tests, benchmarks and tuning.

Knows the published models' heads and typical batches; knows no allocator and no page contents.
"""

import dataclasses
from collections.abc import Iterator

# Model: query heads N, key/value heads K, head dimension H.
MODELS = {
    "0.6B": (16, 8, 128),
    "8B": (32, 8, 128),
    "30B-A3B": (32, 4, 128),
    "235B-A22B": (64, 4, 128),
    "480B-A35B": (96, 8, 128),
    # The random model that the CPU benchmark times beside transformers.
    "cpu-bench": (16, 4, 64),
}
# Batch: new tokens of each row, context of each row including them.
BATCHES = {
    "decode-1": ((1,), (512,)),
    "decode-8": ((1,) * 8, (512,) * 8),
    "decode-64-ragged": ((1,) * 64, tuple(range(64, 64 * 65, 64))),
    "prefill-512": ((512,), (512,)),
    "prefill-8192": ((8192,), (8192,)),
    "chunk-512-of-8192": ((512,), (8192,)),
    "mixed": ((1,) * 31 + (480,), (1024,) * 31 + (480,)),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, on one device."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    new_tokens: tuple[int, ...]
    kv_lens: tuple[int, ...]


def cases(model: str, tensor_ways: int = 1) -> Iterator[Case]:
    """Every batch of `BATCHES` with one shard of a model's heads.

    Args:
        model: a key of `MODELS`.
        tensor_ways: over how many devices the heads are split; each keeps one kv head at least.
    """
    N, K, H = MODELS[model]
    for batch, (new_tokens, kv_lens) in BATCHES.items():
        name = f"{model}/tp{tensor_ways}/{batch}"
        yield Case(name, N // tensor_ways, max(1, K // tensor_ways), H, new_tokens, kv_lens)
