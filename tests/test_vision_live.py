"""Tiny Qwen3-VL checkpoints against transformers, live: prompts to logits and greedy tokens."""

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra 'parity'")
pytest.importorskip("transformers", reason="needs the extra 'parity'", exc_type=ImportError)

import hf_vision
import tiny
import vision_model
import vision_samples as samples

from qwen_jax.requests import SamplingParams
from qwen_jax.runtime import Buckets

pytestmark = pytest.mark.parity

LOGITS = 5e-4  # the promise, for logits of unit scale
NEW_TOKENS = 12
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def errors():
    """Max absolute errors by (checkpoint, case), printed when all is done."""
    table: dict[str, dict[str, float]] = {}
    yield table
    print("\nmax abs error of logits")
    for case in vision_model.CASES:
        row = "".join(f"{name}: {found[case]:9.1e}   " for name, found in table.items())
        print(f"{case:20s}{row}")


@pytest.mark.parametrize("variant", tiny.VISION_VARIANTS)
def test_logits_and_greedy_tokens_equal_transformers(variant, errors):
    llm = vision_model.shared_llm(variant)
    model = hf_vision.load(vision_model.directory(variant))
    found = errors.setdefault(variant, {})
    for case in vision_model.CASES:
        given = vision_model.prompt(llm, case)
        inputs = hf_vision.inputs(given, llm.config)
        theirs = hf_vision.logits(model, inputs)
        ours = vision_model.logits(llm, given)
        assert 0.3 < np.std(theirs) < 3, case  # or the tolerance would mean nothing
        found[case] = float(np.abs(ours - theirs).max())
        assert found[case] < LOGITS, case
        (result,) = llm.generate(given, GREEDY, use_tqdm=False)
        wanted = hf_vision.greedy(model, inputs, NEW_TOKENS)
        assert result.outputs[0].token_ids == wanted.tolist(), case


def test_a_large_image_equals_transformers():
    llm = vision_model.open_llm(
        "vl_moe",
        max_model_len=1024,
        mm_processor_kwargs={"max_pixels": 2**20},
        buckets=Buckets(tokens=(1024,), rows=(4,), patches=(4096,), segments=(2,)),
    )
    picture = samples.noise(768, 1024, 3, seed=0)
    given = llm.inputs.prompt(
        {"prompt": f"{vision_model.IMAGE}look", "multi_modal_data": {"image": [picture]}}
    )
    assert len(given.token_ids) > 768
    model = hf_vision.load(vision_model.directory("vl_moe"))
    theirs = hf_vision.logits(model, hf_vision.inputs(given, llm.config))
    error = np.abs(vision_model.logits(llm, given) - theirs).max()
    print(f"\nlarge image: {error:.1e}")
    assert error < LOGITS


def test_both_layouts_of_experts_hold_the_same_model():
    one, other = (vision_model.shared_llm(name) for name in ("vl_moe", "vl_moe_by_transformers_5"))
    given = vision_model.prompt(one, "one image")
    np.testing.assert_array_equal(
        vision_model.logits(one, given), vision_model.logits(other, given)
    )
