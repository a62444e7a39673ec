"""Rows on many devices: in the generate loop, in the engine, and one by one.

That every strategy computes what one device computes is `test_strategy_matrix`.
"""

import functools
import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from qwen_jax import functional
from qwen_jax.llm import LLM
from qwen_jax.model.cache import make_cache
from qwen_jax.model.row_shards import rows_here
from qwen_jax.requests import SamplingParams
from qwen_jax.runtime import Buckets, Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights import checkpoint

PAGE = 16


@functools.cache
def directory(variant: str) -> str:
    kept = tempfile.TemporaryDirectory(prefix="tiny-strategies-")
    _KEPT.append(kept)
    return str(tiny.write(kept.name, variant))


_KEPT: list[tempfile.TemporaryDirectory] = []  # until the run ends


def runtime(mesh: str, strategy: str | Rules) -> Runtime:
    small = Buckets(tokens=(64,), rows=(4,), pages=(4,), new_tokens=(16,))
    return Runtime.make(
        mesh=mesh, strategy=strategy, dtype="float32", page_size=PAGE, buckets=small
    )


def test_long_rows_and_their_tokens_are_generated_wherever_their_pages_are():
    prompts = [tiny.prompt(n, 128, seed=n).tolist() for n in (5, 17, 3)]
    tokens = []
    for mesh, strategy in (("tensor=1", "replicated"), ("data=4,tensor=2", "dp-attention+ep")):
        machine = runtime(mesh, strategy)
        loaded = checkpoint.load(checkpoint.resolve(directory("moe")), runtime=machine)
        state = functional.generate(
            loaded.params, loaded.config, prompts, max_new_tokens=8, runtime=machine
        )
        tokens.append(np.asarray(state.tokens)[:3, :8])
    np.testing.assert_array_equal(*tokens)


def test_a_device_takes_its_own_rows_to_the_front_and_puts_them_back():
    row_starts = jnp.array([0, 2, 3, 3, 5])  # two, one, no and two tokens; then padding
    kv_lens = jnp.array([4, 9, 0, 2])
    pages = jnp.array([[1, 2], [9, 8], [12, 0], [3, 0]])
    here = rows_here(row_starts, kv_lens, pages, first_page=0, num_pages=8, num_tokens=7)
    np.testing.assert_array_equal(here.order[:4], [0, 1, 3, 4])
    np.testing.assert_array_equal(here.row_starts, [0, 2, 2, 2, 4])
    np.testing.assert_array_equal(here.kv_lens, [4, 0, 0, 2])
    x = jnp.arange(7)
    np.testing.assert_array_equal(here.put_back(here.take(x)), x)
    there = rows_here(row_starts, kv_lens, pages, first_page=8, num_pages=8, num_tokens=7)
    np.testing.assert_array_equal(there.order[:1], [2])
    np.testing.assert_array_equal(there.page_table[1], [1, 0])
    np.testing.assert_array_equal(there.row_starts, [0, 0, 1, 1, 1])


def test_pages_that_do_not_split_are_refused():
    machine = runtime("data=4,tensor=2", "dp-attention+ep")
    config = checkpoint.read_config(checkpoint.resolve(directory("moe")))
    with pytest.raises(ValueError, match=r"6 pages do not split over data\+expert=4"):
        make_cache(config.text, machine, 6)


def test_the_engine_keeps_each_row_where_its_pages_are():
    prompts = [{"prompt_token_ids": tiny.prompt(n, 128, seed=n).tolist()} for n in (5, 40, 3, 17)]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    buckets = Buckets(tokens=(64,), rows=(4,))
    found = []
    for mesh, strategy in (("tensor=1", "auto"), ("data=2,tensor=2", "dp-attention+ep+tp")):
        made = functools.partial(Runtime.make, buckets=buckets)
        with mock.patch.object(Runtime, "make", made):
            llm = LLM(
                directory("moe"),
                mesh=mesh,
                strategy=strategy,
                max_model_len=64,
                page_size=PAGE,
                max_num_seqs=4,
                dtype="float32",
            )
        results = llm.generate(prompts, params, use_tqdm=False)
        found.append([result.outputs[0].token_ids for result in results])
    assert found[0] == found[1]
