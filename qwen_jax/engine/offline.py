"""Calls that wait: lists of prompts in, lists of results out, or one text as a generator.

Knows prompts, results and the engine's events; knows no page and no array.
"""

import queue
import time
from collections.abc import Iterator

from tqdm import tqdm

from qwen_jax.engine.engine import Engine, Handle
from qwen_jax.engine.events import Delta, Event, Failed, Finished
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import RequestOutput


def run(
    engine: Engine, prompts: list[Prompt], params: list[SamplingParams], *, use_tqdm: bool
) -> list[RequestOutput]:
    """All prompts to their end; results in the order of the prompts.

    Raises:
        ValueError, RuntimeError: a request has failed, or could not begin. The others are
            cancelled then, as they are by an interrupt.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    results: dict[int, RequestOutput] = {}
    handles: list[Handle] = []
    total = sum(each.n for each in params)
    began, tokens = time.perf_counter(), 0
    try:
        with engine.together():
            for i, (prompt, given) in enumerate(zip(prompts, params, strict=True)):
                sink = lambda event, i=i: events.put((i, event))
                handles.append(engine.submit(prompt, given, sink))
        with tqdm(total=total, desc="requests", unit="req", disable=not use_tqdm) as bar:
            while len(results) < len(prompts):
                match events.get():
                    case _, Delta() as delta:
                        tokens += len(delta.token_ids)
                        rate = tokens / (time.perf_counter() - began)
                        bar.set_postfix_str(f"{rate:.1f} tok/s", refresh=False)
                        bar.update(delta.finish_reason is not None)
                    case i, Finished(result):
                        results[i] = result
                    case _, Failed(error):
                        raise error
    finally:
        for handle in handles:
            handle.cancel()
    return [results[i] for i in range(len(prompts))]


def stream(
    engine: Engine, prompt: Prompt, params: SamplingParams
) -> Iterator[tuple[str, RequestOutput | None]]:
    """One prompt: its new text as it comes, and at the end the result; closing it cancels.

    Raises:
        ValueError: ``params.n`` is not 1, or the request cannot run.
        RuntimeError: it has failed.
    """
    if params.n != 1:
        raise ValueError(f"n={params.n} cannot be streamed; use n=1, or generate")
    events: queue.SimpleQueue[Event] = queue.SimpleQueue()
    handle = engine.submit(prompt, params, events.put)
    try:
        while True:
            match events.get():
                case Delta(text=text):
                    yield text, None
                case Finished(result):
                    yield "", result
                    return
                case Failed(error):
                    raise error
    finally:
        handle.cancel()
