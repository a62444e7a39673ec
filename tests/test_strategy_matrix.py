"""Every strategy on every mesh of eight devices computes what one device computes.

A tiny vision-language model with experts, in float32 and in block FP8: its tower, a chunk of
prompts with a picture, the rest of them beside a row that decodes, and a decode step. CI takes
every `_EVERY`th mesh and strategy of all that divide and differ, in FP8; all of them, in both:

    pytest tests/test_strategy_matrix.py --all-strategies
"""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from tiny.vision import vision_config

from qwen_jax import sharding
from qwen_jax.model import vision
from qwen_jax.model.cache import VisualRows, make_cache, pack, row_ways
from qwen_jax.model.step import jit_step
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import STRATEGIES, Rules
from qwen_jax.weights import derive, hf_config
from qwen_jax.weights.config import ModelConfig, QuantConfig

MESHES = [
    {axis: n for axis, n in zip(sharding.AXES, sizes, strict=True) if n > 1}
    for sizes in itertools.product((1, 2, 4, 8), repeat=3)
    if np.prod(sizes) == 8
]
_FIRST, _EVERY = 6, 17  # tensor, sequence and row splits among them
ONE = {"tensor": 1}
PAGE, WIDTH, TOKENS = 4, 4, 16
PROMPTS = ((3, 14, 15, 9, 2, 6, 5), (35,), (8, 9, 7, 9, 3), (23, 8))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Sizes that eight divides, but for the heads of keys and values, which are repeated.
TEXT = {
    "head_dim": 16,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "mlp_only_layers": [1],
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rope_scaling": {
        "mrope_interleaved": True,
        "mrope_section": [4, 2, 2],
        "rope_type": "default",
    },
    "vocab_size": 64,
}
TOWER = {
    "deepstack_visual_indexes": [0],
    "depth": 1,
    "hidden_size": 64,
    "num_heads": 8,
    "out_hidden_size": 32,
}


@functools.cache
def model(fp8: bool) -> ModelConfig:
    raw = vision_config("vl_moe")
    ids = {f"{name}_token_id": 60 + i for i, name in enumerate(("image", "video"))}
    ids |= {f"vision_{name}_token_id": 62 + i for i, name in enumerate(("start", "end"))}
    config = hf_config.from_hf(
        {
            **raw,
            **ids,
            "text_config": {**raw["text_config"], **TEXT},
            "vision_config": {**raw["vision_config"], **TOWER},
        }
    )
    quant = QuantConfig(block=(4, 4), skip=derive.KEPT_EXACT)
    return dataclasses.replace(config, quantization=quant) if fp8 else config


@functools.cache
def weights(fp8: bool):
    machine = Runtime.make(mesh=ONE, dtype="float32")
    return derive.init(model(fp8), 0, "float32", machine.mesh, machine.rules)


def outcome(mesh, strategy: str | Rules, fp8: bool) -> list[np.ndarray]:
    """The tower's features, and logits of every token of three steps."""
    config = model(fp8)
    machine = Runtime.make(mesh=mesh, strategy=strategy, dtype="float32", page_size=PAGE)
    places = derive.shardings(config, machine.mesh, machine.rules)
    params = jax.device_put(weights(fp8), places)
    features = vision.jit_encode(params.vision, picture(), config.vision, machine)
    # Rows are on any device, so each has as many pages as all of them need.
    count = row_ways(machine) * len(PROMPTS) * WIDTH
    table = np.stack(
        [
            (row % row_ways(machine)) * len(PROMPTS) * WIDTH + np.arange(WIDTH) + WIDTH * row
            for row in range(len(PROMPTS))
        ]
    )
    cache = make_cache(config.text, machine, count)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    found = [np.asarray(features.rows), np.asarray(features.levels)]
    for rows, cached, size, source in steps():
        batch = pack(rows, cached, table, num_tokens=size)
        if source is not None:
            batch = batch.replace(visual=VisualRows(features.rows, features.levels, source))
        out = jit_step(params, config, machine, batch, cache, logits="all")
        cache = out.cache
        found.append(np.asarray(out.logits)[: sum(map(len, rows))])
    return found


