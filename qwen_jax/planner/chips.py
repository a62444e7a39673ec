"""What the chips can do, and how many of them a topology has.

Knows published figures; knows no model. Sources: Google's pages on TPU v4, v5e, v5p, v6e and
TPU7x, NVIDIA's data sheets of A100, H100, H200, B200 and L4 (dense rates, without sparsity).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Mapping

GiB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of accelerator. Figures are per device, as JAX counts devices.

    Attributes:
        name: what a topology begins with.
        platform: "tpu" or "gpu".
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        flops: operations per second by dtype; a dtype that is not named is widened to bfloat16.
        link: bytes per second that a device can send to others of its topology, all links together.
        devices_per_chip: TPU7x has two, each with half of the chip.
        jax_name: what `jax.experimental.topologies` calls it; None where it knows no such thing.
        kind: JAX's ``device_kind``.
    """

    name: str
    platform: str
    memory: int
    bandwidth: float
    flops: Mapping[str, float]
    link: float
    devices_per_chip: int = 1
    jax_name: str | None = None
    kind: str = ""

    def rate(self, dtype: str) -> float:
        """Operations per second of products in ``dtype``."""
        return self.flops.get(dtype, self.flops["bfloat16"])


def _tpu(name, kind, gib, gb_s, tflops, gb_link, *, parts=1, jax_name=None, **narrow) -> Chip:
    rates = {"bfloat16": tflops, **narrow}
    return Chip(
        name,
        "tpu",
        gib * GiB // parts,
        gb_s * 1e9 / parts,
        {dtype: rate * 1e12 / parts for dtype, rate in rates.items()},
        gb_link * 1e9 / parts,
        parts,
        jax_name or name,
        kind,
    )


def _gpu(name, gb, tb_s, tflops, gb_link, **narrow) -> Chip:
    rates = {"bfloat16": tflops, **narrow}
    flops = {dtype: rate * 1e12 for dtype, rate in rates.items()}
    kind = f"NVIDIA {name.upper()}"
    return Chip(name, "gpu", int(gb * 1e9), tb_s * 1e12, flops, gb_link * 1e9, kind=kind)


CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        _tpu("v4", "TPU v4", 32, 1228, 275, 300),
        _tpu("v5e", "TPU v5 lite", 16, 819, 197, 200, int8=394),
        _tpu("v5p", "TPU v5", 95, 2765, 459, 600, int8=918),
        _tpu("v6e", "TPU v6 lite", 32, 1638, 918, 400, int8=1836),
        _tpu("v7x", "TPU7x", 192, 7380, 2307, 600, parts=2, jax_name="tpu7x", float8_e4m3fn=4614),
        _gpu("a100", 80, 2.039, 312, 300, int8=624),
        _gpu("h100", 80, 3.35, 989, 450, int8=1979, float8_e4m3fn=1979),
        _gpu("h200", 141, 4.8, 989, 450, int8=1979, float8_e4m3fn=1979),
        _gpu("b200", 180, 8.0, 2250, 900, int8=4500, float8_e4m3fn=4500),
        _gpu("l4", 24, 0.3, 121, 32, int8=242, float8_e4m3fn=242),
    )
}
_ALIASES = {"tpu7x": "v7x", "v5litepod": "v5e", "v5lite": "v5e"}
_SHAPE = re.compile(r"\d+(x\d+)*")


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind, for example ``v6e:8x8`` or ``h200:8``."""

    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> "Topology":
        """Reads ``KIND:AxB``, ``KIND:AxBxC`` or ``KIND:N``.

        Raises:
            ValueError: the kind is unknown, or the shape is none.
        """
        name, _, shape = text.strip().lower().partition(":")
        name = _ALIASES.get(name, name)
        if name not in CHIPS:
            near = difflib.get_close_matches(name, CHIPS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"topology {text!r}: no chip {name!r}; {hint}known ones: {', '.join(CHIPS)}"
            )
        sizes = tuple(map(int, shape.split("x"))) if _SHAPE.fullmatch(shape) else ()
        if not sizes or 0 in sizes:
            raise ValueError(f"topology {text!r}: write KIND:AxB or KIND:N, as in v6e:4x4, h200:8")
        return cls(CHIPS[name], sizes)

    @property
    def devices(self) -> int:
        """As JAX counts them."""
        return math.prod(self.shape) * self.chip.devices_per_chip

    @property
    def jax_name(self) -> str:
        """As `jax.experimental.topologies` takes it.

        Raises:
            ValueError: JAX compiles for no such topology without the hardware.
        """
        if self.chip.jax_name is None:
            raise ValueError(f"{self}: programs for it are not compiled without it; use --fast")
        return f"{self.chip.jax_name}:{'x'.join(map(str, self.shape))}"

    def __str__(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
