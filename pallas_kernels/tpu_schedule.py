"""The compiler's static schedule of one TPU kernel, read from what libtpu dumps.

Knows the dump's files (``--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true``) and cycles; knows no
kernel. A bundle is what a core issues in one cycle; how often a loop's bundles run is not in the
schedule, so the kernel's author says it, loop by loop. The author knows nothing of the compiler's
own loops: what XLA keeps in VMEM already is copied from there by loads and stores. Their few
bundles count as part of what is around them, as one pass.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence

from jax.experimental.pallas import tpu as pltpu

# "0x12f LB: >>> { … }": address, control target (LB: a loop's body), loop depth, instructions.
_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s*([A-Z]{2})?\s*:\s*(>*)\s*\{(\})?(.*)")
_COMMENT = re.compile(r"/\*.*?\*/")
# Names of instructions on vectors, of copies and of reads of scalars: no register, no address.
_WORK = re.compile(r"(?<![%\w\[.])(?:v\w+|dma|sld)\b")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Bundles of a kernel.

    Attributes:
        total: all, each counted once.
        nest: bundles at each depth of the deepest loop nest, the outermost loop first.
        loops: how many loops each depth of that nest has.
        rivals: how many other nests are as deep.
        spills: registers written to memory because there are too few.
    """

    total: int
    nest: tuple[int, ...]
    loops: tuple[int, ...]
    rivals: int
    spills: int

    def untold(self, trips: Sequence[float]) -> str | None:
        """Why the bundles are no time, though each depth's loops run as often as ``trips`` says."""
        if self.rivals:
            return f"{self.rivals + 1} nests of {len(self.nest)} loops, which run differently often"
        for depth, (loops, trip) in enumerate(zip(self.loops, trips, strict=False)):
            if loops > 1 and trip:
                return f"{loops} loops side by side at depth {depth + 1}, which share one count"
        return None

    def cycles(self, trips: Sequence[float]) -> float:
        """Cycles when the loops of the nest run ``trips[0]``, ``trips[0] * trips[1]`` … times.

        What is outside of the nest counts once, and what is under a condition as taken.

        Raises:
            ValueError: the nest is not as deep.
        """
        if len(trips) != len(self.nest):
            raise ValueError(f"{len(trips)} trips {trips} for a nest of {len(self.nest)} loops")
        cycles, times = self.total - sum(self.nest), 1.0
        for bundles, trip in zip(self.nest, trips, strict=True):
            times *= trip
            cycles += bundles * times
        return cycles


def read(directory: pathlib.Path, kernel: str) -> Schedule:
    """The schedule of the one kernel in a dump whose name starts with ``kernel``.

    Raises:
        ValueError: there is none, or more than one.
    """
    pattern = re.compile(rf"\d+-{kernel}[^-]*-\d+-final_bundles\.txt")
    found = [path for path in sorted(directory.iterdir()) if pattern.fullmatch(path.name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels named {kernel}* in {directory}; one is needed")
    name = found[0].name.rsplit("-", 2)[0]
    (table,) = directory.glob(f"{name}-*-final_hlo-static-per-bundle-utilization.txt")
    return parse(found[0].read_text(), table.read_text())


def parse(bundles: str, utilization: str) -> Schedule:
    """A schedule from the texts of its bundles and of their table of used slots."""
    placed = _placed(bundles)
    nests, nest = [], []
    for each in [*placed, (0, False)]:
        if each[0]:
            nest.append(each)
        elif nest:
            nests.append(nest)
            nest = []
    deep = [max(nest)[0] for nest in nests]
    most = max(deep, default=0)
    deepest = nests[deep.index(most)] if most else []
    levels = range(1, most + 1)
    return Schedule(
        total=len(placed),
        nest=tuple(sum(depth == level for depth, _ in deepest) for level in levels),
        loops=tuple(deepest.count((level, True)) for level in levels),
        rivals=max(0, deep.count(most) - 1),
        spills=_spills(utilization),
    )


def _placed(text: str) -> list[tuple[int, bool]]:
    """Of each bundle its depth, and whether it begins a loop's body; moves are no loops."""
    depths, bodies, works = [], [], []
    for found in filter(None, map(_BUNDLE.match, text.splitlines())):
        target, depth, empty, rest = found.groups()
        # An empty bundle at the edge of a region shows no depth: it belongs where it stands.
        depths.append(depths[-1] if depths and empty and not depth else len(depth))
        bodies.append(target == "LB")
        works.append(set(_WORK.findall(_COMMENT.sub("", rest))))
    placed = list(zip(depths, bodies, strict=True))
    for begin in (i for i, body in enumerate(bodies) if body):
        depth, end = depths[begin], begin + 1
        while end < len(depths) and depths[end] >= depth and placed[end] != (depth, True):
            end += 1
        if set().union(*works[begin:end]) == {"vld", "vst"}:
            placed[begin:end] = [(depth - 1, False)] * (end - begin)
    return placed


def _spills(utilization: str) -> int:
    header, _, rows = utilization.partition("== UTILIZATION:")
    names = [name.strip() for name in header.strip().splitlines()[1].split(",")]
    column = names.index("VSTORE:SPILL")
    lines = (line.split() for line in rows.splitlines())
    return sum(int(line[column]) for line in lines if line and all(x.isdigit() for x in line))


def clock(info: pltpu.TpuInfo) -> float:
    """Cycles per second: what makes the matrix units reach the chip's stated rate.

    A matrix unit takes one row of bfloat16 per cycle, from v6e on two (seen in the schedules of
    large products).
    """
    rows = 2 if info.generation >= 6 else 1
    per_cycle = info.num_mxus * info.mxu_column_size**2 * 2 * rows
    return info.bf16_ops_per_second / per_cycle
