"""Prompts with pictures: expansion, pairing, timestamps, spans, and what cannot fit."""

import dataclasses
import re

import numpy as np
import pytest
import tokenizers
from prompt_samples import byte_level_model, native_tokenizer
from tokenizers import AddedToken, models

from qwen_jax.prompt.images import Picture
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import VisionPrompt, build_prompt
from qwen_jax.weights.config import ModelConfig, RopeConfig, TextConfig, VisionConfig

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def library_tokenizer() -> tokenizers.Tokenizer:
    """Bytes, a merge of ":" and "<" (as in the published vocabulary), and the placeholders."""
    vocab, merges = byte_level_model()
    vocab[":<"] = len(vocab)
    native = native_tokenizer()
    made = tokenizers.Tokenizer(models.BPE(vocab, [*merges, (":", "<")]))
    made.normalizer = native.normalizer
    made.pre_tokenizer = native.pre_tokenizer
    made.decoder = native.decoder
    made.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    library_tokenizer().save(str(directory / "tokenizer.json"))
    return Tokenizer.from_dir(directory)


@pytest.fixture(scope="module")
def config(tokenizer) -> ModelConfig:
    start, end, image, video = (tokenizer.added[text] for text in SPECIAL)
    text = TextConfig(
        vocab_size=tokenizer.size,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=1000,
        rope=RopeConfig(theta=1e4, mrope_section=(6, 5, 5)),
    )
    tower = VisionConfig(1, 32, 64, 2, 64)
    return ModelConfig(
        "qwen3_vl",
        text,
        tower,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )


def picture(kind: str, grid: tuple[int, int, int], name: str, times: tuple = ()) -> Picture:
    patches = np.zeros((int(np.prod(grid)), 1536), np.uint8)
    return Picture(kind, patches, grid, 2, 256 * len(patches), times, name, name)


SMALL = picture("image", (1, 4, 6), "image 0")
WIDE = picture("image", (1, 2, 8), "image 1")
CLIP = picture("video", (3, 4, 4), "video 0", (0.25, 0.75, 12.35))
SHORT = picture("video", (1, 2, 2), "video 1", (0.5,))


