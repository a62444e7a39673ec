"""What the assembler said of Mosaic GPU kernels, read from what they dump while they compile.

Knows the dump's files (``MOSAIC_GPU_DUMP_TO=DIR``); knows no kernel. Machine code is there only if
`nvdisasm` is on the PATH (package nvidia-cuda-nvdisasm).
"""

import dataclasses
import pathlib
import re

# "/*0260*/  @!P0 HGMMA.64x8x16.F32.BF16 R24, …"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)")


@dataclasses.dataclass(frozen=True)
class Report:
    """One kernel.

    Attributes:
        kernel: its name.
        registers: of each thread, before warpgroups trade theirs.
        spilled: bytes that a thread stores to memory because it has too few registers.
        stack: bytes of a thread's local memory.
        shared: bytes of shared memory, without barriers.
        instructions: machine instructions by their first word; empty without `nvdisasm`.
        serialized: whether the assembler lets each matrix product wait for the one before, because
            it could not follow the registers of those in flight.
    """

    kernel: str
    registers: int
    spilled: int
    stack: int
    shared: int
    instructions: dict[str, int]
    serialized: bool


def read(directory: pathlib.Path) -> list[Report]:
    """A report for every kernel in a dump, by name."""
    return [_read(path) for path in sorted(directory.glob("*.ptxas"))]


def _read(ptxas: pathlib.Path) -> Report:
    resources = ptxas.with_suffix(".resources.txt").read_text()
    code = ptxas.with_suffix(".sass_ctrl")
    return parse(
        ptxas.stem, ptxas.read_text(), resources, code.read_text() if code.is_file() else ""
    )


def parse(kernel: str, ptxas: str, resources: str, code: str) -> Report:
    """A report from the assembler's words, the list of resources and the machine code.

    Raises:
        ValueError: the assembler's words lack a figure.
    """
    counts: dict[str, int] = {}
    for word in _INSTRUCTION.findall(code):
        counts[word] = counts.get(word, 0) + 1
    return Report(
        kernel,
        registers=_figure(r"Used (\d+) registers", ptxas),
        spilled=_figure(r"(\d+) bytes spill stores", ptxas),
        stack=_figure(r"(\d+) bytes stack frame", ptxas),
        shared=_figure(r"smem_scratch_bytes=(\d+)", resources),
        instructions=counts,
        serialized="C7510" in ptxas,
    )


def _figure(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern!r} in what the assembler said: {text!r}")
    return int(found[1])
