"""Choosing implementations: names, preference, reasons and errors."""

import pytest

from pallas_kernels import registry

OPS = ("ragged_dot", "paged_attention")


@pytest.fixture
def op(monkeypatch):
    """An operation with a GPU kernel for D % 64 == 0, preferred to an implementation for all."""
    monkeypatch.setattr(registry, "_IMPLS", {})
    needs_64 = lambda platform, *, D: None if D % 64 == 0 else f"D={D} is no multiple of 64"
    anything = lambda platform, **facts: None
    registry.register(registry.Impl("f", "gpu", "gpu", needs_64, lambda: "kernel"))
    registry.register(registry.Impl("f", "xla", None, anything, lambda: "reference"))
    return "f"


def test_auto_takes_the_first_that_can_run(op):
    choice = registry.choose(op, "auto", "gpu", D=128)
    assert choice == registry.Choice("gpu", {})


def test_auto_keeps_the_reason_of_each_one_passed_over(op):
    choice = registry.choose(op, "auto", "gpu", D=100)
    assert choice.name == "xla"
    assert choice.reasons == {"gpu": "D=100 is no multiple of 64"}


def test_another_platform_is_a_reason(op):
    choice = registry.choose(op, "auto", "cpu", D=128)
    assert choice.name == "xla"
    assert choice.reasons == {"gpu": "it runs on gpu, this is cpu"}


def test_a_named_one_is_taken_though_another_is_preferred(op):
    assert registry.choose(op, "xla", "gpu", D=128) == registry.Choice("xla", {})


def test_a_named_one_that_cannot_run_raises_with_the_reason_and_what_can(op):
    with pytest.raises(ValueError, match=r"'gpu' cannot run here: D=100.*these can: \['xla'\]"):
        registry.choose(op, "gpu", "gpu", D=100)


def test_auto_raises_with_every_reason_when_nothing_can_run(monkeypatch):
    monkeypatch.setattr(registry, "_IMPLS", {})
    registry.register(registry.Impl("g", "tpu", "tpu", lambda platform: None, lambda: None))
    registry.register(registry.Impl("g", "gpu", None, lambda platform: "too old", lambda: None))
    with pytest.raises(ValueError, match=r"'tpu': 'it runs on tpu.*'gpu': 'too old'"):
        registry.choose("g", "auto", "cpu")


def test_an_unknown_name_or_operation_raises_with_those_there_are(op):
    with pytest.raises(ValueError, match=r"no implementation 'tpu'; use one of \['gpu', 'xla'\]"):
        registry.choose(op, "tpu", "cpu", D=1)
    with pytest.raises(ValueError, match=r"operation 'nope' is unknown; there are \['f'\]"):
        registry.choose("nope", "auto", "cpu")


def test_a_name_registers_once(op):
    with pytest.raises(ValueError, match="'xla' is registered already"):
        registry.register(registry.Impl("f", "xla", None, lambda p: None, lambda: None))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_xla_runs_every_operation_on_every_platform(name, platform):
    assert registry.choose(name, "xla", platform).name == "xla"
    assert registry.names(name)[-1] == "xla", "the fallback stands last"
