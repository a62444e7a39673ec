"""The engine: whatever else runs, a request's tokens are its own."""

import dataclasses
import threading

import engine_client as client
import jax
import numpy as np
import pytest
import tiny_llm
from engine_client import Listener, complete, make_engine, start
from llm_oracle import greedy

from qwen_jax.engine.compile_clock import compile_clock
from qwen_jax.engine.events import Delta, EngineClosed, Finished, QueueFull
from qwen_jax.requests import Prompt, SamplingParams

SEEDED = {"temperature": 0.8, "top_k": 20, "top_p": 0.95}
GENERATOR = np.random.default_rng(7)
SYSTEM = GENERATOR.integers(0, 256, 40)  # two full pages, and half of one


@pytest.fixture(scope="module")
def engine():
    engine = make_engine()
    yield engine
    engine.close()


def random_requests(count):
    """Prompts of 1 to 90 tokens, half of them with a common beginning, and parameters."""
    rng = np.random.default_rng(1)
    for i in range(count):
        prompt = rng.integers(0, 256, rng.integers(1, 50))
        if i % 2:
            prompt = np.concatenate([SYSTEM, prompt])
        params = {"max_tokens": int(rng.integers(40, 90) if i % 3 == 0 else rng.integers(1, 24))}
        if i % 3:
            params |= {**SEEDED, "seed": i}
        if i % 8 == 0:
            params |= {"presence_penalty": 1.5, "repetition_penalty": 1.2}
        if i % 7 == 0:
            params |= {"stop": ["e", "qz"]}
        if i % 11 == 0:
            params |= {"n": 2}
        yield prompt, params


def alone(engine, prompt, params):
    """The same request with nothing else in the engine, and nothing in its cache."""
    engine._core._pool.forget(range(16))
    return complete(engine, prompt, **params)


def test_64_requests_at_once_get_the_tokens_that_each_gets_alone(engine):
    requests = list(random_requests(64))
    before = engine.stats()
    cancelled = set(range(3, 64, 9))

    def cancel_soon(listener, event):
        if isinstance(event, Delta) and len(listener.deltas) == 2:
            handles[listener].cancel()

    handles, listeners = {}, []
    with engine.together():
        for i, (prompt, params) in enumerate(requests):
            on_event = cancel_soon if i in cancelled else None
            listener, handle = start(engine, prompt, on_event=on_event, **params)
            handles[listener] = handle
            listeners.append(listener)
    results = [listener.wait() for listener in listeners]
    after = engine.stats()
    assert after.preemptions > before.preemptions
    assert after.prefix_hit_tokens > before.prefix_hit_tokens
    assert (after.running, after.waiting, after.pages_used) == (0, 0, 0)
    aborted = 0
    for (prompt, params), listener, result in zip(requests, listeners, results, strict=True):
        expected = alone(engine, prompt, params)
        for output, whole in zip(result.outputs, expected, strict=True):
            aborted += output.finish_reason == "abort"
            end = len(output.token_ids) if output.finish_reason == "abort" else None
            assert output.token_ids == whole[:end]
            deltas = [d for d in listener.deltas if d.index == output.index]
            assert [t for d in deltas for t in d.token_ids] == output.token_ids
    assert 0 < aborted < len(cancelled) * 2


def test_greedy_tokens_are_those_of_the_model(engine):
    (tokens,) = complete(engine, SYSTEM, max_tokens=10)
    assert tokens == greedy(tiny_llm.shared_llm(), SYSTEM.tolist(), 10)


# ---- prefixes ------------------------------------------------------------------------------------


