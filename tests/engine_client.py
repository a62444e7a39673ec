"""What the engine's tests share: small engines over the tiny model, and a client that listens."""

import functools
import threading

import tiny_llm

from qwen_jax.engine.engine import Engine, Limits
from qwen_jax.engine.events import Delta, Failed, Finished
from qwen_jax.engine.request import Defaults
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.runtime import Buckets, Runtime

PAGE, MAX_LEN, ROWS = 16, 256, 8
BUCKETS = Buckets(tokens=(32,), rows=(ROWS,))


@functools.cache
def runtime() -> Runtime:
    """One device, one shape of each kind."""
    return Runtime.make(mesh="expert=1", dtype="float32", page_size=PAGE, buckets=BUCKETS)


def make_engine(*, pages=16, waiting=None, seed=0, params=None, **options) -> Engine:
    """An engine of 8 rows over the tiny model; of 16 pages 8 rows cannot have 3 each."""
    llm = tiny_llm.shared_llm()
    return Engine(
        llm.params if params is None else params,
        llm.config,
        runtime(),
        Defaults(llm.tokenizer, (287, 289), MAX_LEN, seed),
        Limits(ROWS, 24, pages, waiting),
        **options,
    )


class Listener:
    """A sink that keeps the events, and lets others wait for the last one."""

    def __init__(self, on_event=None):
        self.events, self._over, self._on_event = [], threading.Event(), on_event

    def __call__(self, event):
        self.events.append(event)
        if self._on_event is not None:
            self._on_event(self, event)
        if isinstance(event, Finished | Failed):
            self._over.set()

    def wait(self):
        """The result; raises the error of a request that has failed."""
        assert self._over.wait(120), "no last event"
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        return last.result

    @property
    def deltas(self):
        return [event for event in self.events if isinstance(event, Delta)]


def start(engine, token_ids, *, on_event=None, rule=None, **params):
    """Submits; the listener and the handle. ``rule`` is given as the structured output."""
    listener = Listener(on_event)
    given = SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_eos": True, **params})
    # As it is: what a form may be is not the engine's matter.
    object.__setattr__(given, "structured_outputs", rule)
    prompt = Prompt(tuple(int(token) for token in token_ids))
    return listener, engine.submit(prompt, given, listener)


def complete(engine, token_ids, **params):
    """Tokens of each of a request's sequences."""
    result = start(engine, token_ids, **params)[0].wait()
    return [output.token_ids for output in result.outputs]