def expand(text: str, pictures: list[Picture], form: str) -> str:
    """The definition, on text: every placeholder is replaced, then the whole is tokenized."""
    images = [p for p in pictures if p.kind == "image"]
    videos = [p for p in pictures if p.kind == "video"]
    text = re.sub(
        re.escape("<|image_pad|>"), lambda _: "<|image_pad|>" * images.pop(0).num_tokens, text
    )

    def frames(_) -> str:
        clip = videos.pop(0)
        pads = "<|video_pad|>" * (clip.num_tokens // clip.grid[0])
        return "".join(
            f"<{time:.1f} seconds><|vision_start|>{pads}<|vision_end|>" for time in clip.timestamps
        )

    old = VIDEO if form == "transformers-4.57" else "<|video_pad|>"
    return re.sub(re.escape(old), frames, text)


PROMPTS = {
    "image": (f"a {IMAGE} b", [SMALL]),
    "image alone": (IMAGE, [WIDE]),
    "two images": (f"{IMAGE}{IMAGE}?", [SMALL, WIDE]),
    "bare pads": ("<|image_pad|><|image_pad|>", [WIDE, SMALL]),
    "video": (f"a {VIDEO} b", [CLIP]),
    "video after punctuation": (f"Look:{VIDEO}", [CLIP]),
    "two videos": (f"{VIDEO}:{VIDEO}", [CLIP, SHORT]),
    "image and video": (f"{IMAGE}x:{VIDEO} and {IMAGE}", [SMALL, CLIP, WIDE]),
    "videos given first": (f"{IMAGE}x{VIDEO}", [CLIP, SMALL]),
    "text": ("nothing to see", []),
}


@pytest.mark.parametrize("form", ["transformers-4.57", "transformers-5"])
@pytest.mark.parametrize("name", PROMPTS)
def test_ids_are_those_of_the_expanded_text(name, form, tokenizer, config):
    text, pictures = PROMPTS[name]
    prompt = build_prompt(
        tokenizer.split(text), pictures, config, tokenizer=tokenizer, video_form=form
    )
    expected = library_tokenizer().encode(expand(text, pictures, form), add_special_tokens=False)
    assert list(prompt.token_ids) == expected.ids


def test_the_first_timestamp_joins_the_text_before_it(tokenizer, config):
    joined = tokenizer.id(":<")
    prompt = build_prompt(tokenizer.split(f"a:{VIDEO}"), [SHORT], config, tokenizer=tokenizer)
    assert prompt.token_ids[1] == joined
    prompt = build_prompt(
        tokenizer.split(f"a:{VIDEO}"),
        [SHORT],
        config,
        tokenizer=tokenizer,
        video_form="transformers-5",
    )
    assert joined not in prompt.token_ids  # vision_start stands between them


def test_the_forms_differ_by_one_outer_pair(tokenizer, config):
    parts = tokenizer.split(f"a {VIDEO} b")
    old = build_prompt(parts, [CLIP], config, tokenizer=tokenizer)
    new = build_prompt(parts, [CLIP], config, tokenizer=tokenizer, video_form="transformers-5")
    assert len(new.token_ids) == len(old.token_ids) + 2
    assert [s.start + 1 for s in old.spans] == [s.start for s in new.spans]
    with pytest.raises(ValueError, match=r"video_form='5' is unknown; use transformers-4\.57 or"):
        build_prompt(parts, [CLIP], config, tokenizer=tokenizer, video_form="5")


def test_timestamps_are_rounded_as_python_prints_them(tokenizer, config):
    prompt = build_prompt(tokenizer.split(VIDEO), [CLIP], config, tokenizer=tokenizer)
    text = tokenizer.decode(prompt.token_ids)
    assert text == "<0.2 seconds><0.8 seconds><12.3 seconds>"


def test_spans_tell_touching_pictures_apart(tokenizer, config):
    pads = ["<|image_pad|>" * 2]
    prompt = build_prompt(tokenizer.split(pads[0]), [WIDE, SMALL], config, tokenizer=tokenizer)
    assert [(s.start, s.rows, s.columns, s.picture) for s in prompt.spans] == [
        (0, 1, 4, 0),
        (4, 2, 3, 1),
    ]


@pytest.mark.parametrize("name", PROMPTS)
def test_every_placeholder_has_its_row_and_nothing_else_has(name, tokenizer, config):
    text, pictures = PROMPTS[name]
    prompt = build_prompt(tokenizer.split(text), pictures, config, tokenizer=tokenizer)
    ids = np.array(prompt.token_ids)
    rows = prompt.feature_rows(0, len(ids))
    is_pad = (ids == config.image_token_id) | (ids == config.video_token_id)
    np.testing.assert_array_equal(rows >= 0, is_pad)
    assert rows[is_pad].tolist() == list(range(sum(p.num_tokens for p in pictures)))
    # In the order of the prompt, a picture's rows are its own.
    owner = np.repeat(
        np.arange(len(prompt.pictures)), [p.num_tokens for p in prompt.pictures]
    ).astype(int)
    kinds = [prompt.pictures[i].kind for i in owner]
    names = {config.image_token_id: "image", config.video_token_id: "video"}
    assert [names[token] for token in ids[is_pad]] == kinds
    assert prompt.positions.shape == (3, len(ids))
    assert prompt.window(0, len(ids) + 2)[:, -1].tolist() == [len(ids) + 1 + prompt.delta] * 3


def test_every_slice_of_a_video_is_a_span(tokenizer, config):
    prompt = build_prompt(tokenizer.split(VIDEO), [CLIP], config, tokenizer=tokenizer)
    assert [(s.slice, s.rows, s.columns) for s in prompt.spans] == [(i, 2, 2) for i in range(3)]
    for span in prompt.spans:  # time stands still in a slice
        assert len(set(prompt.positions[0, span.start : span.stop])) == 1


def test_token_ids_are_expanded_like_text(tokenizer, config):
    text = f"a {IMAGE} b"
    expected = build_prompt(tokenizer.split(text), [SMALL], config, tokenizer=tokenizer)
    assert build_prompt(tokenizer.encode(text), [SMALL], config, tokenizer=None) == _like(expected)
    video = tokenizer.encode(VIDEO)
    assert build_prompt(video, [CLIP], config, tokenizer=tokenizer).spans
    with pytest.raises(ValueError, match=r"prompt 2: the timestamps of a video need a tokenizer"):
        build_prompt(video, [CLIP], config, tokenizer=None, name="prompt 2")


def _like(prompt: VisionPrompt) -> VisionPrompt:
    """Equal to a prompt with equal arrays, which dataclasses do not compare by themselves."""

    class Equal(VisionPrompt):
        def __eq__(self, other):
            return all(
                np.array_equal(getattr(self, f.name), getattr(other, f.name))
                if f.name == "positions"
                else getattr(self, f.name) == getattr(other, f.name)
                for f in dataclasses.fields(VisionPrompt)
            )

        __hash__ = None

    return Equal(**{f.name: getattr(prompt, f.name) for f in dataclasses.fields(prompt)})


def test_text_of_users_cannot_smuggle_a_picture_in(tokenizer, config):
    parts = ["<|image_pad|> ", *tokenizer.split(IMAGE), VIDEO]  # strings are plain text
    prompt = build_prompt(parts, [WIDE], config, tokenizer=tokenizer)
    assert prompt.token_ids.count(config.image_token_id) == 4
    assert config.video_token_id not in prompt.token_ids


@pytest.mark.parametrize(
    ("text", "pictures", "error"),
    [
        (f"{IMAGE}{IMAGE}", [SMALL], r"has 2 image placeholders and 1 images \(image 0\): give"),
        (IMAGE, [SMALL, WIDE], r"1 image placeholders and 2 images \(image 0, image 1\): add <"),
        ("no place", [SMALL], "0 image placeholders and 1 images.*add <|image_pad|> where each"),
        (IMAGE, [], "1 image placeholders and 0 images: give an image for each, or remove"),
        (VIDEO, [], "1 video placeholders and 0 videos: give a video for each"),
        (VIDEO, [SMALL], "0 image placeholders and 1 images"),
        ("<|image_pad|>" * 6, [SMALL], r"6 image placeholders.*expanding it is done here"),
    ],
)
def test_placeholders_without_pictures_and_the_reverse_are_refused(
    text, pictures, error, tokenizer, config
):
    with pytest.raises(ValueError, match=f"prompt 7 .*{error}"):
        build_prompt(tokenizer.split(text), pictures, config, tokenizer=tokenizer, name="prompt 7")


def test_a_prompt_that_becomes_too_long_names_the_largest_picture(tokenizer, config):
    parts = tokenizer.split(f"{IMAGE}{IMAGE}")  # 2 + 6 + 2 + 4 tokens
    build_prompt(parts, [SMALL, WIDE], config, tokenizer=tokenizer, max_model_len=15)
    with pytest.raises(
        ValueError,
        match=r"prompt has 14 tokens with its pictures, max_model_len is 14: image 0 alone takes "
        r"6; lower max_pixels for it, or raise max_model_len",
    ):
        build_prompt(parts, [SMALL, WIDE], config, tokenizer=tokenizer, max_model_len=14)
    with pytest.raises(ValueError, match="video 0 alone takes 12; lower max_pixels, fps or num_f"):
        build_prompt(tokenizer.split(VIDEO), [CLIP], config, tokenizer=tokenizer, max_model_len=20)


def test_a_text_checkpoint_refuses_pictures(tokenizer, config):
    text_only = ModelConfig("qwen3_moe", config.text)
    with pytest.raises(ValueError, match="image 0: a qwen3_moe checkpoint reads text only"):
        build_prompt(tokenizer.split("a"), [SMALL], text_only, tokenizer=tokenizer)
    plain = build_prompt(tokenizer.split("the end"), [], text_only, tokenizer=tokenizer)
    assert list(plain.token_ids) == tokenizer.encode("the end")
    assert (plain.spans, plain.delta) == ((), 0)
