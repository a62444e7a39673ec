"""The vision tower and what the decoder makes of it, against golden files and against itself.

The files hold what transformers computed (`scripts/make_vision_model_goldens.py`). Each rung of the
tower starts from transformers' own values, so that the first one to fail names the part.
"""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
import vision_model
import vision_samples as samples

from qwen_jax.engine.compile_clock import compile_clock
from qwen_jax.engine.pictures import FeatureStore, visual_rows
from qwen_jax.model import vision
from qwen_jax.prompt import images
from qwen_jax.requests import SamplingParams

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "vision_model.npz")
TOWER_CASE = "two images"
LOGITS = 5e-4  # the promise, for logits of unit scale
RUNG = 5e-5
NEW_TOKENS = len(GOLDEN["greedy/one image"])
GREEDY = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module")
def llm():
    return vision_model.shared_llm()


@pytest.fixture(scope="module")
def batch(llm):
    """The pictures of `TOWER_CASE`, with noise behind them: padding is not read."""
    pictures = vision_model.prompt(llm, TOWER_CASE).vision.pictures
    packed = images.pack(pictures, num_patches=64, num_segments=4, side=6)
    used = packed.segment_starts[-1]
    packed.patches[used:] = 255
    packed.coordinates[used:] = 1000
    return vision.VisionBatch(
        **{f.name: jnp.asarray(getattr(packed, f.name)) for f in dataclasses.fields(packed)}
    )


def tower(name: str) -> np.ndarray:
    return GOLDEN[f"tower/{name}"]


def padded(x: np.ndarray, size: int) -> np.ndarray:
    """Behind the pictures' rows NaN: nothing may look at padding."""
    return np.concatenate([x, np.full((size - len(x), *x.shape[1:]), np.nan, x.dtype)])


def generated(llm, cases, **options) -> list[list[int]]:
    params = dataclasses.replace(GREEDY, **options)
    results = llm.generate([vision_model.request(c) for c in cases], params, use_tqdm=False)
    return [result.outputs[0].token_ids for result in results]


# ---- the tower, rung by rung -------------------------------------------------------------------


def test_learned_positions_equal_transformers(llm, batch):
    ours = vision.learned_positions(llm.params.vision.positions, batch, llm.runtime)
    wanted = tower("positions")
    np.testing.assert_allclose(ours[: len(wanted)], wanted, atol=RUNG)


@pytest.mark.parametrize("index", [0, 1, 3])
def test_a_block_equals_transformers_and_does_not_read_padding(llm, batch, index):
    before = tower(f"block{index - 1}") if index else tower("patches") + tower("positions")
    ours = vision.vision_block(
        llm.params.vision.blocks[index],
        jnp.asarray(padded(before, len(batch.patches))),
        vision.angles(batch.coordinates, llm.config.vision),
        batch.segment_starts,
        config=llm.config.vision,
        runtime=llm.runtime,
    )
    wanted = tower(f"block{index}")
    np.testing.assert_allclose(ours[: len(wanted)], wanted, atol=RUNG)


@pytest.mark.parametrize("name", ["rows", "level0", "level1", "level2"])
def test_merged_rows_and_deepstack_levels_equal_transformers(llm, batch, name):
    out = vision.jit_encode(llm.params.vision, batch, llm.config.vision, llm.runtime)
    ours = out.rows if name == "rows" else out.levels[int(name[-1])]
    wanted = tower(name)
    assert np.std(wanted) > 0.3  # or the tolerance would mean nothing
    np.testing.assert_allclose(ours[: len(wanted)], wanted, atol=RUNG)


# ---- the decoder -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", vision_model.CASES)
def test_tokens_and_logits_equal_transformers(llm, case):
    given = vision_model.prompt(llm, case)
    np.testing.assert_array_equal(given.token_ids, GOLDEN[f"tokens/{case}"])
    error = np.abs(vision_model.logits(llm, given) - GOLDEN[f"logits/{case}"]).max()
    assert error < LOGITS


def test_without_deepstack_logits_differ(llm):
    given = vision_model.prompt(llm, "one image")
    off = vision_model.logits(llm, given, deepstack=False)
    assert np.abs(off - GOLDEN["logits/one image"]).max() > 0.1


def test_a_batch_of_mixed_requests_gives_each_its_own_tokens(llm):
    cases = list(vision_model.CASES)  # in groups of four; each fills several chunks
    assert generated(llm, cases) == [GOLDEN[f"greedy/{case}"].tolist() for case in cases]


@pytest.mark.parametrize("limit", [5, 16])
def test_a_chunk_that_ends_inside_an_image_changes_nothing(limit):
    llm = vision_model.open_llm("vl_moe", max_num_batched_tokens=limit)
    for case in ("two images", "image and video"):
        assert generated(llm, [case]) == [GOLDEN[f"greedy/{case}"].tolist()]


