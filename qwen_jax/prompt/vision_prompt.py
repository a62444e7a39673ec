"""Puts pictures into a prompt: one placeholder becomes as many tokens as the picture has.

Knows placeholder tokens, timestamps and the two forms a video takes. Does not know pixels.

What is expanded is a prompt cut at its special tokens (`Tokenizer.split`): strings, and between
them ids. Strings stay strings until the end, because the timestamp of a video's first frames
joins the text before it: "…video:" and "<0.2 seconds>" are tokenized as one.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from qwen_jax.prompt.images import Picture
from qwen_jax.prompt.mrope import Span, feature_rows, mrope_positions, window
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.weights.config import ModelConfig

VideoForm = Literal["transformers-4.57", "transformers-5"]
"""What a video's frames replace: the whole `<|vision_start|><|video_pad|><|vision_end|>`, or only
its middle, which leaves a second pair around them. The models were published with the first."""

VIDEO_FORMS: tuple[VideoForm, ...] = ("transformers-4.57", "transformers-5")


@dataclasses.dataclass(frozen=True)
class VisionPrompt:
    """A prompt in which every picture has its tokens.

    Attributes:
        token_ids: of the whole prompt.
        pictures: pictures and videos in the order of the prompt.
        spans: the runs of placeholder tokens, in the order of the prompt.
        positions: int32 [3, T].
        delta: what to add to an index behind the prompt to get its position.
    """

    token_ids: tuple[int, ...]
    pictures: tuple[Picture, ...]
    spans: tuple[Span, ...]
    positions: np.ndarray
    delta: int

    def window(self, start: int, stop: int) -> np.ndarray:
        """int32 [3, stop - start]: positions in prompt and generated tokens; see `mrope`."""
        return window(self.positions, self.delta, start, stop)

    def feature_rows(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]: rows of the pictures' features, -1 for text; see `mrope`."""
        return feature_rows(self.spans, start, stop)


def build_prompt(
    parts: Sequence[str | int],
    pictures: Sequence[Picture],
    config: ModelConfig,
    *,
    tokenizer: Tokenizer | None,
    video_form: VideoForm = "transformers-4.57",
    max_model_len: int | None = None,
    name: str = "prompt",
) -> VisionPrompt:
    """Expands the placeholders of a prompt, encodes it, and finds where every token stands.

    Args:
        parts: strings and special tokens' ids (`Tokenizer.split`), or token ids alone. Images go
            to the image placeholders in order, videos to the video placeholders.
        pictures: of the prompt.
        config: names the placeholders' ids.
        tokenizer: may be None for token ids without a video.
        video_form: see `VideoForm`.
        max_model_len: the longest prompt that fits, less one; None: any.
        name: of the prompt, for errors.

    Raises:
        ValueError: placeholders and pictures do not pair up, or the prompt becomes too long.
    """
    if video_form not in VIDEO_FORMS:
        raise ValueError(f"video_form={video_form!r} is unknown; use {' or '.join(VIDEO_FORMS)}")
    if pictures and config.vision is None:
        raise ValueError(
            f"{pictures[0].name}: a {config.model_type} checkpoint reads text only; use a Qwen3-VL "
            "checkpoint for pictures"
        )
    ordered = _in_order(parts, pictures, config, name)
    expanded = _expanded(parts, ordered, config, video_form)
    ids = _encoded(expanded, tokenizer, name)
    spans = tuple(_spans(ids, ordered, config))
    if max_model_len is not None and len(ids) >= max_model_len and pictures:
        raise _too_long(len(ids), ordered, max_model_len, name)
    positions, delta = mrope_positions(len(ids), spans)
    return VisionPrompt(tuple(ids), tuple(ordered), spans, positions, delta)