def test_a_prefix_in_the_cache_is_not_computed_again_and_changes_nothing(engine):
    first = alone(engine, SYSTEM, {"max_tokens": 20})
    listener, _ = start(engine, SYSTEM, max_tokens=20)
    result = listener.wait()
    assert [result.outputs[0].token_ids] == first
    assert result.metrics.cached_tokens == 32
    longer = [*SYSTEM, *first[0]]  # the next turn: what was generated is in the cache too
    result = start(engine, longer)[0].wait()
    assert result.metrics.cached_tokens == (len(longer) - 1) // 16 * 16
    assert [result.outputs[0].token_ids] == alone(engine, longer, {})


def test_at_least_one_token_of_a_prompt_is_computed(engine):
    prompt = GENERATOR.integers(0, 256, 32)
    expected = alone(engine, prompt, {})
    result = start(engine, prompt)[0].wait()
    assert (result.metrics.cached_tokens, result.outputs[0].token_ids) == (16, expected[0])


def test_several_completions_share_the_prompts_pages(engine):
    most = 0

    def look(listener, event):
        nonlocal most
        most = max(most, engine.stats().pages_used)

    prompt = GENERATOR.integers(0, 256, 90)  # 6 pages, 5 of them full
    before = engine.totals.steps
    params = {"n": 4, "seed": 3, "max_tokens": 5, **SEEDED}
    result = start(engine, prompt, on_event=look, **params)[0].wait()
    assert most == 5 + 4
    assert result.metrics.prompt_tokens == 90
    assert engine.totals.steps - before < 16  # unshared: 4 x 90 tokens in chunks of 24
    tokens = [output.token_ids for output in result.outputs]
    assert len({tuple(each) for each in tokens}) == 4
    assert tokens == alone(engine, prompt, params)


def test_prompt_logprobs_need_the_whole_prompt(engine):
    plain = complete(engine, SYSTEM)
    result = start(engine, SYSTEM, prompt_logprobs=0)[0].wait()
    assert result.metrics.cached_tokens == 0
    assert [entry and list(entry) for entry in result.prompt_logprobs] == [
        None,
        *([token] for token in SYSTEM[1:]),
    ]
    assert [result.outputs[0].token_ids] == plain


# ---- pages that run out --------------------------------------------------------------------------


def test_a_row_that_gave_its_pages_up_goes_on_where_it_was(engine):
    prompts = GENERATOR.integers(0, 256, (4, 60))
    params = {"max_tokens": 60, "seed": 1, **SEEDED}  # 8 pages each in the end, of 16
    before = engine.stats().preemptions
    with engine.together():
        listeners = [start(engine, prompt, **params)[0] for prompt in prompts]
    found = [listener.wait().outputs[0].token_ids for listener in listeners]
    assert engine.stats().preemptions > before
    assert found == [alone(engine, prompt, params)[0] for prompt in prompts]


def test_a_request_as_long_as_the_cache_runs(engine):
    prompt = GENERATOR.integers(0, 256, 200)
    result = start(engine, prompt, max_tokens=None)[0].wait()
    assert len(result.outputs[0].token_ids) == client.MAX_LEN - 200
    assert result.outputs[0].finish_reason == "length"


# ---- ends ----------------------------------------------------------------------------------------


def test_a_cancelled_request_frees_its_pages_at_once(engine):
    begun = threading.Event()
    listener = Listener(lambda *_: begun.set())
    params = SamplingParams(temperature=0.0, max_tokens=200, ignore_eos=True)
    prompt = Prompt(tuple(SYSTEM.tolist()))
    handle = engine.submit(prompt, params, listener, request_id="mine")
    assert begun.wait(60)
    handle.cancel()
    handle.cancel()
    result = listener.wait()
    assert (handle.request_id, result.request_id) == ("mine", "mine")
    assert result.outputs[0].finish_reason == "abort"
    assert 0 < len(result.outputs[0].token_ids) < 200
    assert sum(isinstance(event, Finished) for event in listener.events) == 1
    assert (engine.stats().pages_used, engine.stats().running) == (0, 0)
    handle.cancel()


