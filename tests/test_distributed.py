"""What processes of a job agree on, and when one of them counts as lost; no process is started."""

import contextlib
import os
from unittest import mock

import jax
import numpy as np
import pytest
import tiny_llm
from coordination import as_process, make_turns, share, two_processes

from qwen_jax import cli, distributed, watch
from qwen_jax import sharding as sharding_lib
from qwen_jax.commands import output, processes
from qwen_jax.engine import turns
from qwen_jax.engine.events import EngineClosed
from qwen_jax.requests import SamplingParams


@pytest.fixture
def service():
    with two_processes() as service:
        yield service


# ---- agreeing ------------------------------------------------------------------------------------


def test_alone_everything_answers_at_once():
    assert distributed.count() == 1
    assert distributed.gather("x", "mine") == ["mine"]
    assert distributed.from_first("x", lambda: "read") == "read"
    distributed.check_equal("x", {"a": "1"})


def test_all_get_what_the_first_has_read(service):
    with as_process(0):
        assert [distributed.from_first("text", lambda t=t: t) for t in ("a", "b")] == ["a", "b"]
    with as_process(1):
        read = mock.Mock()
        assert [distributed.from_first("text", read) for _ in range(2)] == ["a", "b"]
        read.assert_not_called()


def test_gather_keeps_the_order_of_processes_and_the_uses_apart(service):
    service.key_value_set("qwen_jax/memory/0/0", "first")
    service.key_value_set("qwen_jax/memory/1/0", "later")
    with as_process(1):
        assert distributed.gather("memory", "mine") == ["first", "mine"]
        assert distributed.gather("memory", "again") == ["later", "again"]


def test_other_options_are_named(service):
    with as_process(0):
        distributed.check_equal("options", {"model": "a", "seed": "0"})
    with as_process(1), pytest.raises(ValueError, match=r"process 1 was started with seed=7, proc"):
        distributed.check_equal("options", {"model": "a", "seed": "7"})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here", 2, 0), "coordinator 'here' is not HOST:PORT"),
        (("here:1", 2, 2), r"process 2 is not in 0 \.\. 1"),
        ((None, None, None), "JAX finds no job of several processes here .* --coordinator"),
    ],
)
def test_a_job_that_cannot_be_is_an_error(given, message):
    with mock.patch.object(jax.distributed, "initialize", side_effect=ValueError("none")) as begin:
        with pytest.raises(ValueError, match=message):
            distributed.start(*given)
        assert begin.called == (given[0] is None)


def test_processes_that_have_not_met_are_an_error():
    with (
        mock.patch.object(jax, "process_count", return_value=4),
        pytest.raises(ValueError, match=r"4 processes .* have not met: call jax.distributed"),
    ):
        tiny_llm.open_llm()


def test_replicate_puts_a_host_array_on_every_device():
    mesh = sharding_lib.make_mesh("expert=4,tensor=2")
    tree = {"a": np.arange(6, dtype=np.int32).reshape(2, 3), "b": jax.numpy.float32(2)}
    with mock.patch.object(jax.sharding.NamedSharding, "is_fully_addressable", False):
        placed = sharding_lib.replicate(tree, mesh)
    for name, value in tree.items():
        assert len(placed[name].addressable_shards) == 8
        assert all(np.array_equal(s.data, value) for s in placed[name].addressable_shards)


# ---- turns of an engine --------------------------------------------------------------------------


def test_the_others_hear_what_the_first_decides(service):
    with as_process(0):
        first, second = make_turns(), make_turns()
        assert first.decides
        for calls in range(3 * turns._BLOCK):
            first.say(turns.Turn(calls, 0.1 + calls, 7))
            if calls < 3:
                with as_process(1):
                    assert not second.decides
                    assert second.hear() == turns.Turn(calls, 0.1 + calls, 7)
    assert len(service.values) <= 2 * turns._BLOCK  # what is over is removed


def test_nothing_decided_yet_is_no_turn(service):
    with as_process(1), mock.patch.object(turns, "_PATIENCE_MS", 10):
        assert make_turns().hear() is None