def _in_order(
    parts: Sequence[str | int], pictures: Sequence[Picture], config: ModelConfig, name: str
) -> list[Picture]:
    """The pictures as their placeholders come, once both are seen to pair up."""
    pads = {"image": config.image_token_id, "video": config.video_token_id}
    queues: dict[str, Iterator[Picture]] = {}
    for kind, pad in pads.items():
        mine = [picture for picture in pictures if picture.kind == kind]
        places = sum(1 for part in parts if part == pad and pad is not None)
        if places != len(mine):
            raise _unpaired(kind, places, mine, name)
        queues[kind] = iter(mine)
    kinds = {pad: kind for kind, pad in pads.items() if pad is not None}
    return [next(queues[kinds[part]]) for part in parts if isinstance(part, int) and part in kinds]


def _unpaired(kind: str, places: int, mine: Sequence[Picture], name: str) -> ValueError:
    token, one = f"<|{kind}_pad|>", "an image" if kind == "image" else "a video"
    if places > len(mine):
        fix = f"give {one} for each, or remove {token} from the text"
    else:
        fix = f"add {token} where each {kind} belongs, or leave {kind}s out"
    names = f" ({', '.join(picture.name for picture in mine)})" if mine else ""
    return ValueError(
        f"{name} has {places} {kind} placeholders and {len(mine)} {kind}s{names}: {fix} "
        "(one placeholder each; expanding it is done here)"
    )


def _expanded(
    parts: Sequence[str | int],
    ordered: Sequence[Picture],
    config: ModelConfig,
    form: VideoForm,
) -> list[str | int]:
    start, end = config.vision_start_token_id, config.vision_end_token_id
    image, video = config.image_token_id, config.video_token_id
    queue = iter(ordered)
    out: list[str | int] = []
    position = 0
    while position < len(parts):
        part = parts[position]
        position += 1
        if part == image and image is not None:
            out += [image] * next(queue).num_tokens
        elif part == video and video is not None:
            wrapped = out[-1:] == [start] and list(parts[position : position + 1]) == [end]
            if form == "transformers-4.57" and wrapped:
                out.pop()
                position += 1
            out += _frames(next(queue), start, video, end)
        else:
            out.append(part)
    return out


def _frames(picture: Picture, start: Any, pad: int, end: Any) -> list[str | int]:
    """The text of a video: before the tokens of every slice, when it was."""
    assert None not in (start, end)
    pads = [pad] * (picture.token_rows * picture.token_columns)
    text: list[str | int] = []
    for seconds in picture.timestamps:
        text += [f"<{seconds:.1f} seconds>", start, *pads, end]
    return text


def _encoded(parts: Sequence[str | int], tokenizer: Tokenizer | None, name: str) -> list[int]:
    if tokenizer is not None:
        return tokenizer.encode_parts(parts)
    if any(isinstance(part, str) for part in parts):
        raise ValueError(
            f"{name}: the timestamps of a video need a tokenizer, and this checkpoint directory "
            "has none; add tokenizer.json"
        )
    return [part for part in parts if isinstance(part, int)]


def _spans(ids: Sequence[int], ordered: Sequence[Picture], config: ModelConfig) -> Iterator[Span]:
    """Runs of placeholders: their lengths are known, so runs that touch are told apart."""
    pads = (config.image_token_id, config.video_token_id)
    places = iter([i for i, token in enumerate(ids) if token in pads])
    for index, picture in enumerate(ordered):
        for time in range(picture.grid[0]):
            start = next(places)
            span = Span(start, picture.token_rows, picture.token_columns, index, time)
            for _ in range(span.start + 1, span.stop):
                next(places)
            yield span
    assert next(places, None) is None


def _too_long(
    length: int, pictures: Sequence[Picture], max_model_len: int, name: str
) -> ValueError:
    largest = max(pictures, key=lambda picture: picture.num_tokens)
    wish = "max_pixels" if largest.kind == "image" else "max_pixels, fps or num_frames"
    return ValueError(
        f"{name} has {length:,} tokens with its pictures, max_model_len is {max_model_len:,}: "
        f"{largest.name} alone takes {largest.num_tokens:,}; lower {wish} for it, or raise "
        "max_model_len (one position must be left for the answer)"
    )
