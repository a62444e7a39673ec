"""What a lesson is made of. Knows the three forms of a sample; knows no token."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation whose assistant turns are to be learned.

    Attributes:
        messages: as `LLM.chat` takes them, answers included; the last turn is an answer.
        tools: definitions offered, or none.
        seen: for each token of its pictures the words for what is there, to be learned beside the
            answers: a picture teaches nine things then, not only what was asked.
        where: for each of them the words for its place in the picture, or none.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    seen: Sequence[tuple[str, ...]] = ()
    where: Sequence[tuple[str, ...]] = ()


@dataclasses.dataclass(frozen=True)
class Gap:
    """Code with a gap; ``wrapped`` as a turn of a conversation, as `LLM.fill` does, or bare."""

    prefix: str
    middle: str
    suffix: str
    wrapped: bool = True


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to be learned as it is.

    Attributes:
        text: all of it.
        ends: it is whole, so that its end is learned too.
        cut: a character at which a prompt might stop: no token reaches across it.
    """

    text: str
    ends: bool = False
    cut: int = 0


Sample = Chat | Gap | Text


def user(content: Any) -> dict[str, Any]:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    """An answer."""
    return {"role": "assistant", "content": content}
