"""The parity ladder against golden files: rope, norm, attention, experts, layer, logits, tokens.

The files hold what transformers computed (`scripts/make_goldens.py`), so these tests need neither
torch nor transformers. Each rung starts from transformers' own values, so that the first one to
fail names the part that is wrong.
"""

import dataclasses
import json
import pathlib
import re
from functools import partial

import forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding, PartitionSpec

from qwen_jax.model.cache import pack
from qwen_jax.model.norm import rms_norm
from qwen_jax.model.rope import angles
from qwen_jax.model.routing import route
from qwen_jax.model.step import step
from qwen_jax.model.text import decoder_layer
from qwen_jax.runtime import Runtime
from qwen_jax.weights.checkpoint import Loaded, load
from qwen_jax.weights.params import Layer, Moe

GOLDEN = pathlib.Path(__file__).parent / "golden"
PROMPTS = (1, 7, 33, 130)
GREEDY_AFTER = 33
LADDER_PROMPT = 7
NEW_TOKENS = 16
LOGITS = 2e-4  # the promise, for logits of unit scale
# Two runs of transformers itself with different numbers of threads differ by 1.8e-5 here.
RUNG = 5e-5
STEP_TOKENS = sum(PROMPTS) + 3  # the last three are padding
WIDTH = -(-(max(PROMPTS) + NEW_TOKENS) // forward.PAGE_SIZE)
# Compiling is nearly all of the time here, so each variant compiles its layers once, for one shape,
# and the whole program and the narrow form of decoding are left to the live tests, but for these.
NARROW_DECODE = ("moe_fp8", "moe_wide_heads")


@dataclasses.dataclass(frozen=True)
class Case:
    """One variant: the golden values, and our side of it."""

    variant: str
    golden: dict[str, np.ndarray]
    directory: pathlib.Path
    loaded: Loaded
    runtime: Runtime


@pytest.fixture(scope="module", params=tiny.VARIANTS)
def case(request, tmp_path_factory) -> Case:
    directory = tiny.write(tmp_path_factory.mktemp(request.param), request.param)
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        golden = dict(file)
    runtime = forward.one_device()
    return Case(request.param, golden, directory, load(directory, runtime=runtime), runtime)


@pytest.fixture(scope="module")
def run(case: Case) -> forward.Run:
    decode_tokens = len(PROMPTS) if case.variant in NARROW_DECODE else STEP_TOKENS
    prompts = [case.golden[f"tokens_{length}"] for length in PROMPTS]
    return forward.run(
        case.loaded, case.runtime, prompts, NEW_TOKENS, step=step, decode_tokens=decode_tokens
    )


@pytest.fixture(scope="module")
def rungs(case: Case) -> dict[str, np.ndarray]:
    """What we make of transformers' values, by the golden files' names."""
    layers = {int(m[1]) for name in case.golden if (m := re.match(r"layer(\d+)\.", name))}
    return {
        f"layer{index}.{name}": np.asarray(x)[:LADDER_PROMPT]
        for index in sorted(layers)
        for name, x in one_layer(case, index).items()
    }


def one_layer(case: Case, index: int) -> dict[str, jax.Array]:
    """Every rung of one layer, each from the golden values below it; padding goes in as NaN.

    Attention and MLP are taken from the compiled layer itself: one without an output projection
    adds its MLP alone to the stream, one whose MLP is zero its attention.
    """
    config, weights = case.loaded.config.text, case.loaded.params.layers[index]
    at, padding = f"layer{index}.", ((0, STEP_TOKENS - LADDER_PROMPT), (0, 0))
    # On the mesh, where the model's own stream lies: otherwise the layer would compile anew.
    place = NamedSharding(case.runtime.mesh, PartitionSpec())
    given = {
        name.removeprefix(at): jax.device_put(np.pad(x, padding, constant_values=np.nan), place)
        for name, x in case.golden.items()
        if name.startswith(at) and x.dtype == np.float32 and x.ndim == 2
    }
    table = forward.page_table(len(PROMPTS), WIDTH)
    batch = pack([[0] * LADDER_PROMPT], [0], table, num_tokens=STEP_TOKENS)
    empty = forward.poisoned_cache(case.loaded, case.runtime, table.size).pages[index]
    rotary = angles(config.rope, config.head_dim, batch.positions)

    def layer(weights, stream):
        out = decoder_layer(
            weights, stream, rotary, batch, empty, None, config=config, runtime=case.runtime
        )
        return out.x_TD, out.pages

    without_attention, without_mlp = silenced(weights)
    middle = given["input"] + given["attn"]
    after_attention, pages = layer(without_mlp, given["input"])
    kv = pages[table[0, 0], :LADDER_PROMPT]
    rungs = {
        "attn_norm": rms_norm(given["input"], weights.attn_norm, config.rms_norm_eps),
        "k": kv[:, 0::2],
        "v": kv[:, 1::2],
        "attn": after_attention - given["input"],
        "ffn_norm": rms_norm(middle, weights.mlp_norm, config.rms_norm_eps),
        "ffn": layer(without_attention, middle)[0] - middle,
        "output": layer(weights, given["input"])[0],
    }
    if isinstance(weights.mlp, Moe):
        routing, _ = route(weights.mlp.router, given["ffn_norm"], batch.is_token, config)
        rungs |= {"expert_ids": routing.experts, "expert_weights": routing.weights}
    return rungs


def silenced(weights: Layer) -> tuple[Layer, Layer]:
    """The layer with its attention, and with its MLP, multiplied by zero."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    attn, mlp = weights.attn, weights.mlp
    return (
        weights.replace(attn=attn.replace(o=zeros(attn.o), o_bias=zeros(attn.o_bias))),
        weights.replace(mlp=mlp.replace(down=zeros(mlp.down))),
    )


def assert_rung(case: Case, rungs: dict[str, np.ndarray], *names: str) -> None:
    compared = [name for name in rungs if name.split(".")[1] in names]
    assert compared
    for name in compared:
        np.testing.assert_allclose(rungs[name], case.golden[name], rtol=0, atol=RUNG, err_msg=name)


def test_golden_file_is_of_this_checkpoint(case):
    made_with = json.loads(str(case.golden["versions"]))
    assert made_with["transformers"] == "5.23.0"
    assert str(case.golden["digest"]) == tiny.digest(case.directory), "run scripts/make_goldens.py"


def test_rope_tables_equal_transformers(case):
    golden = case.golden
    config = case.loaded.config.text
    positions = np.broadcast_to(np.arange(max(PROMPTS)), (3, max(PROMPTS)))
    cos, sin = angles(config.rope, config.head_dim, jnp.asarray(positions))
    # transformers repeats the angles of the H/2 pairs; ours come once.
    for ours, theirs in ((cos, golden["rope_cos"]), (sin, golden["rope_sin"])):
        np.testing.assert_allclose(np.tile(ours, 2), theirs, rtol=0, atol=RUNG)


def test_norms_equal_transformers(case, rungs):
    assert_rung(case, rungs, "attn_norm", "ffn_norm")


def test_cached_keys_and_values_equal_transformers(case, rungs):
    assert_rung(case, rungs, "k", "v")


def test_attention_equals_transformers(case, rungs):
    assert_rung(case, rungs, "attn")


def test_router_chooses_and_weighs_experts_as_transformers(case, rungs):
    layers = [name.split(".")[0] for name in case.golden if name.endswith("expert_ids")]
    if not layers:
        assert case.loaded.config.text.num_experts == 0
        return
    for layer in layers:
        per_expert = []
        for side in (rungs, case.golden):
            weights = np.zeros_like(case.golden[f"{layer}.router_probs"])
            ids = side[f"{layer}.expert_ids"].astype(np.int64)
            np.put_along_axis(weights, ids, side[f"{layer}.expert_weights"], axis=-1)
            per_expert.append(weights)
        np.testing.assert_allclose(*per_expert, rtol=0, atol=RUNG, err_msg=layer)


def test_the_models_routing_is_that_of_transformers(case):
    config = case.loaded.config.text
    tokens = case.golden[f"tokens_{LADDER_PROMPT}"]
    if not config.num_experts:
        with pytest.raises(ValueError, match="return_routing: this model is dense"):
            routed(case, tokens)
        return
    experts = routed(case, tokens)
    assert experts.shape == (config.num_hidden_layers, STEP_TOKENS, config.num_experts_per_tok)
    assert experts.dtype == np.int32
    assert (experts[:, LADDER_PROMPT:] == config.num_experts).all()  # padding goes nowhere
    compared = 0
    for layer, ids in enumerate(experts[:, :LADDER_PROMPT]):
        wanted = case.golden.get(f"layer{layer}.expert_ids")
        if not config.is_moe(layer):
            wanted = np.full_like(ids, config.num_experts)
        if wanted is not None:
            np.testing.assert_array_equal(ids, wanted, err_msg=f"layer {layer}")
            compared += 1
    assert compared


def routed(case: Case, tokens: np.ndarray) -> np.ndarray:
    table = forward.page_table(len(PROMPTS), WIDTH)
    batch = pack([tokens], [0], table, num_tokens=STEP_TOKENS)
    cache = forward.poisoned_cache(case.loaded, case.runtime, table.size)
    given = (case.loaded.params, case.loaded.config, case.runtime, batch, cache)
    return np.asarray(step(*given, logits="none", return_routing=True).routing)


def test_experts_and_mlps_equal_transformers(case, rungs):
    assert_rung(case, rungs, "ffn")


def test_layer_equals_transformers(case, rungs):
    assert_rung(case, rungs, "output")


def test_logits_of_every_position_equal_transformers(case, run):
    for length, ours in zip(PROMPTS, run.logits, strict=True):
        theirs = case.golden[f"logits_{length}"]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=LOGITS, err_msg=f"prompt {length}")


def test_greedy_tokens_equal_transformers(case, run):
    ours = run.tokens[PROMPTS.index(GREEDY_AFTER)]
    np.testing.assert_array_equal(ours, case.golden["greedy"])
