"""Positions and whole prompts against transformers, live.

Needs the extra `parity` (torch and transformers) with Pillow, and skips without it; whole prompts
also need real templates and the tokenizer (--shared-data).
"""

import json
import types

import numpy as np
import pytest
import vision_samples as samples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_mrope import spans

from qwen_jax.prompt import images, mrope, patches
from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.media import take_media
from qwen_jax.prompt.preprocessor import VisionRules
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import build_prompt
from qwen_jax.weights.hf_config import from_hf

pytest.importorskip("transformers", reason="needs the extra 'parity'", exc_type=ImportError)
pytest.importorskip("PIL", reason="needs the extra 'vision'")

import transformers
import vision_reference as reference
from PIL import Image

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

RULES = VisionRules()

RUNS = st.one_of(
    st.integers(1, 6),
    st.tuples(
        st.just("image"),
        st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6)),
    ),
    st.tuples(
        st.just("video"),
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(RUNS, min_size=1, max_size=7))
def test_positions_of_any_mix_are_equal(runs):
    runs = [
        run if isinstance(run, int) else (run[0], (run[1][0], 2 * run[1][1], 2 * run[1][2]))
        for run in runs
    ]
    mix = samples.mix(runs)
    expected, expected_delta = reference.rope_index(mix)
    positions, delta = mrope.mrope_positions(len(mix.ids), spans(mix))
    np.testing.assert_array_equal(positions, expected)
    assert delta == expected_delta


@pytest.fixture(scope="module")
def processor(shared_data):
    """transformers' whole processor, its video half with resizing and normalising left out."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

    directory = shared_data / "Qwen3-VL-30B-A3B-Instruct"
    images_side = Qwen2VLImageProcessorPil.from_pretrained(directory)
    videos_side = reference.Qwen3VLVideoProcessor.from_pretrained(directory)
    videos_side.resize = types.MethodType(lambda self, videos, **_: videos, videos_side)
    videos_side.convert_to_rgb = types.MethodType(lambda self, video: video, videos_side)
    videos_side.rescale_and_normalize = types.MethodType(
        lambda self, videos, *_: videos, videos_side
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(shared_data / "tokenizer")
    template = (directory / "chat_template.jinja").read_text(encoding="utf-8")

    class Processor(Qwen3VLProcessor):
        def check_argument_for_proper_class(self, *_):
            """Would need torchvision."""

    return Processor(images_side, tokenizer, videos_side, chat_template=template)


CONVERSATIONS = {
    "one image": ["What is in this picture?", "image"],
    "images between text": ["First:", "image", " and (", "image", ")\nWhat?"],
    "video": ["video", "Describe it."],
    "video after text": ["Look:", "video", " now"],
    "image and video": ["image", "video", "Compare:", "image", "<|not special|>"],
}


@pytest.mark.parametrize("model", ["Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-30B-A3B-Thinking"])
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_token_ids_and_patches_of_a_conversation_are_equal(name, model, processor, shared_data):
    directory = shared_data / model
    template = ChatTemplate.from_dir(directory)
    config = from_hf(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    tokenizer = Tokenizer.from_dir(shared_data / "tokenizer")
    pictures, clips, content = [], [], []
    for i, run in enumerate(CONVERSATIONS[name]):
        if run == "image":
            pictures.append(samples.noise(*[(96, 64), (256, 320), (301, 77)][i % 3], 3, seed=i))
            content.append({"type": "image", "image": pictures[-1]})
        elif run == "video":
            frames = samples.noise(7, 64, 96, 3, seed=i)
            clips.append((frames, {"fps": 3.0, "frames_indices": list(range(7))}))
            content.append({"type": "video", "video": frames, "metadata": clips[-1][1]})
        else:
            content.append({"type": "text", "text": run})
    messages = [{"role": "user", "content": content}]
    chat = {"messages": messages, "chat_template": template.source, "add_generation_prompt": True}
    text = processor.tokenizer.apply_chat_template(chat.pop("messages"), tokenize=False, **chat)
    given = {"images": [Image.fromarray(p) for p in pictures]} if pictures else {}
    if clips:
        given["videos"] = [frames for frames, _ in clips]
        metadata = [{**data, "total_num_frames": 7} for _, data in clips]
        given["videos_kwargs"] = {"do_sample_frames": False, "video_metadata": metadata}
    out = processor(text=[text], **given)

    bare, media = take_media(messages)
    assert template.render(bare) == text
    prompt = build_prompt(
        tokenizer.split(template.render(bare)),
        images.prepare(media, RULES),
        config,
        tokenizer=tokenizer,
        video_form="transformers-5",
    )
    assert list(prompt.token_ids) == list(out["input_ids"][0])
    kinds = np.asarray(out["mm_token_type_ids"][0])
    np.testing.assert_array_equal(prompt.feature_rows(0, len(kinds)) >= 0, kinds > 0)
    grids = {kind: out.get(f"{kind}_grid_thw") for kind in ("image", "video")}
    for kind, values in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        mine = [p for p in prompt.pictures if p.kind == kind]
        if mine:
            assert [list(p.grid) for p in mine] == np.asarray(grids[kind]).tolist()
            found = np.concatenate([p.patches for p in mine])
            if kind == "image":
                found = patches.pixel_values(found, mean=(0.5,) * 3, std=(0.5,) * 3)
            np.testing.assert_array_equal(found, np.asarray(out[values]))