PARAMS = SamplingParams(temperature=0.0, max_tokens=9, ignore_eos=True)


def run_as(index, prompts):
    """What an engine makes of prompts, one after the other, as process ``index`` of the job."""
    with mock.patch.object(distributed, "count", return_value=1):
        llm = tiny_llm.open_llm()
    with as_process(index), contextlib.closing(llm.engine):
        share(llm.engine)
        results = [llm.generate(prompt, PARAMS, use_tqdm=False)[0] for prompt in prompts]
        return [r.outputs[0].token_ids for r in results], llm.engine._core


def test_a_follower_does_what_the_first_did(service):
    """One engine behind the other: the second hears what the first has said."""
    prompts = ["def f(", "x = "]
    tokens, first = run_as(0, prompts)
    first.scheduler.step_seconds = 0.25
    again, second = run_as(1, prompts)
    assert tokens == again
    assert len(tokens[0]) == 9
    assert first.digest == second.digest != 0
    assert first.totals.steps == second.totals.steps


def test_a_follower_with_other_tokens_stops(service):
    run_as(0, ["def f(", "x = "])
    with pytest.raises(EngineClosed, match="process 1 has got other tokens than process 0"):
        run_as(1, ["def g(", "x = "])


# ---- losing one ----------------------------------------------------------------------------------


@pytest.fixture
def given_up(service, monkeypatch, capsys):
    """A watch of process 0, and what it says when it gives up; None while it does not."""
    ended = mock.Mock(side_effect=SystemExit)
    monkeypatch.setattr(os, "_exit", ended)
    monkeypatch.setattr(watch, "_FAREWELL", 0)
    words = mock.Mock()
    with as_process(0):
        found = watch.Watch("process 0 of 2", words)

        def look(*signs, own="1"):
            for sign in signs:
                try:
                    if found._see({0: own, 1: sign}):
                        return "all are done"
                except SystemExit:
                    ended.assert_called_once_with(watch.LOST)
                    words.tell.assert_called_once_with("")
                    return capsys.readouterr().err
            return None

        yield look


def test_a_process_is_lost_after_many_equal_signs(given_up):
    assert given_up("1", *["2"] * watch.SILENT_BEATS) is None
    assert given_up("3", *["4"] * watch.SILENT_BEATS) is None
    said = given_up("4")
    assert said == "process 0 of 2 ends: process 1 was lost: no sign of it for 15 s\n"


def test_a_process_that_is_done_is_not_lost_while_it_gives_signs(given_up):
    assert given_up(*(f"done {beat}" for beat in range(100))) is None
    assert "process 1 was lost" in given_up(*["done 100"] * 20)


def test_a_process_leaves_when_all_are_done(given_up):
    assert given_up("5", own="done 7") is None
    assert given_up("done 6", own="7") is None
    assert given_up("done 6", own="done 8") == "all are done"


def test_a_process_that_has_failed_ends_the_others_at_once(given_up):
    assert given_up("1", "failed: no file x") == (
        "process 0 of 2 ends: process 1 has failed: no file x\n"
    )


def test_the_loss_of_a_process_is_said_within_thirty_seconds():
    assert watch.SILENT_BEATS * watch.BEAT_SECONDS + 2 * watch._FAREWELL < 30


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"}, False),  # the script, not srun
        ({"SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "t-0,t-1"}, True),
    ],
)
def test_a_step_of_several_processes_is_evident(environment, expected):
    assert processes._in_a_step(environment) is expected


def test_half_of_the_options_is_an_error(capsys):
    assert cli.main(["info", "--model=Qwen3-0.6B", "--num-processes=2"]) == 2
    assert "--coordinator, --num-processes and --process-id go together" in capsys.readouterr().err


def test_the_others_write_nothing(monkeypatch, capsys):
    monkeypatch.setattr(output, "_muted", False)
    output.write("a")
    output.mute()
    output.write("b")
    output.write_json({"c": 1})
    assert capsys.readouterr().out == "a"
