"""The attention kernels compiled for TPUs that are not here; skipped without libtpu (extra "aot").

What compiles is what would run: memory that does not fit, misaligned copies and copies of the cache
all show here. `scripts/compile_kernels.py` compiles every shape; these are samples.
"""

import importlib.util
import os
import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from pallas_kernels.device import Device
from pallas_kernels.paged_attention import cases as paged_cases
from pallas_kernels.segment_attention import cases as segment_cases
from qwen_jax.model.cache import abstract_cache
from qwen_jax.planner.compiled import lower_step
from qwen_jax.runtime import Runtime
from qwen_jax.weights import presets

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu to compile for a TPU"
)
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "v7x": "tpu7x:2x2x1"}


@pytest.fixture(scope="module")
def devices():
    """A function from a chip's name to the devices of a topology of four."""
    from jax.experimental import topologies

    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in wanted.items():
            patch.setitem(os.environ, name, value)
        yield (
            lambda chip: (
                topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[chip]).devices
            )
        )


def copies_of(text: str, shapes) -> list[str]:
    """Lines of a compiled program that copy or transpose an array of one of these shapes."""
    found = []
    for shape in shapes:
        dims = ",".join(map(str, shape))
        moved = re.compile(rf"= \S*\[{dims}\]\S* (copy|copy-start|transpose|fusion)\(")
        found += [line.strip() for line in text.splitlines() if moved.search(line)]
    return found


SAMPLES = [
    ("v5e", "30B-A3B/whole/decode-8/bf16/page-64"),
    ("v5p", "480B-A35B/tp8/chunk-512-of-8192/bf16/page-64"),
    ("v6e", "30B-A3B/whole/mixed/fp8/page-128"),
    ("v7x", "235B-A22B/whole/decode-32/int8/page-128"),
]


@pytest.mark.parametrize(("chip", "name"), SAMPLES)
def test_paged_attention_compiles_and_updates_the_cache_in_place(chip, name, devices):
    device = devices(chip)[0]
    (program,) = (p for p in paged_cases.programs(Device.of(device)) if p.name.endswith(name))
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    args = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), program.args
    )
    with jax.set_mesh(mesh):
        exe = jax.jit(program.fn, donate_argnums=(3, 4)).lower(*args).compile()
    cache = [x for x in args[3:5] if x is not None]
    assert not copies_of(exe.as_text(), [x.shape for x in cache])
    in_place = sum(x.size * x.dtype.itemsize for x in cache)
    assert exe.memory_analysis().alias_size_in_bytes >= in_place


@pytest.mark.parametrize("name", ["1024/heads-16x64", "4096/heads-16x72"])
def test_segment_attention_compiles_without_an_array_of_all_pairs(name, devices):
    device = devices("v6e")[0]
    (program,) = (p for p in segment_cases.programs(Device.of(device)) if p.name.endswith(name))
    mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
    place = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in program.args]
    with jax.set_mesh(mesh):
        exe = jax.jit(program.fn).lower(*args).compile()
    U, N, _ = args[0].shape
    pairs = N * U * U * 2
    assert exe.memory_analysis().temp_size_in_bytes < max(pairs / 4, 8 * args[0].size * 2)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "fp8"])
def test_a_decode_step_of_a_30b_on_four_chips_copies_no_cache(kv_dtype, devices):
    config = presets.preset("Qwen/Qwen3-30B-A3B")
    text = config.text.__class__(**{**vars(config.text), "num_hidden_layers": 2})
    config = config.__class__(**{**vars(config), "text": text})
    runtime = Runtime.make(
        mesh="tensor=4",
        strategy="tp" if kv_dtype == "bfloat16" else "ep",
        kv_cache_dtype=kv_dtype,
        page_size=64 if kv_dtype == "bfloat16" else 128,
        kernels={"paged_attention": "tpu", "ragged_dot": "xla"},
        devices=devices("v6e"),
        config=config,
    )
    sizes = {"tokens": 8, "rows": 8, "pages": 4096, "table_width": 4096 // runtime.page_size}
    exe = lower_step(config, runtime, **sizes).compile()
    stored = jax.tree.leaves(abstract_cache(config.text, runtime, sizes["pages"]))
    local = [x.sharding.shard_shape(x.shape) for x in stored]
    program = exe.as_text()
    assert program.count('custom_call_target="tpu_custom_call"') >= config.text.num_hidden_layers
    assert not copies_of(program, local)
    in_place = sum(int(np.prod(s)) * x.dtype.itemsize for s, x in zip(local, stored, strict=True))
    assert exe.memory_analysis().alias_size_in_bytes >= in_place