def test_a_request_that_waits_can_be_cancelled(engine):
    prompts = GENERATOR.integers(0, 256, (10, 30))
    with engine.together():
        started = [start(engine, prompt, max_tokens=20) for prompt in prompts]
        started[9][1].cancel()
    outputs = [listener.wait().outputs[0] for listener, _ in started]
    assert [o.finish_reason for o in outputs] == ["length"] * 9 + ["abort"]
    assert outputs[9].token_ids == []


def test_a_closed_engine_fails_what_is_unfinished_and_takes_no_more():
    engine = make_engine()
    listener, _ = start(engine, SYSTEM, max_tokens=200)
    engine.close()
    with pytest.raises(EngineClosed, match="request 0: the engine was closed"):
        listener.wait()
    with pytest.raises(EngineClosed, match="takes no more requests"):
        start(engine, SYSTEM)
    engine.close()


def test_a_drained_engine_finishes_what_it_has():
    engine = make_engine()
    listener, _ = start(engine, SYSTEM, max_tokens=30)
    assert not engine.drain(0)
    with pytest.raises(EngineClosed, match="takes no more requests"):
        start(engine, SYSTEM)
    assert engine.drain(120)
    assert len(listener.wait().outputs[0].token_ids) == 30
    engine.close()


def test_a_full_queue_refuses():
    engine = make_engine(waiting=3)
    with engine.together():
        listeners = [start(engine, SYSTEM, max_tokens=2)[0] for _ in range(3)]
        with pytest.raises(QueueFull, match="3 requests wait already, max_waiting=3"):
            start(engine, SYSTEM)
    for listener in listeners:
        listener.wait()
    assert complete(engine, SYSTEM, max_tokens=2)
    engine.close()


# ---- threads and programs ------------------------------------------------------------------------


def test_threads_may_submit_at_the_same_time(engine):
    prompts = GENERATOR.integers(0, 256, (12, 20))
    expected = [alone(engine, prompt, {}) for prompt in prompts]
    found = {}

    def work(part):
        for i in range(part, 12, 3):
            found[i] = complete(engine, prompts[i])

    threads = [threading.Thread(target=work, args=(part,)) for part in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(12)] == expected


def test_the_thread_ends_when_there_is_nothing_to_do_and_comes_back(monkeypatch):
    monkeypatch.setattr("qwen_jax.engine.driver._LINGER", 0.01)
    engine = make_engine()
    first = complete(engine, SYSTEM)
    thread = engine._driver._thread
    if thread is not None:
        thread.join(60)
    assert engine._driver._thread is None
    assert complete(engine, SYSTEM) == first
    engine.close()


def test_nothing_is_compiled_after_the_warm_up():
    engine = make_engine()
    said = []
    engine.warmup(lambda done, of: said.append((done, of)))
    assert said[-1] == (len(said) - 1,) * 2
    before = compile_clock().programs
    requests = [
        *random_requests(12),
        (SYSTEM, {"logprobs": 3, "prompt_logprobs": 2, "max_tokens": 4}),
        (SYSTEM, {"logit_bias": {5: 1.0}, "min_tokens": 2, "stop_token_ids": [7]}),
        (SYSTEM[:1], {"allowed_token_ids": [4, 9], "logprobs": 0}),
    ]
    with engine.together():
        listeners = [start(engine, prompt, **params)[0] for prompt, params in requests]
    for listener in listeners:
        listener.wait()
    assert compile_clock().programs == before
    jax.jit(lambda x: 5 * x)(1.0)
    assert compile_clock().programs > before  # so the clock runs
    engine.close()


def test_the_host_waits_for_the_device_and_not_the_other_way(engine):
    before = engine.totals
    complete(engine, SYSTEM, max_tokens=100)
    spent = dataclasses.replace(engine.totals) - before
    assert spent.generated_tokens == 100
    assert spent.decode_tokens == 99
    assert spent.steps > 99
    assert spent.wait_time > 0
    assert spent.host_time > 0
