"""One process has the requests and the others follow: they work on the same, whatever it is.

Process 0 comes first, and what it said is heard by process 1 after it, as in test_distributed.
"""

import contextlib
import copy
import json
import logging
import os
import signal
import threading
from unittest import mock

import numpy as np
import pytest
import tiny_llm
import vision_model
from coordination import as_process, share, two_processes
from engine_client import Listener

from qwen_jax import distributed
from qwen_jax.engine import turns
from qwen_jax.engine.engine import Engine
from qwen_jax.engine.events import EngineClosed
from qwen_jax.engine.led import led
from qwen_jax.engine.pictures import FeatureStore
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.structured.forms import matchers


@pytest.fixture
def service():
    with two_processes() as service:
        yield service


def open_alone(shared_llm=tiny_llm.shared_llm):
    """A model of this process, with an engine of its own."""
    with mock.patch.object(distributed, "count", return_value=1):
        llm = copy.copy(shared_llm())
        old, store = llm.engine, llm.engine.runner.views.store
        model = (llm.params, llm.config, llm.runtime)
        features = FeatureStore.make(*model, store and store._rules)
        llm.engine = Engine(
            *model, old._defaults, old._limits, features=features, constraints=matchers
        )
    return llm


@contextlib.contextmanager
def process(index, shared_llm=tiny_llm.shared_llm):
    """A model that two processes have, as process ``index`` has it."""
    llm = open_alone(shared_llm)
    with as_process(index), contextlib.closing(llm.engine):
        share(llm.engine)
        yield llm


def submit(llm, text, *, on_event=None, **params):
    """Hands a request over; the listener and the handle."""
    prompt = text if isinstance(text, Prompt) else llm.inputs.prompt(text)
    given = SamplingParams(**{"temperature": 1.0, "max_tokens": 9, "ignore_eos": True, **params})
    listener = Listener(on_event)
    return listener, llm.engine.submit(prompt, llm.forms.compiled(given, prompt), listener)


def tokens(listener):
    return [output.token_ids for output in listener.wait().outputs]


def follow(service, wanted, shared_llm=tiny_llm.shared_llm):
    """Process 1 behind process 0: it makes the same tokens in as many steps, and hears all."""
    with process(1, shared_llm) as llm:
        llm.engine.follow(llm.forms.compiled)
        core = llm.engine._core
        assert (core.digest, core.totals.steps) == (wanted.digest, wanted.totals.steps)
        assert core.digest != 0
        assert not core.busy
        assert core.stats().pages_used == 0
        assert llm.engine._lead.number() == wanted.scheduler.test_number
        assert not [key for key in service.values if "/told/" in key]
        return llm


def ended(llm):
    """What process 1 is held against."""
    core = llm.engine._core
    core.scheduler.test_number = llm.engine._lead.number()
    return core


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORM = {"json": SCHEMA, "disable_any_whitespace": True}


def test_a_follower_works_on_all_that_the_leader_submits(service):
    with process(0) as llm:
        with llm.engine.lead():
            requests = [
                submit(llm, "def f(", seed=3, n=2),
                submit(llm, "free"),
                submit(llm, "two", structured_outputs=FORM, ignore_eos=False, max_tokens=40),
                submit(llm, "three", stop=["e", "ö"], logit_bias={5: 1.5}, ignore_eos=False),
            ]
            found = [tokens(listener) for listener, _ in requests]
        # Alone, and with the numbers that these requests had: the same tokens.
        alone = open_alone()
        again = [
            tokens(submit(alone, "def f(", seed=3, n=2)[0]),
            tokens(submit(alone, "free")[0]),
        ]
        alone.engine.close()
        assert found[:2] == again
        assert json.loads(requests[2][0].wait().outputs[0].text).keys() == {"a"}
        core = ended(llm)
    follow(service, core)


def test_a_cancellation_and_a_broken_sink_end_a_request_in_all_processes(service, caplog):
    def fail(listener, event):
        raise KeyError("gone")

    with caplog.at_level(logging.CRITICAL), process(0) as llm:
        with llm.engine.lead():
            began = threading.Event()
            endless = submit(llm, "x", max_tokens=200, on_event=lambda *_: began.set())
            broken, _ = submit(llm, "y", max_tokens=200, on_event=fail)
            assert began.wait(120)
            endless[1].cancel()
            assert endless[0].wait().outputs[0].finish_reason == "abort"
            assert len(tokens(submit(llm, "z")[0])[0]) == 9
            endless[1].cancel()  # it is over: nobody hears of it
        assert 1 <= len(broken.events) <= 2
        assert llm.engine.totals.generated_tokens < 2 * 200
        core = ended(llm)
    follow(service, core)


