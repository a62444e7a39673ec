"""One process of a job of two, with four of its eight virtual devices each, for test_job.

python -m job_worker WHAT=WITH … --coordinator=HOST:PORT --num-processes=2 --process-id=I: writes
one JSON object to stdout. Knows what the tests ask of a process, and not what it should answer.
"""

import json
import os
import sys
import time
from unittest import mock

import jax
import numpy as np
import tensorstore as ts
import tiny_llm

from qwen_jax import distributed, watch
from qwen_jax.requests import SamplingParams
from qwen_jax.runtime import Runtime
from qwen_jax.weights import checkpoint, copying

MESH = "expert=4,tensor=2"
PROMPTS = ["def f(", "hello world, the"]
PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=9, logprobs=2, prompt_logprobs=1),
    SamplingParams(temperature=1.0, max_tokens=20, seed=3, n=2),
]
STREAMED = SamplingParams(temperature=0.0, max_tokens=24)


def texts(llm) -> list:
    """What a model says: to several prompts at once, and to one as it comes."""
    results = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
    streamed = "".join(event.text for event in llm.stream(PROMPTS[0], STREAMED))
    tokens = [[output.token_ids for output in result.outputs] for result in results]
    first = results[0].outputs[0]
    return [tokens, round(first.cumulative_logprob, 3), len(results[0].prompt_logprobs), streamed]


def open_llm(directory: str):
    """The model of `texts`."""
    with tiny_llm.few_shapes():
        return tiny_llm.LLM(directory, **{**tiny_llm.OPTIONS, "mesh": MESH})


def generate(directory: str) -> dict:
    llm = open_llm(directory)
    return {"texts": texts(llm), "kv_tokens": llm.plan.kv_tokens}


def load(directory: str) -> dict:
    """Loads a checkpoint over both processes: which bytes are read, and what arrives."""
    whole = checkpoint.load(directory, runtime=_runtime("expert=1", jax.local_devices()))
    read = _bytes_of_orbax()
    copied = []
    real = copying.copy_all
    with mock.patch.object(
        copying, "copy_all", lambda jobs: (copied.extend(x.nbytes for _, _, x in jobs), real(jobs))
    ):
        split = checkpoint.load(directory, runtime=_runtime(MESH, jax.devices()))
    pairs = list(zip(*map(jax.tree.leaves, (whole.params, split.params)), strict=True))
    shards = [(shard, np.asarray(x)) for x, y in pairs for shard in y.addressable_shards]
    distinct = {
        (leaf, str(shard.index)): shard.data.nbytes
        for leaf, (_, y) in enumerate(pairs)
        for shard in y.addressable_shards
    }
    return {
        "equal": all(np.array_equal(np.asarray(s.data), x[s.index]) for s, x in shards),
        "shards": len(shards),
        "mine": sum(distinct.values()),
        "all": sum(x.nbytes for x, _ in pairs),
        "read": sum(copied) or _bytes_of_orbax() - read,
    }


def _runtime(mesh: str, devices) -> Runtime:
    return Runtime.make(mesh=mesh, devices=devices)


def _bytes_of_orbax() -> int:
    found = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return int(found[0]["values"][0]["value"]) if found else 0


def wait_to_be_lost(first: str) -> dict:
    """Lives until another process does not; process 0 has no more work if ``first`` says so."""
    with mock.patch.object(watch, "SILENT_BEATS", 3):
        words = watch.LastWords()
        words.tell(f"process {distributed.index()} has lost process 0")
        watching = watch.Watch(f"process {distributed.index()} of 2", words)
        watching.start()
        print("ready", file=sys.stderr, flush=True)
        if first == "done" and distributed.index() == 0:
            watching.done()
        time.sleep(60)
    return {}


WORK = {"generate": generate, "load": load, "wait": wait_to_be_lost}


def main(argv: list[str]) -> None:
    *tasks, coordinator, count, process = argv
    of = lambda option: option.partition("=")[2]
    distributed.start(of(coordinator), int(of(count)), int(of(process)))
    stdout = os.dup(1)
    os.dup2(2, 1)  # Gloo greets on stdout
    found = {}
    for task in tasks:
        name, _, argument = task.partition("=")
        found[task] = WORK[name](argument)
    with open(stdout, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(sys.argv[1:])
