"""The figures of Hopper GPUs, compiling for one that is not here, what the assembler said of it."""

import importlib.util
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


# A product of the tensor cores in a process of its own: the plugin reads the environment once.
COMPILE = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from pallas_kernels import hopper

def body(x, y, out, barrier):
    def of_shared(x_s, y_s, out_s):
        plgpu.copy_gmem_to_smem(x, x_s, barrier)
        plgpu.copy_gmem_to_smem(y, y_s, barrier)
        plgpu.barrier_wait(barrier)
        def product(acc):
            plgpu.wgmma(acc, x_s, y_s)
            return acc[...]
        out_s[...] = pl.run_scoped(product, plgpu.ACC((64, 64), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_s, out)
        plgpu.wait_smem_to_gmem(0)
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    half = plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tiled)
    whole = (plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(128))
    pl.run_scoped(of_shared, half, half, plgpu.SMEM((64, 64), jnp.float32, transforms=whole))

(device,) = hopper.h200().devices
mesh = Mesh(np.array([device]), ("one",), axis_types=(AxisType.Auto,))
place = NamedSharding(mesh, PartitionSpec())
x = jax.ShapeDtypeStruct((64, 64), jnp.bfloat16, sharding=place)
fn = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
    scratch_types=[plgpu.Barrier(num_arrivals=2)],
    grid=(1,),
    grid_names=("one",),
)
with jax.set_mesh(mesh):
    jax.jit(fn).lower(x, x).compile()
print(device.device_kind, device.core_count)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("jax_cuda13_plugin") is None,
    reason='needs the CUDA plugin: pip install -e ".[gpu]"',
)
def test_a_kernel_compiles_for_an_h200_that_is_not_here(tmp_path):
    root = str(pathlib.Path(__file__).parents[1])
    environment = {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "MOSAIC_GPU_DUMP_TO": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["NVIDIA", "H200", "132"]
    (report,) = gpu_report.read(tmp_path)
    assert report.shared == 2 * 64 * 64 * 2 + 64 * 64 * 4
    assert report.spilled == 0
