"""How tokens meet the experts they chose: the forms by name, what each sends, and which one runs.

Knows mesh axes, sizes and bytes; the work is done by `model.dispatch`. Let n devices split T tokens
of width D in A experts each (the axes of E, and of F where rules split the hidden width), in w
bytes an element. Bytes that a device sends at least, per layer:

    all-reduce         every device has all tokens; float32 sums over the devices      8 T D
    reduce-scatter     the same, but each device keeps the sums of T / n tokens,       4 T D
                       then, where the next layer wants all tokens, gathers them     + w T D
    all-to-all         a token goes to the devices of its experts, and one sum comes   2 w T D
                       back from each, in slots as large as the worst case             / n * n
    ragged-all-to-all  the same, but only the rows that exist travel                   2 w T D p
                       (p: how likely one of a token's A experts is on a given device)

each times (n - 1) / n; the last two gather like the second. No form drops a token: buffers hold
the worst case.
"""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import Mesh

from qwen_jax import sharding as sharding_lib
from qwen_jax.sharding import Rules

FORMS = ("all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
RAGGED_PLATFORMS = ("tpu", "gpu")
# Below this, sums of all tokens in float32 are one short message, and two would take longer.
_LARGE = 1 << 20


@dataclasses.dataclass(frozen=True)
class Message:
    """What the dispatch of one layer sends.

    Attributes:
        op: the collective, in XLA's words.
        bytes: of its whole result on each device.
        ways: devices that take part.
        share: of the bytes that travel at all, where the rest is room for the worst case.
    """

    op: str
    bytes: int
    ways: int
    share: float = 1.0


def check(name: str, *, mesh: Mesh, rules: Rules, platform: str) -> None:
    """Whether a form can run on these devices.

    Raises:
        ValueError: no such form, or the mesh or the platform cannot run it.
    """
    if name not in ("auto", *FORMS):
        raise ValueError(f"dispatch {name!r} is unknown; use auto, {', '.join(FORMS)}")
    if name.endswith("all-to-all") and sharding_lib.ways(mesh, rules.axes("E")) == 1:
        raise ValueError(
            f"dispatch {name!r}: the rules split no experts over mesh {dict(mesh.shape)} "
            f"(E is over {rules.axes('E') or 'no axis'}); use all-reduce, or another strategy"
        )
    if name == "ragged-all-to-all" and platform not in RAGGED_PLATFORMS:
        raise ValueError(
            f"dispatch {name!r}: XLA has no ragged-all-to-all for {platform}, only for "
            f"{', '.join(RAGGED_PLATFORMS)}; use all-to-all, the same with slots of equal size"
        )


def resolve(name: str, *, mesh: Mesh, rules: Rules, tokens: int, width: int, dtype: str) -> str:
    """The form that a step of ``tokens`` tokens uses.

    "auto" is "reduce-scatter" where the rules split the tokens (T), or where the sums in float32
    take a mebibyte or more and the activations are narrower than that, so that less is sent; else
    "all-reduce", which is one message instead of two. It takes no all-to-all: how much those send
    depends on the routing.
    """
    if name != "auto":
        return name
    split = sharding_lib.ways(mesh, rules.axes("T"))
    if split > 1 and tokens % split == 0:
        return "reduce-scatter"
    if tokens * width * 4 >= _LARGE and jnp.dtype(dtype).itemsize < 4:
        return "reduce-scatter"
    return "all-reduce"


def described(name: str) -> str:
    """A form, or the rule of "auto", as the log says it."""
    if name != "auto":
        return name
    return (
        f"all-reduce, or reduce-scatter where the rules split T or sums of narrower activations "
        f"take {_LARGE:,} bytes or more"
    )


def messages(
    form: str,
    *,
    mesh: Mesh,
    rules: Rules,
    tokens: int,
    width: int,
    dtype: str,
    experts: int,
    active: int,
) -> list[Message]:
    """The collectives of one sparse layer, in a ``form`` that `resolve` gave.

    Args:
        form, mesh, rules, tokens, width, dtype: as for `resolve`.
        experts, active: of a layer, and of a token.
    """
    item = jnp.dtype(dtype).itemsize
    owners, hidden, stream = (
        sharding_lib.ways(mesh, rules.axes(letter))
        for letter, rules in (
            ("E", rules),
            ("F", rules),
            ("T", sharding_lib.for_tokens(rules, mesh, tokens)),
        )
    )
    ways = owners * hidden
    padded = -(-tokens // ways) * ways
    gather = Message("all-gather", tokens * width * item, stream)
    keep = Message("reduce-scatter", padded // ways * width * 4, ways)
    if form == "all-reduce":
        found = [gather, Message("all-reduce", tokens * width * 4, ways)]
    elif form == "reduce-scatter":
        found = [gather, keep]
    else:
        share = chance(experts, active, owners) if form.startswith("ragged") else 1.0
        routing = Message("all-gather", tokens * active * 4, stream)
        found = [routing, routing] if padded == tokens else [gather]
        found += 2 * [Message(form, padded * width * item, owners, share)]
        found += [dataclasses.replace(keep, ways=hidden)]
    if form != "all-reduce":  # the stream as the next layer wants it
        stream = stream if padded == tokens else 1
        found += [Message("all-gather", padded // stream * width * item, ways // stream)]
    return [each for each in found if each.ways > 1]


def chance(experts: int, active: int, ways: int) -> float:
    """How likely one of a token's ``active`` experts is on a given one of ``ways`` devices.

    Of a uniform router.
    """
    elsewhere = experts - experts // ways
    return 1 - math.comb(elsewhere, active) / math.comb(experts, active)
