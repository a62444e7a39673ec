"""Choosing implementations: names, preference, reasons and errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import registry
from pallas_kernels.device import Device, tpu_info
from pallas_kernels.paged_attention import paged_attention
from pallas_kernels.ragged_dot import ragged_dot
from pallas_kernels.segment_attention import segment_attention

OPS = ("ragged_dot", "paged_attention", "segment_attention")
CPU, GPU, TPU = Device("cpu", "cpu"), Device("gpu", "NVIDIA H200"), Device("tpu", "TPU v6 lite")


@pytest.fixture
def op(monkeypatch):
    """An operation with a GPU kernel for D % 64 == 0, preferred to an implementation for all.

    Its facts are D alone.
    """
    monkeypatch.setattr(registry, "_IMPLS", {})
    needs_64 = lambda device, D: None if D % 64 == 0 else f"D={D} is no multiple of 64"
    anything = lambda device, D: None
    registry.register(registry.Impl("f", "gpu", "gpu", needs_64, lambda: "kernel"))
    registry.register(registry.Impl("f", "xla", None, anything, lambda: "reference"))
    return "f"


def test_auto_takes_the_first_that_can_run(op):
    choice = registry.choose(op, "auto", GPU, [128])
    assert choice == registry.Choice("gpu", {})


def test_auto_keeps_the_reason_of_each_one_passed_over(op):
    choice = registry.choose(op, "auto", GPU, [128, 100])
    assert choice.name == "xla"
    assert choice.reasons == {"gpu": "D=100 is no multiple of 64"}


def test_another_platform_is_a_reason(op):
    choice = registry.choose(op, "auto", CPU, [128])
    assert choice.name == "xla"
    assert choice.reasons == {"gpu": "it runs on gpu, this is cpu"}


def test_a_named_one_is_taken_though_another_is_preferred(op):
    assert registry.choose(op, "xla", GPU, [128]) == registry.Choice("xla", {})


def test_a_named_one_that_cannot_run_raises_with_the_reason_and_what_can(op):
    with pytest.raises(ValueError, match=r"'gpu' cannot run here: D=100.*these can: \['xla'\]"):
        registry.choose(op, "gpu", GPU, [128, 100])


def test_the_function_of_a_name_is_given_where_it_can_run(op):
    assert registry.runnable(op, "gpu", GPU, [128])() == "kernel"
    with pytest.raises(ValueError, match=r"'gpu' cannot run here: D=100.*these can: \['xla'\]"):
        registry.runnable(op, "gpu", GPU, [100])
    with pytest.raises(ValueError, match=r"'gpu' cannot run here: it runs on gpu, this is tpu"):
        registry.runnable(op, "gpu", TPU, [128])


@pytest.mark.parametrize("impl", ["tpu", "gpu"])
def test_every_operation_refuses_a_kernel_that_cannot_run_here(impl):
    x, sizes = np.ones((8, 128), "bfloat16"), np.asarray([8], np.int32)
    heads, pages = x.reshape(8, 1, 128), np.ones((1, 16, 2, 128), "bfloat16")
    rows = {"row_starts": np.asarray([0, 8]), "kv_lens": sizes, "page_table": np.zeros((1, 1))}
    refused = pytest.raises(ValueError, match=f"'{impl}' cannot run here: it runs on {impl}, this")
    with refused:
        ragged_dot(x, np.ones((1, 128, 128), "bfloat16"), sizes, impl=impl)
    with refused:
        paged_attention(heads, heads, heads, pages, **rows, sm_scale=1.0, impl=impl)
    with refused:
        starts = jnp.asarray([0, 8])
        segment_attention(heads, heads, heads, segment_starts=starts, sm_scale=1.0, impl=impl)


def test_auto_raises_with_every_reason_when_nothing_can_run(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLS", {})
    registry.register(registry.Impl("g", "tpu", "tpu", lambda *_: None, lambda: None))
    registry.register(registry.Impl("g", "gpu", None, lambda *_: "too old", lambda: None))
    with pytest.raises(ValueError, match=r"'tpu': 'it runs on tpu.*'gpu': 'too old'"):
        registry.choose("g", "auto", CPU, [1])


def test_an_unknown_name_or_operation_raises_with_those_there_are(op):
    with pytest.raises(ValueError, match=r"no implementation 'tpu'; use one of \['gpu', 'xla'\]"):
        registry.choose(op, "tpu", CPU, [1])
    with pytest.raises(ValueError, match=r"operation 'nope' is unknown; there are \['f'\]"):
        registry.choose("nope", "auto", CPU)


def test_a_name_registers_once(op):
    with pytest.raises(ValueError, match="'xla' is registered already"):
        registry.register(registry.Impl("f", "xla", None, lambda *_: None, lambda: None))


def test_without_facts_only_what_runs_anything_is_taken(op):
    choice = registry.choose(op, "auto", GPU)
    assert choice == registry.Choice("xla", {"gpu": registry.UNKNOWN})
    with pytest.raises(ValueError, match=r"'gpu' cannot run here: nothing is known of the model"):
        registry.choose(op, "gpu", GPU)


def test_an_operation_that_a_model_never_uses_refuses_nothing(op):
    assert registry.choose(op, "auto", GPU, []).name == "gpu"


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("device", [CPU, GPU, TPU])
def test_xla_runs_every_operation_on_every_device(name, device):
    assert registry.choose(name, "xla", device).name == "xla"
    own = [n for n in registry.names(name) if n in ("tpu", "gpu", "xla")]  # the demo adds "train"
    assert own == ["tpu", "gpu", "xla"], "the fallback stands behind the kernels"


def test_a_tpu_that_is_not_here_has_its_own_figures():
    mib = 2**20
    sizes = {kind: tpu_info(kind).vmem_capacity_bytes // mib for kind in ("TPU v5e", "TPU7x")}
    assert sizes == {"TPU v5e": 128, "TPU7x": 64}
    assert tpu_info("TPU v5 lite") == tpu_info("TPU v5e")
    assert tpu_info("TPU v5").num_cores == 2, "two cores work as one device"
    with pytest.raises(ValueError, match="device kind 'TPU v99' is unknown; known TPUs: TPU v4"):
        tpu_info("TPU v99")
