"""Parity with transformers, live: every tiny variant, and checkpoints that transformers wrote.

Needs the extra `parity` (torch and transformers), and skips without it. Run with `-s` to see the
table of errors:

    python -m pytest tests/test_parity_live.py -q -s
"""

import json

import forward
import numpy as np
import pytest
import tiny

from qwen_jax import functional
from qwen_jax.model.step import jit_step, step
from qwen_jax.weights.checkpoint import load

pytest.importorskip("transformers", reason="needs the extra 'parity'", exc_type=ImportError)

import hf_reference
import transformers

pytestmark = pytest.mark.parity

PROMPTS = (1, 7, 33, 130, 1000)
NEW_TOKENS = 16
LOGITS = 2e-4  # the promise, for logits of unit scale

_OLD_NAMES = {"num_local_experts": "num_experts", "dtype": "torch_dtype"}
_SHARED = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "initializer_range": 0.125,
}
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
_CONFIGS = {
    "moe": transformers.Qwen3MoeConfig(
        **_SHARED, **_EXPERTS, num_hidden_layers=2, norm_topk_prob=True
    ),
    "moe_yarn_mixed": transformers.Qwen3MoeConfig(
        **_SHARED,
        **_EXPERTS,
        num_hidden_layers=3,
        mlp_only_layers=[1],
        rope_parameters={**_YARN, "rope_theta": 10000.0},
    ),
    "dense_tied": transformers.Qwen3Config(
        **_SHARED, num_hidden_layers=3, tie_word_embeddings=True
    ),
}


@pytest.fixture(scope="module")
def errors():
    """Max absolute errors by (checkpoint, prompt length), printed when all is done."""
    table: dict[str, list[float]] = {}
    yield table
    print(f"\n{'max abs error of logits':32s}" + "".join(f"{n:>10,}" for n in PROMPTS))
    for name, row in table.items():
        print(f"{name:32s}" + "".join(f"{error:10.1e}" for error in row))


def compare(name: str, ours_at, theirs_at, errors: dict[str, list[float]], step=step) -> None:
    """Holds logits of all prompts and the greedy tokens behind each against transformers.

    ``step`` compiles equal layers once, which is most of the time here; `jit_step` is the whole
    program as it is used.
    """
    runtime = forward.one_device()
    loaded = load(ours_at, runtime=runtime)
    model = hf_reference.load(theirs_at)
    prompts = [tiny.prompt(length, model.config.vocab_size) for length in PROMPTS]
    run = forward.run(loaded, runtime, prompts, NEW_TOKENS, step=step, decode_tokens=len(prompts))
    theirs = [hf_reference.logits(model, prompt) for prompt in prompts]
    assert 0.5 < np.std(theirs[-1]) < 2  # of unit scale, or the tolerance would mean nothing
    errors[name] = [float(np.abs(a - b).max()) for a, b in zip(run.logits, theirs, strict=True)]
    assert max(errors[name]) < LOGITS, dict(zip(PROMPTS, errors[name], strict=True))
    greedy = [hf_reference.greedy(model, prompt, NEW_TOKENS) for prompt in prompts]
    np.testing.assert_array_equal(run.tokens, np.stack(greedy))


@pytest.mark.parametrize("variant", tiny.VARIANTS)
def test_tiny_checkpoint_equals_transformers(variant, tmp_path, errors):
    ours = theirs = tiny.write(tmp_path / "ours", variant)
    if "quantization_config" in tiny.VARIANTS[variant]:
        theirs = tiny.write(tmp_path / "dequantised", variant, dequantised=True)
    compare(variant, ours, theirs, errors)


@pytest.mark.parametrize("variant", ["moe", "moe_dense_mix", "moe_many_experts"])
def test_every_layers_routing_equals_transformers(variant, tmp_path):
    directory = tiny.write(tmp_path, variant)
    loaded = load(directory, runtime=forward.one_device())
    text = loaded.config.text
    prompts = [tiny.prompt(length, text.vocab_size, seed=length) for length in (7, 33)]
    model = hf_reference.load(directory)
    ours = functional.routing(
        loaded.params,
        loaded.config,
        [prompt.tolist() for prompt in prompts],
        runtime=forward.one_device(),
    )
    for prompt, experts in zip(prompts, ours, strict=True):
        ladder = hf_reference.ladder(model, prompt)
        for layer, ids in enumerate(experts):
            none = np.full_like(ids, text.num_experts)
            wanted = ladder.get(f"layer{layer}.expert_ids", none)
            np.testing.assert_array_equal(ids, wanted, err_msg=f"layer {layer}")


def test_transformers_dequantises_fp8_to_the_same_model(tmp_path, errors):
    # Partial blocks are left out: transformers 5.23 takes the block to be rows / scales there.
    directory = tiny.write(tmp_path, "moe_fp8_whole_blocks")
    compare("transformers' own dequantisation", directory, directory, errors)


@pytest.mark.parametrize("spelling", ["transformers_5", "transformers_4"])
@pytest.mark.parametrize("kind", ["moe", "moe_yarn_mixed", "dense_tied"])
def test_checkpoint_written_by_transformers_equals_it(kind, spelling, tmp_path, errors):
    config = _CONFIGS[kind]
    model = hf_reference.random_model(config, seed=0)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    assert "rope_parameters" in written
    if spelling == "transformers_4":
        path.write_text(json.dumps(spelled_as_by_transformers_4(written)))
    compare(f"{kind} by {spelling}", tmp_path, tmp_path, errors, jit_step)


def spelled_as_by_transformers_4(config: dict) -> dict:
    rope = dict(config.pop("rope_parameters"))
    theta = rope.pop("rope_theta")
    scaling = None if rope == {"rope_type": "default"} else rope
    renamed = {_OLD_NAMES.get(key, key): value for key, value in config.items()}
    return {**renamed, "rope_theta": theta, "rope_scaling": scaling}
