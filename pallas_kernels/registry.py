"""Which implementations of an operation exist, and which one a caller gets, with reasons.

Knows names, platforms and the reasons an implementation gives for not running; knows nothing of
what the operations compute. Implementations register when their module is imported, the best first,
and a choice is made once, when a runtime is built, never inside a traced function.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Impl:
    """One implementation of an operation.

    Attributes:
        op: the operation, e.g. ``"ragged_dot"``.
        name: what the caller types, e.g. ``"xla"``.
        platform: the only platform it runs on (``"tpu"``, ``"gpu"``, ``"cpu"``), or None for any.
        supports: called with the platform and the static facts of the case; returns why the case
            cannot run, or None.
        fn: the function; every implementation of an operation has the same signature.
    """

    op: str
    name: str
    platform: str | None
    supports: Callable[..., str | None]
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


def choose(op: str, wanted: str, platform: str, **facts: Any) -> Choice:
    """Decides which implementation of ``op`` runs.

    Args:
        op: the operation.
        wanted: ``"auto"`` for the first implementation that can run, or a name.
        platform: ``"cpu"``, ``"gpu"`` or ``"tpu"``.
        **facts: what ``supports`` needs to know of the case: static sizes, dtypes, device kind.

    Returns:
        The choice. Under ``"auto"``, ``reasons`` says why each preferred one cannot run.

    Raises:
        ValueError: ``op`` or ``wanted`` is unknown, or what is wanted cannot run here.
    """
    if wanted != "auto":
        reason = _reason(get(op, wanted), platform, facts)
        if reason is not None:
            runs = [n for n in names(op) if _reason(get(op, n), platform, facts) is None]
            raise ValueError(
                f"{op}: implementation {wanted!r} cannot run here: {reason}; these can: {runs}"
            )
        return Choice(wanted, {})
    reasons: dict[str, str] = {}
    for name in names(op):
        reason = _reason(get(op, name), platform, facts)
        if reason is None:
            return Choice(name, reasons)
        reasons[name] = reason
    raise ValueError(f"{op}: no implementation can run on {platform}: {reasons}")


def _reason(impl: Impl, platform: str, facts: Mapping[str, Any]) -> str | None:
    if impl.platform is not None and impl.platform != platform:
        return f"it runs on {impl.platform}, this is {platform}"
    return impl.supports(platform, **facts)
