"""The figures of Hopper GPUs, compiling for one that is not here, what the assembler said of it."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from pallas_kernels import gpu_report, hopper

PTXAS = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for k_mosaic_gpu_kernel
    96 bytes stack frame, 88 bytes spill stores, 120 bytes spill loads
ptxas info    : Used 168 registers, used 2 barriers, 1 bytes smem
"""
RESOURCES = "Resources(smem_scratch_bytes=65536, tmem_scratch_cols=0)"
CODE = """
k_mosaic_gpu_kernel:
   -:-:1:Y:07        /*0010*/                   S2R R0, SR_TID.X
.L_x_16:
   -:-:-:Y:01        /*11070*/              @P0 HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24
   -:-:-:Y:01        /*11080*/             @!P1 HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24
   -:-:-:Y:01        /*11090*/                   STL [R1], R8
"""


@pytest.mark.parametrize(
    ("kind", "multiprocessors"),
    [
        ("NVIDIA H200", 132),
        ("NVIDIA H100 80GB HBM3", 132),
        ("NVIDIA H100 PCIe", 114),
        ("NVIDIA H20", 78),
    ],
)
def test_a_hopper_gpu_has_its_figures(kind, multiprocessors):
    found = hopper.info(kind)
    assert (found.multiprocessors, found.shared_bytes) == (multiprocessors, 232448)


def test_other_gpus_are_refused_by_name():
    with pytest.raises(
        ValueError, match=r"'NVIDIA A100-SXM4-80GB' is no Hopper GPU; known: .*H200"
    ):
        hopper.info("NVIDIA A100-SXM4-80GB")


def test_a_report_counts_registers_spills_and_instructions():
    report = gpu_report.parse("k", PTXAS, RESOURCES, CODE)
    assert (report.registers, report.spilled, report.stack, report.shared) == (168, 88, 96, 65536)
    assert report.instructions == {"S2R": 1, "HGMMA": 2, "STL": 1}
    assert not report.serialized
    assert gpu_report.parse("k", f"{PTXAS}warning (C7510)", RESOURCES, CODE).serialized


def test_a_report_without_its_figures_raises():
    with pytest.raises(
        ValueError, match=r"registers.* in what the assembler said: 'no such kernel'"
    ):
        gpu_report.parse("k", "no such kernel", RESOURCES, "")


def test_a_dump_is_read_kernel_by_kernel(tmp_path):
    for name in ("b_0", "a_0"):
        (tmp_path / f"{name}.ptxas").write_text(PTXAS)
        (tmp_path / f"{name}.resources.txt").write_text(RESOURCES)
    found = gpu_report.read(tmp_path)
    assert [(each.kernel, each.instructions) for each in found] == [("a_0", {}), ("b_0", {})]


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the CUDA plugin: pip install -e ".[gpu]"',
)
def test_kernels_compile_at_a_published_models_shapes_and_spill_nothing(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "scripts" / "compile_kernels.py"
    out = tmp_path / "compiled.jsonl"
    args = ["--device", "h200", "--op", "ragged_dot", "--match", "30B-A3B/ep8/decode-32/"]
    done = subprocess.run(
        [sys.executable, str(script), *args, "--out", str(out)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(script.parents[1])},
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    refused = [line["refused"] for line in lines if "refused" in line]
    assert refused == ["weights are int8; it takes bfloat16 or float8_e4m3fn"] * 2
    programs = [line for line in lines if "refused" not in line]
    assert len(programs) == 4
    for program in programs:
        (kernel,) = program["kernels"]
        assert kernel["kernel"].startswith("ragged_dot")
        assert (kernel["spilled"], kernel["stack"], kernel["serialized"]) == (0, 0, False)
