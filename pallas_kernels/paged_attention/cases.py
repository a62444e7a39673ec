"""Named real shapes of `paged_attention`: one list for tests, benchmarks and tuning.

Knows the published models' heads, typical batches and how caches are stored; knows no allocator and
no page contents.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.device import Device
from pallas_kernels.paged_attention import PagedOut, gpu, paged_attention, tpu, tpu_config
from pallas_kernels.paged_attention.facts import Facts
from pallas_kernels.program import Program, Refused, Tunable

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
KERNELS = {"tpu": tpu.IMPL, "gpu": gpu.IMPL}
# Shard: ways the heads are split.
SHARDS = {"whole": 1, "tp4": 4, "tp8": 8}
# The published models, and how their heads are split. Whole ones are rows' own, with many experts.
PUBLISHED = {
    "0.6B": ("whole",),
    "8B": ("whole", "tp4"),
    "30B-A3B": ("whole", "tp4", "tp8"),
    "235B-A22B": ("whole", "tp4", "tp8"),
    "480B-A35B": ("whole", "tp4", "tp8"),
}
# Form of the cache: its dtype, whether it has scales, and page sizes, the usual one first.
FORMS = {
    "bf16": ("bfloat16", False, (64, 16, 256)),
    "fp8": ("float8_e4m3fn", True, (128, 256)),
    "int8": ("int8", True, (128,)),
}
# Batch: new tokens of each row, context of each row including them.
BATCHES = {
    "decode-1": ((1,), (4096,)),
    "decode-8": ((1,) * 8, (1024,) * 8),
    "decode-32": ((1,) * 32, (1024,) * 32),
    "decode-128": ((1,) * 128, (1024,) * 128),
    "decode-256": ((1,) * 256, (1024,) * 256),
    "decode-64-ragged": ((1,) * 64, tuple(range(64, 64 * 65, 64))),
    "prefill-512": ((512,), (512,)),
    "prefill-2048": ((2048,), (2048,)),
    "prefill-8192": ((8192,), (8192,)),
    "chunk-512-of-8192": ((512,), (8192,)),
    "mixed": ((1,) * 31 + (480,), (1024,) * 31 + (480,)),
}
OF_EVERY_SIZE = ("decode-32", "prefill-2048", "mixed")  # not only with pages of the usual size


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, on one device."""

    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    new_tokens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    def facts(self, kv_dtype: str, scaled: bool, page_size: int) -> Facts:
        """As one device would be told; bfloat16 queries."""
        heads = self.query_heads, self.kv_heads, self.head_dim
        return Facts(*heads, page_size, "bfloat16", kv_dtype, scaled)

    def pages_per_row(self, page_size: int) -> int:
        """Width of the page table."""
        return -(-max(self.kv_lens) // page_size)


def cases(model: str, tensor_ways: int = 1) -> Iterator[Case]:
    """Every batch of `BATCHES` with one shard of a model's heads.

    Args:
        model: a key of `MODELS`.
        tensor_ways: over how many devices the heads are split; each keeps one kv head at least.
    """
    N, K, H = MODELS[model]
    for batch, (new_tokens, kv_lens) in BATCHES.items():
        name = f"{model}/{'whole' if tensor_ways == 1 else f'tp{tensor_ways}'}/{batch}"
        yield Case(name, N // tensor_ways, max(1, K // tensor_ways), H, new_tokens, kv_lens)


def programs(device: Device) -> Iterator[Program]:
    """Every case of the published models that the device's kernel supports, in every form."""
    for name, case, facts, reason in _calls(device):
        if reason is None:
            yield _program(name, case, facts, device)


def refused(device: Device) -> Iterator[Refused]:
    """Those that it does not support."""
    for name, _, _, reason in _calls(device):
        if reason is not None:
            yield Refused(name, reason)


def _calls(device: Device) -> Iterator[tuple[str, Case, Facts, str | None]]:
    """Every case in every form, and why the device's kernel does not take it."""
    if device.platform not in KERNELS:
        return
    supports = KERNELS[device.platform].supports
    forms = [
        (form, *how, size, size == sizes[0])
        for form, (*how, sizes) in FORMS.items()
        for size in sizes
    ]
    for model, shards in PUBLISHED.items():
        for case in (case for shard in shards for case in cases(model, SHARDS[shard])):
            for form, kv_dtype, scaled, page_size, usual in forms:
                if usual or case.name.endswith(OF_EVERY_SIZE):
                    facts = case.facts(kv_dtype, scaled, page_size)
                    name = f"paged_attention/{case.name}/{form}/page-{page_size}"
                    yield name, case, facts, supports(device, facts)


def _program(name: str, case: Case, facts: Facts, device: Device) -> Program:
    B, T, W = len(case.kv_lens), sum(case.new_tokens), case.pages_per_row(facts.page_size)
    N, K, H = case.query_heads, case.kv_heads, case.head_dim
    spec = jax.ShapeDtypeStruct
    new = spec((T, K, H), jnp.bfloat16)
    pages = spec((B * W, facts.page_size, 2 * K, H), facts.kv_dtype)
    scales = spec((B * W, 2 * K, facts.page_size), jnp.float32) if facts.scaled else None
    ints = [spec(shape, jnp.int32) for shape in ((B + 1,), (B,), (B, W))]
    args = (spec((T, N, H), jnp.bfloat16), new, new, pages, scales, *ints)

    def call(impl, q, k, v, pages, scales, row_starts, kv_lens, page_table):
        rows = {"row_starts": row_starts, "kv_lens": kv_lens, "page_table": page_table}
        return paged_attention(q, k, v, pages, **rows, sm_scale=H**-0.5, scales=scales, impl=impl)

    per_position = 2 * K * (H * pages.dtype.itemsize + (4 if facts.scaled else 0))
    pairs = sum(n * (s - (n - 1) / 2) for n, s in zip(case.new_tokens, case.kv_lens, strict=True))
    # Queries and results, and the new keys and values in and out.
    own = T * (4 * N * H + 2 * per_position)
    moved = sum(case.kv_lens) * per_position + own
    copied, trips = moved, ()
    if device.platform == "tpu":
        lengths = case.new_tokens, case.kv_lens
        read, trips = tpu.walk_lengths(facts, *lengths, device)
        copied = read * per_position + own
    return Program(
        name,
        functools.partial(call, device.platform),
        args,
        make=functools.partial(_make, case, args),
        moved=moved,
        flops=4 * pairs * N * H,
        copied=copied,
        trips=trips,
        baselines={"xla": functools.partial(call, "xla"), **_dense(case, device)},
        carried={3: "pages"} | ({4: "scales"} if facts.scaled else {}),
        tunable=_tunable(facts, T <= B) if device.platform == "tpu" else None,
    )


def _tunable(facts: Facts, decode: bool) -> Tunable:
    def with_tiles(tiles):
        def call(q, k, v, pages, scales, row_starts, kv_lens, page_table):
            rows = {"row_starts": row_starts, "kv_lens": kv_lens, "page_table": page_table}
            scale, config = facts.head_dim**-0.5, tpu_config.Config(**tiles)
            return tpu.paged_attention(
                q, k, v, pages, scales, **rows, sm_scale=scale, config=config
            )

        return call

    tiles = map(dataclasses.asdict, tpu_config.candidates(facts, decode))
    return Tunable(tpu_config.key(facts, decode), tuple(tiles), with_tiles)


def _dense(case: Case, device: Device) -> dict:
    """cuDNN's causal attention over the new keys, where those are all there are."""
    if device.platform != "gpu" or case.new_tokens != case.kv_lens or len(case.kv_lens) > 1:
        return {}

    def cudnn(q, k, v, pages, scales, *_):
        one = (x[None] for x in (q, k, v))
        how = {"scale": case.head_dim**-0.5, "is_causal": True, "implementation": "cudnn"}
        return PagedOut(jax.nn.dot_product_attention(*one, **how)[0], pages, scales)

    return {"cudnn": cudnn}


def _make(case: Case, args, seed: int) -> tuple:
    """Random tokens over a random cache whose pages are handed out in shuffled order."""
    keys = iter(jax.random.split(jax.random.key(seed), len(args)))

    def one(spec):
        drawn = jax.random.normal(next(keys), spec.shape, jnp.bfloat16)
        return (drawn * (32 if spec.dtype == jnp.int8 else 1)).astype(spec.dtype)

    q, k, v, pages, scales = (None if x is None else one(x) for x in args[:5])
    starts = np.concatenate([[0], np.cumsum(case.new_tokens)]).astype(np.int32)
    table = np.random.default_rng(seed).permutation(args[3].shape[0]).astype(np.int32)
    ints = (starts, np.asarray(case.kv_lens, np.int32), table.reshape(args[7].shape))
    scales = None if scales is None else jnp.abs(scales)
    return (q, k, v, pages, scales, *map(jnp.asarray, ints))
