"""Which implementations of an operation exist, and which one a caller gets, with reasons.

Knows names, devices and the reasons an implementation gives for not running; knows nothing of what
the operations compute. Implementations register when their module is imported, the best first, and
a choice is made once, when a runtime is built, never inside a traced function.

The contract of ``supports(device, facts)``, which every implementation has:

- ``device`` is a `Device`: platform and kind. The registry has compared ``platform`` already.
- ``facts`` is the operation's own frozen dataclass (`ragged_dot.Facts`, `paged_attention.Facts` …):
  what one device sees of the model (dims of its shard, dtypes, form and blocks of quantised
  weights, page size, heads), and nothing that changes from call to call: no number of tokens, rows
  or pages, which an implementation must take as they come.
- It returns None, or one sentence that says what stands in the way and what would work. It is pure,
  compiles nothing, and needs no such device to be present.
- One operation may be used with several facts (both products of an expert); all must be supported.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pallas_kernels.device import Device

UNKNOWN = "nothing is known of the model; make the runtime with its config"


@dataclasses.dataclass(frozen=True)
class Impl:
    """One implementation of an operation.

    Attributes:
        op: the operation, e.g. ``"ragged_dot"``.
        name: what the caller types, e.g. ``"xla"``.
        platform: the only platform it runs on (``"tpu"``, ``"gpu"``, ``"cpu"``), or None for any.
        supports: why a case cannot run on a device, or None; see this module's text.
        fn: the function; every implementation of an operation has the same signature.
    """

    op: str
    name: str
    platform: str | None
    supports: Callable[[Device, Any], str | None]
    fn: Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Choice:
    """The chosen implementation's name, and why each preferred one was passed over."""

    name: str
    reasons: Mapping[str, str]


_IMPLS: dict[str, dict[str, Impl]] = {}


def register(impl: Impl) -> Impl:
    """Adds an implementation behind those already there: registration order is preference order.

    Raises:
        ValueError: the operation already has an implementation of that name.
    """
    named = _IMPLS.setdefault(impl.op, {})
    if impl.name in named:
        raise ValueError(f"{impl.op}: an implementation {impl.name!r} is registered already")
    named[impl.name] = impl
    return impl


def names(op: str) -> tuple[str, ...]:
    """The implementations of ``op``, the preferred first.

    Raises:
        ValueError: there is no such operation.
    """
    if op not in _IMPLS:
        raise ValueError(f"operation {op!r} is unknown; there are {sorted(_IMPLS)}")
    return tuple(_IMPLS[op])


def get(op: str, name: str) -> Impl:
    """The implementation of ``op`` called ``name``.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    known = names(op)
    if name not in known:
        raise ValueError(f"{op} has no implementation {name!r}; use one of {list(known)}")
    return _IMPLS[op][name]


def choose(op: str, wanted: str, device: Device, facts: Sequence[Any] | None = None) -> Choice:
    """Decides which implementation of ``op`` runs.

    Args:
        op: the operation.
        wanted: ``"auto"`` for the first implementation that can run, or a name.
        device: where.
        facts: every form in which the model uses the operation; None: they are not known, and only
            implementations that run anything anywhere can be taken.

    Returns:
        The choice. Under ``"auto"``, ``reasons`` says why each preferred one cannot run.

    Raises:
        ValueError: ``op`` or ``wanted`` is unknown, or what is wanted cannot run here.
    """
    if wanted != "auto":
        runnable(op, wanted, device, facts)
        return Choice(wanted, {})
    reasons: dict[str, str] = {}
    for name in names(op):
        reason = _reason(get(op, name), device, facts)
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    raise ValueError(f"{op}: no implementation can run on {device.platform}: {reasons}")


def runnable(op: str, name: str, device: Device, facts: Sequence[Any] | None) -> Callable[..., Any]:
    """The function of the implementation of ``op`` called ``name``, which can run.

    Raises:
        ValueError: there is none, or it cannot run this on the device.
    """
    impl = get(op, name)
    reason = _reason(impl, device, facts)
    if reason is not None:
        runs = [n for n in names(op) if _reason(get(op, n), device, facts) is None]
        raise ValueError(
            f"{op}: implementation {name!r} cannot run here: {reason}; these can: {runs}"
        )
    return impl.fn


def _reason(impl: Impl, device: Device, facts: Sequence[Any] | None) -> str | None:
    if impl.platform not in (None, device.platform):
        return f"it runs on {impl.platform}, this is {device.platform}"
    if facts is None:
        return None if impl.platform is None else UNKNOWN
    reasons = (impl.supports(device, each) for each in facts)
    return next((reason for reason in reasons if reason is not None), None)
