"""Pictures and videos as callers hand them over: in content parts, or beside a prompt.

Knows the forms of OpenAI's, transformers' and vLLM's messages. Does not open anything.
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from qwen_jax.prompt.media_options import MediaOptions

Kind = Literal["image", "video"]
KINDS: tuple[Kind, ...] = ("image", "video")

Fetch = Callable[[str, str], Any]
"""Turns the string of a part (path or URL) and the part's name into another source."""

# Which key may hold the picture of a part of a kind; the part's type is one of the first two.
_HOLDERS: Mapping[Kind, tuple[str, ...]] = {
    "image": ("image", "image_url", "url", "path"),
    "video": ("video", "video_url", "url", "path"),
}
_VIDEO_ONLY = ("total_pixels", "fps", "num_frames", "do_sample_frames")
_DETAILS = (None, "auto", "low", "high")


@dataclasses.dataclass(frozen=True)
class Media:
    """A picture or a video that was asked for, unread.

    Attributes:
        kind: "image" or "video".
        source: as `image_files.read_picture` and `video.read_clip` take it.
        options: the caller's wishes for this one.
        name: what to call it in errors.
    """

    kind: Kind
    source: Any
    options: MediaOptions
    name: str


def take_media(
    messages: Sequence[Any], *, fetch: Fetch | None = None
) -> tuple[list[Any], list[Media]]:
    """Takes the pictures out of a conversation and leaves bare parts for the chat template.

    Parts are OpenAI's ``{"type": "image_url", "image_url": {"url": …}}`` (``detail`` says nothing
    here: min_pixels and max_pixels do), ``{"type": "image", "image": …}``, and alike for videos,
    each with options of its own; a video part may hold frames, with their ``metadata`` beside them.

    Args:
        messages: a conversation; what is wrong with it otherwise is left for the template's checks.
        fetch: what to do with strings; None: they are paths and `data:` URLs.

    Returns:
        The messages with ``{"type": "image"}`` or ``{"type": "video"}`` in each such place, and
        the pictures and videos in the same order.

    Raises:
        ValueError: a part holds no picture, or two, or an option that does not exist.
    """
    bare: list[Any] = []
    found: list[Media] = []
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            parts = []
            for j, part in enumerate(content):
                media = _media(part, f"messages[{i}].content[{j}]", fetch)
                parts.append(part if media is None else {"type": media.kind})
                found += [] if media is None else [media]
            message = {**message, "content": parts}
        bare.append(message)
    return bare, found


def media_beside(data: Any, name: str) -> list[Media]:
    """Pictures and videos of ``multi_modal_data``: ``{"image": […], "video": […]}``.

    One that stands alone needs no list around it; ``(frames, metadata)`` is one video.

    Raises:
        ValueError: another key, or another form.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{name}: multi_modal_data must be a mapping, got {data!r:.80}")
    for key in data:
        if key not in KINDS:
            near = difflib.get_close_matches(str(key), KINDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KINDS)}"
            raise ValueError(f"{name}: unknown key {key!r} in multi_modal_data; {hint}")
    found: list[Media] = []
    for kind in KINDS:
        sources = data.get(kind)
        if sources is None:
            continue
        alone = not isinstance(sources, list) and not (
            kind == "image" and isinstance(sources, tuple)
        )
        for i, source in enumerate([sources] if alone else sources):
            found.append(Media(kind, source, MediaOptions(), f"{name}, {kind} {i}"))
    return found


def _media(part: Any, name: str, fetch: Fetch | None) -> Media | None:
    """The picture of a part, None for a part of text (or one that is wrong altogether)."""
    kind = _kind(part)
    if kind is None:
        return None
    given = {key: value for key, value in part.items() if value is not None and key != "type"}
    held = [key for key in _HOLDERS[kind] if key in given]
    if len(held) != 1:
        what = f"holds {' and '.join(held)}" if held else f"holds no {kind}"
        raise ValueError(f'{name} {what}: write {{"type": "{kind}", "{kind}": …}}')
    source = _unwrapped(given.pop(held[0]), f"{name}.{held[0]}")
    if isinstance(source, str) and fetch is not None:
        source = fetch(source, name)
    if kind == "video" and "metadata" in given:
        source = (source, given.pop("metadata"))
    options = MediaOptions.from_mapping(given, name)
    if kind == "image":
        for key in _VIDEO_ONLY:
            if getattr(options, key) is not None:
                raise ValueError(f"{name}: {key} says nothing of an image; leave it out")
    return Media(kind, source, options, name)


def _kind(part: Any) -> Kind | None:
    if not isinstance(part, Mapping):
        return None
    named = part.get("type")
    for kind in KINDS:
        typical = _HOLDERS[kind][:2]
        if named in typical or (
            named is None and "text" not in part and any(k in part for k in typical)
        ):
            return kind
    return None


def _unwrapped(value: Any, name: str) -> Any:
    """OpenAI's ``{"url": …, "detail": …}`` without its wrapping."""
    if not isinstance(value, Mapping):
        return value
    rest = {key: v for key, v in value.items() if key not in ("url", "detail")}
    if not isinstance(value.get("url"), str) or rest or value.get("detail") not in _DETAILS:
        raise ValueError(f'{name} must be {{"url": "data:…"}}, got {dict(value)!r:.80}')
    return value["url"]
