"""What process 0 tells the processes that follow it, as bytes: requests, and what ends them.

Knows prompts, pictures and parameters as plain values; knows no engine. The bytes are a line of
JSON, and behind it the pixels of pictures: nothing in them is run, whoever sent them.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen_jax.prompt.images import Picture
from qwen_jax.prompt.mrope import Span, mrope_positions
from qwen_jax.prompt.vision_prompt import VisionPrompt
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.structured.spec import Grammar, StructuredOutputs, ToolCalls


@dataclasses.dataclass(frozen=True)
class Add:
    """A request.

    Attributes:
        number: of the request; its seed may depend on it.
        prompt: with its pictures.
        params: a form in them is a wish, which each process compiles for itself.
        name: of the request in errors.
    """

    number: int
    prompt: Prompt
    params: SamplingParams
    name: str


@dataclasses.dataclass(frozen=True)
class Cancel:
    """The end of the request ``number``, if it is not over."""

    number: int


@dataclasses.dataclass(frozen=True)
class Over:
    """There is no more to follow.

    Attributes:
        number: that the next request will have.
        why: what has gone wrong in process 0; empty for nothing.
    """

    number: int
    why: str


def encode(told: Add | Cancel | Over) -> bytes:
    """``told`` as bytes.

    Raises:
        ValueError: a form that was compiled elsewhere, and does not say from what.
    """
    match told:
        case Add():
            pictures = told.prompt.vision.pictures if told.prompt.vision else ()
            header = {
                "number": told.number,
                "name": told.name,
                "prompt": _prompt(told.prompt),
                "params": _params(told.params, told.name),
            }
            return _joined("add", header, *(picture.patches for picture in pictures))
        case Cancel():
            return _joined("cancel", dataclasses.asdict(told))
        case Over():
            return _joined("over", dataclasses.asdict(told))


def decode(raw: bytes) -> Add | Cancel | Over:
    """The opposite of `encode`."""
    end = raw.index(b"\n")
    kind, header = json.loads(raw[:end])
    match kind:
        case "add":
            return Add(
                header["number"],
                _read_prompt(header["prompt"], memoryview(raw)[end + 1 :]),
                _read_params(header["params"]),
                header["name"],
            )
        case "cancel":
            return Cancel(**header)
        case _:
            return Over(**header)


def _joined(kind: str, header: Mapping[str, Any], *arrays: np.ndarray) -> bytes:
    # JSON has no end of line within a line, and is plain ASCII whatever is in its texts.
    return json.dumps([kind, header]).encode() + b"\n" + b"".join(x.tobytes() for x in arrays)


# ---- prompts -------------------------------------------------------------------------------------


def _prompt(prompt: Prompt) -> dict[str, Any]:
    found: dict[str, Any] = {
        "token_ids": prompt.token_ids,
        "text": prompt.text,
        "stop_ids": prompt.stop_ids,
        "spans": None,
    }
    if prompt.vision is not None:
        found["spans"] = [dataclasses.astuple(span) for span in prompt.vision.spans]
        found["pictures"] = [_picture(picture) for picture in prompt.vision.pictures]
    return found


def _picture(picture: Picture) -> dict[str, Any]:
    """All but the pixels."""
    return {
        "kind": picture.kind,
        "shape": picture.patches.shape,
        "grid": [int(size) for size in picture.grid],
        "merge_size": picture.merge_size,
        "num_pixels": int(picture.num_pixels),
        "timestamps": [float(seconds) for seconds in picture.timestamps],
        "digest": picture.digest,
        "name": picture.name,
    }


def _read_prompt(found: Mapping[str, Any], pixels: memoryview) -> Prompt:
    token_ids, vision = tuple(found["token_ids"]), None
    if found["spans"] is not None:
        spans = tuple(Span(*span) for span in found["spans"])
        pictures = tuple(_read_pictures(found["pictures"], pixels))
        positions, delta = mrope_positions(len(token_ids), spans)
        vision = VisionPrompt(token_ids, pictures, spans, positions, delta)
    return Prompt(token_ids, found["text"], tuple(found["stop_ids"]), vision)


def _read_pictures(found: list[dict[str, Any]], pixels: memoryview) -> Iterator[Picture]:
    start = 0
    for about in found:
        shape = about.pop("shape")
        stop = start + int(np.prod(shape))
        patches = np.frombuffer(pixels[start:stop], np.uint8).reshape(shape)
        about |= {"grid": tuple(about["grid"]), "timestamps": tuple(about["timestamps"])}
        yield Picture(patches=patches, **about)
        start = stop


# ---- parameters ----------------------------------------------------------------------------------


def _params(params: SamplingParams, name: str) -> dict[str, Any]:
    form = params.structured_outputs
    if isinstance(form, Grammar):
        if form.wish is None:
            raise ValueError(
                f"{name}: a grammar that was compiled by hand cannot be told to other processes: "
                "give structured_outputs as a wish, for example {'regex': …}"
            )
        params = dataclasses.replace(params, structured_outputs=form.wish)
    found = dataclasses.asdict(params)
    if params.logit_bias is not None:  # in JSON only texts are keys
        found["logit_bias"] = [(token, float(bias)) for token, bias in params.logit_bias.items()]
    return found


def _read_params(found: dict[str, Any]) -> SamplingParams:
    wish = found["structured_outputs"]
    if wish is not None:
        if wish["tool_calls"] is not None:
            wish["tool_calls"] = ToolCalls(**wish["tool_calls"])
        found["structured_outputs"] = StructuredOutputs(**wish)
    if found["logit_bias"] is not None:
        found["logit_bias"] = dict(found["logit_bias"])
    return SamplingParams(**found)