def test_what_is_not_over_when_the_leader_stops_fails(service):
    with process(0) as llm:
        with llm.engine.lead():
            began = threading.Event()
            listener, handle = submit(llm, "x", max_tokens=200, on_event=lambda *_: began.set())
            assert began.wait(120)
        with pytest.raises(EngineClosed, match="request 0: process 0 leads no more"):
            listener.wait()
        handle.cancel()
        # From here on all processes submit, as before.
        assert len(tokens(submit(llm, "y", temperature=0.0)[0])[0]) == 9
        first = llm.engine._core
    with process(1) as llm:
        llm.engine.follow(llm.forms.compiled)
        assert len(tokens(submit(llm, "y", temperature=0.0)[0])[0]) == 9
        assert llm.engine._core.digest == first.digest


def test_pictures_reach_a_follower_in_pieces(service, monkeypatch):
    monkeypatch.setattr(turns, "_PIECE", 1000)
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)
    said = mock.Mock(side_effect=service.key_value_set)
    make = vision_model.shared_llm
    with process(0, make) as llm, mock.patch.object(service, "key_value_set_bytes", said):
        prompt = llm.inputs.prompt(
            {"prompt": "see <|image_pad|> and", "multi_modal_data": {"image": [image]}}
        )
        with llm.engine.lead():
            found = tokens(submit(llm, prompt, temperature=0.0)[0])
        assert len(found[0]) == 9
        core = ended(llm)
    sizes = [len(call.args[1]) for call in said.call_args_list]
    assert sum(sizes) > prompt.vision.pictures[0].patches.nbytes > 10_000
    assert max(sizes) == 1000
    llm = follow(service, core, make)
    assert llm.engine.runner.views.store.encoded == 1


# ---- work of process 0 ---------------------------------------------------------------------------


def work_of(index, work):
    with process(index) as llm:
        return led(llm.engine, llm.forms.compiled, lambda: work(llm))


def test_all_get_the_result_of_the_work_that_process_0_does(service):
    def work(llm):
        return str(tokens(submit(llm, "def f(", temperature=0.0)[0]))

    found = work_of(0, work)
    assert len(json.loads(found)[0]) == 9
    never = mock.Mock()
    assert work_of(1, never) == found
    never.assert_not_called()


def test_an_engine_of_one_process_just_works():
    llm = tiny_llm.shared_llm()
    assert not llm.engine.shared
    assert led(llm.engine, llm.forms.compiled, lambda: "done") == "done"


def test_a_failure_of_process_0_is_one_of_all(service):
    def work(llm):
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        work_of(0, work)
    with pytest.raises(RuntimeError, match=r"process 0 has failed: ValueError\('no such file'\)"):
        work_of(1, work)


def test_an_engine_that_stops_is_told_to_nobody_as_an_end(service, caplog):
    """Process 0 must fail then, or the others would wait for it."""

    def work(llm):
        lost = mock.patch.object(llm.engine.runner, "forward", side_effect=RuntimeError("a link"))
        with lost, pytest.raises(EngineClosed, match=r"the engine has stopped.*a link"):
            submit(llm, "x")[0].wait()
        return ""

    with (
        caplog.at_level(logging.CRITICAL),
        pytest.raises(EngineClosed, match=r"the engine has stopped.*a link"),
    ):
        work_of(0, work)


def test_who_leads_and_who_follows_must_be_clear(service, caplog):
    with process(0) as llm:
        tokens(submit(llm, "x")[0])
    with (
        caplog.at_level(logging.CRITICAL),
        process(1) as llm,
        pytest.raises(EngineClosed, match="process 0 does not lead: no other process may follow"),
    ):
        llm.engine.follow(llm.forms.compiled)


def test_who_does_not_follow_a_leader_is_told(service, caplog):
    with process(0) as llm, llm.engine.lead():
        tokens(submit(llm, "x")[0])
    with (
        caplog.at_level(logging.CRITICAL),
        process(1) as llm,
        pytest.raises(EngineClosed, match="process 0 leads: all other processes must follow"),
    ):
        submit(llm, "x")[0].wait()


def test_signals_are_for_process_0(service):
    def work(llm):
        listener, _ = submit(llm, "x")
        return listener.wait().outputs[0].finish_reason

    assert work_of(0, work) == "length"
    real = turns.Turns.hear

    def interrupted(self):
        for kind in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), kind)
        return real(self)

    before = signal.getsignal(signal.SIGTERM)
    with mock.patch.object(turns.Turns, "hear", interrupted):
        assert work_of(1, work) == "length"
    assert signal.getsignal(signal.SIGTERM) == before
