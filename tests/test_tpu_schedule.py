"""Reading libtpu's static schedule: depths of loops, what runs how often, spills."""

import pytest

from pallas_kernels import tpu_schedule
from pallas_kernels.device import tpu_info

BUNDLES = """= control target key start
LB: loop body
     0   :  { %s1_s0 = inlined_call_operand.hbm }
   0x1   :  { %s2 = sshll.u32 %s1, 4 }
   0x2 LB: > { %s3 = sld [smem:[#allocation7]] }
   0x3   : > { %s4 = sadd.s32 1, %s3 }
   0x4   :  { %s5 = smov 1 }
   0x5 LB: > { %s6 = sld [smem:[#allocation8]] }
   0x6   :  {} /* End region 3 */
   0x7 LB: >> { %v1 = vld [vmem:[%s6]] }
   0x8 PF: >> { %v2 = vld [vmem:[%s7]] }
   0x9   : >> { %v3 = vld [vmem:[%s8]] }
   0xa   :  {} /* End region 4 */
   0xb   : > { %s9 = sadd.s32 1, %s6 }
   0xc   :  { %10 = shalt.err (!%p1) }
"""
UTILIZATION = """== CAPACTIY:
MXU, VSTORE, VSTORE:SPILL, SALU
    2     2     2     2
== UTILIZATION:
0 1 1 0
2 0 0 1
0 2 2 1
"""


def test_bundles_are_counted_at_their_depth_in_the_deepest_nest():
    schedule = tpu_schedule.parse(BUNDLES, UTILIZATION)
    assert schedule == tpu_schedule.Schedule(13, (3, 4), loops=(1, 1), rivals=0, spills=3)


def test_cycles_follow_the_trips_of_the_loops():
    schedule = tpu_schedule.parse(BUNDLES, UTILIZATION)
    assert schedule.cycles((10, 5)) == 6 + 3 * 10 + 4 * 50
    with pytest.raises(ValueError, match=r"1 trips .* for a nest of 2 loops"):
        schedule.cycles((10,))


def test_loops_side_by_side_share_no_count():
    assert tpu_schedule.parse(BUNDLES, UTILIZATION).untold((10, 5)) is None
    second = "   0xa1 LB: >> { %v1 = vld [vmem:[%s6]] }\n   0xb   : > {"
    beside = tpu_schedule.parse(BUNDLES.replace("   0xb   : > {", second), UTILIZATION)
    assert beside.loops == (1, 2)
    assert beside.untold((10, 5)) == "2 loops side by side at depth 2, which share one count"
    assert beside.untold((10, 0)) is None, "neither runs"
    nest = "".join(line for line in BUNDLES.splitlines(True) if ">" in line)
    rival = tpu_schedule.parse(BUNDLES + nest, UTILIZATION)
    assert rival.untold((10, 5)) == "2 nests of 2 loops, which run differently often"


def test_a_move_of_the_compilers_own_is_no_loop():
    move = """   0x7 LB: >> { %v5 = vld [vmem:[%s1]]  ;;  %s6 = sphi %s7, %s8 /* phi copy */ }
   0x8   : >> { %9 = vst [vmem:[%s2]] /*vst_source=*/%v5  ;;  %s2 = scalar_lea.vmem %s1, 8 }
   0x9   :  {}
"""
    inner = "   0x7 LB: >> {"
    schedule = tpu_schedule.parse(BUNDLES.replace(inner, move + inner), UTILIZATION)
    assert schedule == tpu_schedule.Schedule(16, (6, 4), loops=(1, 1), rivals=0, spills=3)
    alone = move.replace(">>", ">")
    assert tpu_schedule.parse(alone + BUNDLES, UTILIZATION).nest == (3, 4)
    sums = move.replace("vst [vmem:[%s2]] /*vst_source=*/%v5", "vadd.f32 %v5, %v5")
    assert tpu_schedule.parse(BUNDLES.replace(inner, sums + inner), UTILIZATION).loops == (1, 2)


def test_one_kernel_is_read_from_a_dump(tmp_path):
    (tmp_path / "17-ragged_dot_int8.1-71-final_bundles.txt").write_text(BUNDLES)
    (tmp_path / "17-ragged_dot_int8.1-70-schedule-analysis_final_bundles.txt").write_text("x")
    table = tmp_path / "17-ragged_dot_int8.1-69-final_hlo-static-per-bundle-utilization.txt"
    table.write_text(UTILIZATION)
    assert tpu_schedule.read(tmp_path, "ragged_dot").total == 13
    with pytest.raises(ValueError, match="0 kernels named attention"):
        tpu_schedule.read(tmp_path, "attention")


@pytest.mark.parametrize(
    ("kind", "gigahertz"), [("TPU v5e", 1.5), ("TPU v5p", 1.75), ("TPU v6e", 1.75), ("TPU7x", 2.2)]
)
def test_the_clock_follows_from_the_matrix_units(kind, gigahertz):
    assert tpu_schedule.clock(tpu_info(kind)) == pytest.approx(gigahertz * 1e9, rel=0.01)
