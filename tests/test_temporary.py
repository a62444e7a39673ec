"""Arrays that a step holds, placed as the compiler places them, against programs it compiled."""

import dataclasses

import pytest

from qwen_jax.planner.chips import Topology
from qwen_jax.planner.plan import Load, Plan, make_plan
from qwen_jax.planner.temporary import Array, arena
from qwen_jax.sharding import parse_mesh
from qwen_jax.weights import presets
from qwen_jax.weights.config import ModelConfig

CODER = "Qwen3-Coder-480B-A35B-Instruct-FP8"
# Two layers: bytes besides arguments of a decode step and of a chunk, and the arguments: the memory
# analyses by jax 0.11.2 and libtpu 0.0.48 of the programs that `python scripts/compile_tpu.py
# --layers 2 --model … --topology … --mesh … --strategy …` compiles.
COMPILED = {
    ("Qwen3-30B-A3B", "v5e:2x4", "tensor=8", "tp-attention+ep", 8, 8192): (
        *(6_783_488, 310_279_680, 542_572_032),
    ),
    ("Qwen3-30B-A3B-FP8", "v6e:2x2", "tensor=4", "tp-attention+ep", 8, 4096): (
        *(6_819_904, 312_310_848, 657_417_728),
    ),
    (CODER, "v6e:8x8", "expert=16,tensor=4", "sp+ep+tp", 64, 32768): (
        *(40_841_792, 814_373_952, 1_523_807_232),
    ),
    (CODER, "v5p:4x4x4", "expert=16,tensor=4", "sp+ep+tp", 64, 32768): (
        *(128_791_104, 1_035_912_768, 1_523_807_232),
    ),
    (CODER, "v7x:2x2x2", "expert=2,tensor=8", "sp+ep", 64, 32768): (
        *(126_131_264, 1_139_558_464, 2_529_487_872),
    ),
}


def two_layers(name: str) -> ModelConfig:
    config = presets.preset(name)
    text = dataclasses.replace(config.text, num_hidden_layers=2)
    return dataclasses.replace(config, text=text)


def planned(name: str, slice_: str, mesh: str, strategy: str, batch: int, context: int) -> Plan:
    return make_plan(
        two_layers(name),
        Topology.parse(slice_),
        Load(batch=batch, context=context),
        mesh=parse_mesh(mesh),
        strategy=strategy,
    )


@pytest.mark.parametrize("asked", COMPILED, ids=lambda asked: f"{asked[0]}-{asked[1]}")
def test_bytes_of_a_step_are_those_of_the_compiled_program(asked):
    decode, prefill, arguments = COMPILED[asked]
    plan = planned(*asked)
    for step, compiled in (("decode", decode), ("prefill", prefill)):
        off = plan.step_bytes[step] - compiled
        assert abs(off) < 0.01 * (arguments + compiled)
        assert abs(off) < max(0.1 * compiled, 5e6)
    assert plan.temporary == plan.step_bytes["prefill"]


# ---- placement ---------------------------------------------------------------------------------


def test_a_gap_that_is_too_small_is_left():
    rows, hidden, results, back = Array(10, 0, 1), Array(4, 1, 2), Array(20, 2, 3), Array(20, 3, 4)
    #  rows   hidden  results  back
    # |0..10|10..14|14..34|34..54|   though no more than 40 are ever alive
    assert arena([rows, hidden, results, back]) == 54
    assert arena([rows, Array(4, 1, 2), Array(10, 2, 3)]) == 14  # into the gap of the rows


def test_the_smallest_gap_that_is_large_enough_is_taken():
    kept = [Array(8, 0, 0), Array(1, 0, 9), Array(5, 0, 0), Array(1, 0, 9), Array(9, 0, 0)]
    # |8|1|5|1|9|: when the large ones are gone, 5 goes between those that stay, and 8 below them.
    assert arena([*kept, Array(5, 1, 2), Array(8, 1, 2)]) == 24
    assert arena([*kept, Array(8, 1, 2), Array(6, 1, 2)]) == 24
    assert arena([*kept, Array(8, 1, 2), Array(10, 1, 2)]) == 25  # behind the last that stays


def test_what_there_is_room_for_stays_in_vmem():
    first, second = Array(40, 0, 1), Array(30, 1, 2)
    assert arena([first, second], vmem=100) == 0
    assert arena([first, second], vmem=69) == 30  # the second one finds the first there
    assert arena([first, second], vmem=100, asked={1: 31}) == 30
    assert arena([first, second], vmem=100, asked={1: 61}) == 40  # too little for the first
    assert arena([Array(40, 0, 1, hbm=True), second], vmem=100) == 40