def steps():
    """Rows, what is cached, T, and which token takes which feature of the picture."""
    source = np.full(TOKENS, -1, np.int32)
    first, second = source.copy(), source.copy()
    first[1:4], second[0] = [0, 1, 2], 3  # the picture's last row comes with the second chunk
    halves = [-(-len(p) // 2) for p in PROMPTS]
    yield [p[:h] for p, h in zip(PROMPTS, halves, strict=True)], [0] * 4, TOKENS, first
    rest = [p[h:] or (1,) for p, h in zip(PROMPTS, halves, strict=True)]
    yield rest, halves, TOKENS, second
    lengths = [h + len(r) for h, r in zip(halves, rest, strict=True)]
    yield [(4,), (), (5,), (6,)], lengths, 4, None


def picture() -> vision.VisionBatch:
    """Four by four patches of noise."""
    rng = np.random.default_rng(0)
    at = np.array([(y, x) for y in range(4) for x in range(4)], np.int32)
    return vision.VisionBatch(
        patches=jnp.asarray(rng.integers(0, 256, (16, 3 * 2 * 16 * 16)), jnp.uint8),
        coordinates=jnp.asarray(at),
        taps=jnp.asarray(rng.integers(0, 36, (4, 16)), jnp.int32),
        tap_weights=jnp.full((4, 16), 0.25, jnp.float32),
        segment_starts=jnp.array([0, 16, 16], jnp.int32),
    )


@functools.cache
def wanted(fp8: bool) -> list[np.ndarray]:
    found = outcome(ONE, "replicated", fp8)
    assert all(np.std(each) > 0.1 for each in found)  # or the tolerance would mean nothing
    return found


@functools.cache
def matrix() -> list[tuple[dict[str, int], str]]:
    """All that divide, less those that mean the same on a mesh as one before."""
    found = {}
    for sizes, (name, rules) in itertools.product(MESHES, STRATEGIES.items()):
        machine = Runtime.make(mesh=sizes, strategy=name, dtype="float32", page_size=PAGE)
        try:
            for fp8 in (False, True):
                derive.shardings(model(fp8), machine.mesh, rules)
        except ValueError:
            continue
        used = tuple((x, sharding.live(machine.mesh, axes)) for x, axes in rules.table)
        used = tuple((x, tuple(sizes[a] for a in axes), axes) for x, axes in used if axes)
        found.setdefault(used, (sizes, name))
    return list(found.values())


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--all-strategies")
        cases = matrix() if whole else matrix()[_FIRST::_EVERY]
        names = [f"{name} on {','.join(f'{a}={n}' for a, n in s.items())}" for s, name in cases]
        metafunc.parametrize("case", cases, ids=names)
        forms = {"fp8": True, "float32": False} if whole else {"fp8": True}
        metafunc.parametrize("fp8", forms.values(), ids=forms)


@pytest.fixture(autouse=True)
def _programs_are_dropped(request):
    """The whole matrix has more programs than a process has memory maps for (see conftest)."""
    yield
    if request.config.getoption("--all-strategies"):
        jax.clear_caches()


def test_sharded_equals_unsharded(case, fp8):
    for ours, theirs in zip(outcome(*case, fp8), wanted(fp8), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_the_matrix_holds_every_strategy_and_every_mesh():
    assert len(MESHES) == 10
    assert {name for _, name in matrix()} == set(STRATEGIES)
    assert {tuple(sizes.items()) for sizes, _ in matrix()} == {tuple(s.items()) for s in MESHES}


AXES = st.lists(st.sampled_from(sharding.AXES), unique=True).map(tuple)


@hypothesis.settings(max_examples=2, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    sizes=st.sampled_from(MESHES),
    heads=AXES,
    others=st.fixed_dictionaries(dict.fromkeys("EFIVTB", AXES)),
)
def test_any_rules_that_divide_equal_unsharded(sizes, heads, others):
    rules = Rules.of({"N": heads, "K": heads, **others})
    split = [x for x in "NEFT" if any(axis in sizes for axis in rules.axes(x))]
    hypothesis.assume(len(split) > 2)  # plain ones are in the matrix
    machine = Runtime.make(mesh=sizes, strategy=rules, dtype="float32", page_size=PAGE)
    try:
        derive.shardings(model(False), machine.mesh, rules)
        make_cache(model(False).text, machine, row_ways(machine) * WIDTH)
    except ValueError:  # a mesh axis twice in one array, or a size that does not divide
        hypothesis.reject()
    for ours, theirs in zip(outcome(sizes, rules, False), wanted(False), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)
