"""The engine when things go wrong: every request hears of it, and those that can go on do."""

import logging
import re
import subprocess
import sys
import threading
import time
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_llm
from engine_client import Listener, complete, make_engine, start

from qwen_jax.engine import offline
from qwen_jax.engine.events import Delta, EngineClosed
from qwen_jax.engine.faults import DeviceError
from qwen_jax.requests import SamplingParams

PROMPTS = np.random.default_rng(2).integers(0, 256, (10, 20))


@pytest.fixture
def engine():
    engine = make_engine()
    yield engine
    engine.close()


def fails_once(call, *, after=0, lose=False):
    """``call``, which raises at its ``after``-th use, having lost the cache if ``lose``."""
    uses = iter(range(10**9))

    def failing(*args, **kwargs):
        if next(uses) != after:
            return call(*args, **kwargs)
        if lose:
            for array in call.__self__._cache.pages:
                array.delete()
        raise RuntimeError("out of order")

    return failing


def outcome(listener):
    """Its tokens, or the error."""
    try:
        return [output.token_ids for output in listener.wait().outputs]
    except DeviceError as error:
        return error


@pytest.mark.parametrize(
    ("part", "lose"), [("forward", False), ("choose", True), ("stretch", True)]
)
def test_a_step_that_fails_fails_those_in_it_and_the_others_go_on(engine, caplog, part, lose):
    expected = [complete(engine, prompt) for prompt in PROMPTS]
    failing = fails_once(getattr(engine.runner, part), lose=lose)
    with (
        caplog.at_level(logging.CRITICAL),
        mock.patch.object(engine.runner, part, failing),
    ):
        with engine.together():
            listeners = [start(engine, prompt)[0] for prompt in PROMPTS]
        outcomes = [outcome(listener) for listener in listeners]
    failed = [i for i, found in enumerate(outcomes) if isinstance(found, DeviceError)]
    for i, (found, tokens) in enumerate(zip(outcomes, expected, strict=True)):
        if i in failed:
            assert re.search(r"request \d+: the device has failed: .*out of order", str(found))
        else:
            assert found == tokens
    assert 1 <= len(failed) < len(PROMPTS)
    assert engine.stats().pages_used == 0
    assert [complete(engine, prompt) for prompt in PROMPTS] == expected


def test_a_step_that_fails_when_its_results_are_awaited_is_no_different(engine):
    (expected,) = complete(engine, PROMPTS[0])
    with mock.patch("qwen_jax.engine.runner.Flight.land", side_effect=RuntimeError("no link")):
        listener, _ = start(engine, PROMPTS[0])
        with pytest.raises(DeviceError, match=r"request 1: the device has failed: .*no link"):
            listener.wait()
    assert complete(engine, PROMPTS[0]) == [expected]


def test_a_sink_that_fails_ends_its_own_request_alone(engine, caplog):
    (expected,) = complete(engine, PROMPTS[0])

    def fail(listener, event):
        raise KeyError("gone")

    with caplog.at_level(logging.CRITICAL), engine.together():
        broken = start(engine, PROMPTS[1], on_event=fail)[0]
        listener = start(engine, PROMPTS[0])[0]
    assert listener.wait().outputs[0].token_ids == expected
    assert len(broken.events) == 1
    assert (engine.stats().running, engine.stats().pages_used) == (0, 0)


def test_logits_that_are_no_numbers_fail_the_request_and_nobody_shares_its_pages():
    llm = tiny_llm.shared_llm()
    engine = make_engine()
    good = engine.runner.params
    expected = complete(engine, PROMPTS[0])
    engine._core._pool.forget(range(16))
    engine.runner.params = llm.params.replace(norm=jnp.full_like(llm.params.norm, np.nan))
    with pytest.raises(ValueError, match=r"request 1 at new token 1: its logits hold NaN"):
        complete(engine, PROMPTS[0])
    assert engine.stats().pages_cached == 0
    engine.runner.params = good
    assert complete(engine, PROMPTS[0]) == expected
    engine.close()


def test_a_thread_that_dies_fails_all_and_says_so(caplog):
    engine = make_engine()
    with (
        caplog.at_level(logging.CRITICAL),
        mock.patch.object(engine._core.scheduler, "plan", side_effect=SystemError("a bug")),
    ):
        with engine.together():
            listeners = [start(engine, prompt)[0] for prompt in PROMPTS]
        for i, listener in enumerate(listeners):
            with pytest.raises(EngineClosed, match=rf"request {i}: the engine has stopped.*a bug"):
                listener.wait()
        with pytest.raises(EngineClosed, match=r"the engine has stopped.*a bug"):
            start(engine, PROMPTS[0])
        assert engine.drain(60)
    engine.close()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"allowed_token_ids": [5], "stop_token_ids": [5], "min_tokens": 1}, "every allowed token"),
        ({"logit_bias": {999: 1.0}}, "mine: logit_bias has token id 999"),
    ],
)
def test_what_cannot_run_is_refused_at_once(engine, params, message):
    listener = Listener()
    with pytest.raises(ValueError, match=message):
        engine.submit(
            tiny_llm.shared_llm().inputs.prompt("x"),
            SamplingParams(**params),
            listener,
            name="mine",
        )
    with pytest.raises(ValueError, match=r"a prompt of 256 tokens is not in 1 .. 255"):
        start(engine, [1] * 256)
    assert listener.events == []


# ---- the caller goes away ------------------------------------------------------------------------


def test_an_interrupt_cancels_the_calls_requests(engine):
    prompts = [tiny_llm.shared_llm().inputs.prompt("hello")] * 3
    params = [SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)] * 3
    interrupting = mock.Mock(side_effect=[Delta(0, "", [1], None, None, None), KeyboardInterrupt])
    with (
        mock.patch.object(offline.queue, "SimpleQueue", return_value=mock.Mock(get=interrupting)),
        pytest.raises(KeyboardInterrupt),
    ):
        offline.run(engine, prompts, params, use_tqdm=False)
    deadline = time.monotonic() + 60
    while engine.stats().running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.stats().running, engine.stats().waiting, engine.stats().pages_used) == (0, 0, 0)
    assert engine.totals.generated_tokens < 3 * 200


def test_one_failed_request_of_a_call_cancels_the_others(engine):
    prompts = [tiny_llm.shared_llm().inputs.prompt("hello")] * 2
    params = [SamplingParams(temperature=0.0, max_tokens=2), SamplingParams(logprobs=999)]
    with pytest.raises(ValueError, match="logprobs=999 exceeds"):
        offline.run(engine, prompts, params, use_tqdm=False)
    assert engine.drain(60)
    assert engine.stats().pages_used == 0


def test_the_interpreter_ends_in_the_middle_of_a_text():
    script = """
import sys
sys.path.insert(0, "tests")
import conftest, engine_client, threading
engine = engine_client.make_engine()
begun = threading.Event()
listener, _ = engine_client.start(
    engine, [1, 2, 3], max_tokens=250, on_event=lambda *_: (begun.set(), print(type(_[1]).__name__))
)
begun.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "Delta"
    assert done.stdout.split()[-1] == "Failed"
    assert threading.active_count() < 20