def test_pages_with_a_picture_are_shared_with_the_same_picture_alone(llm):
    def ask(seed):
        picture = samples.noise(96, 160, 3, seed=seed)  # 15 tokens: a page with the one before
        given = {"prompt": f"{vision_model.IMAGE}hello", "multi_modal_data": {"image": picture}}
        (result,) = llm.generate(given, GREEDY, use_tqdm=False)
        return result.metrics.cached_tokens, result.outputs[0].token_ids

    first, other, again = ask(50), ask(51), ask(50)
    assert (first[0], other[0], again[0]) == (0, 0, 16)
    assert again[1] == first[1]
    llm.engine._core._pool.forget(range(llm.engine.stats().pages_total))
    assert ask(51) == other


def test_logits_with_heads_over_two_devices_equal_transformers():
    llm = vision_model.open_llm("vl_moe", mesh="tensor=2")
    case = "image and video"
    given = vision_model.prompt(llm, case)
    error = np.abs(vision_model.logits(llm, given) - GOLDEN[f"logits/{case}"]).max()
    assert error < LOGITS


def test_experts_and_heads_over_eight_devices_give_the_same_tokens():
    llm = vision_model.open_llm("vl_moe", mesh="expert=4,tensor=2")
    case = "image and video"
    assert generated(llm, [case]) == [GOLDEN[f"greedy/{case}"].tolist()]


# ---- features ----------------------------------------------------------------------------------


def store(llm, **options) -> FeatureStore:
    rules = llm.inputs._pictures._rules
    return FeatureStore(llm.params.vision, llm.config.vision, llm.runtime, rules, **options)


def test_a_picture_seen_before_is_not_encoded_again(llm):
    seen = store(llm)
    pictures = vision_model.prompt(llm, "two images").vision.pictures
    first = seen.of(pictures)
    again = seen.of(vision_model.prompt(llm, "two images").vision.pictures[::-1])
    assert seen.encoded == 2
    split = pictures[0].num_tokens
    np.testing.assert_array_equal(again.rows, np.roll(first.rows, -split, axis=0))
    np.testing.assert_array_equal(again.levels, np.roll(first.levels, -split, axis=1))


def test_turns_of_a_conversation_share_a_picture(llm):
    picture = vision_model.request("odd grid")["multi_modal_data"]["image"][0] // 2
    turn = {"role": "user", "content": [{"type": "image", "image": picture}]}
    features = llm.engine.runner.views.store
    before = features.encoded
    for messages in ([turn], [turn, {"role": "assistant", "content": "a"}, turn]):
        (result,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False)
    assert features.encoded == before + 1
    assert result.metrics.picture_tokens == 2 * 15
    assert result.metrics.picture_pixels == 2 * 96 * 160


def test_features_that_do_not_fit_are_dropped_oldest_first(llm):
    one, other = vision_model.prompt(llm, "two images").vision.pictures
    seen = store(llm, max_bytes=store(llm).of([one]).num_bytes + 1)
    for picture in (one, one, other, one):
        seen.of([picture])
    assert seen.encoded == 3


def test_a_chunk_takes_the_features_of_its_window_alone(llm):
    vision_prompt = vision_model.prompt(llm, "one image").vision
    features = store(llm).of(vision_prompt.pictures)
    start = vision_prompt.spans[0].start
    window = (start + 2, start + 4)
    visual = visual_rows([None, vision_prompt], [None, features], [(0, 3), window], 16)
    placed = np.asarray(visual.take(visual.rows))
    np.testing.assert_array_equal(placed[3:5], features.rows[2:4])
    assert not placed[:3].any()
    assert not placed[5:].any()
    assert visual_rows([vision_prompt], [features], [(0, start)], 16) is None


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (vision_model.IMAGE, 0, "1 image placeholders and 0 images"),
        ("hello", 1, "0 image placeholders and 1 images"),
        (vision_model.IMAGE * 9, 9, "max_model_len is 128: .*lower max_pixels"),
    ],
)
def test_pictures_that_have_no_place_are_named(llm, text, images, message):
    picture = np.zeros((96, 160, 3), np.uint8)
    given = {"prompt": text, "multi_modal_data": {"image": [picture] * images}}
    with pytest.raises(ValueError, match=message):
        llm.generate(given, GREEDY, use_tqdm=False)


def test_wishes_count_for_one_prompt_and_for_all():
    llm = vision_model.open_llm("vl_moe", mm_processor_kwargs={"max_pixels": 4096})
    request = vision_model.request("odd grid")
    assert llm.inputs.prompt(request).vision.pictures[0].num_pixels <= 4096
    wishes = {"mm_processor_kwargs": {"max_pixels": 15360}}
    assert llm.inputs.prompt({**request, **wishes}).vision.pictures[0].num_pixels == 15360
    with pytest.raises(ValueError, match="did you mean 'max_pixels'"):
        llm.inputs.prompt({**request, "mm_processor_kwargs": {"max_pixel": 1}})


def test_no_picture_of_a_known_size_compiles_anything_after_the_warm_up():
    llm = vision_model.open_llm("vl_moe")
    llm.engine.warmup()
    before = compile_clock().programs
    assert generated(llm, ["two images"]) == [GOLDEN["greedy/two images"].tolist()]
    assert compile_clock().programs == before
