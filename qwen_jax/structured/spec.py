"""What a caller asks of the form of an output, and what it becomes.

Knows names and limits; knows no tokenizer. The engine calls `Matcher`, which has the members of its
protocol `Constraint`.
"""

import dataclasses
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from qwen_jax.structured.number_bounds import nearest_bounds

if TYPE_CHECKING:
    import numpy as np

_KINDS = ("json", "regex", "choice", "grammar", "json_object", "tool_calls")


@dataclasses.dataclass(frozen=True)
class ToolCalls:
    """An output that is tool calls.

    Attributes:
        format: how this checkpoint writes them, see `prompt.parsing.tool_format`.
        tools: those that may be called, in OpenAI's form.
        many: one call after another, as many as the model likes; else exactly one.
        answer: a schema that the output may follow instead of being calls; None: calls it must be.
    """

    format: Literal["hermes", "coder"]
    tools: Sequence[Mapping[str, Any]]
    many: bool = True
    answer: Mapping[str, Any] | bool | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class StructuredOutputs:
    """The form an output must have: exactly one of the first six. Names are vLLM's.

    Attributes:
        json: a JSON schema, as a mapping or as text.
        regex: a regular expression that the whole output matches.
        choice: texts, one of which the output is.
        grammar: in llguidance's variant of Lark.
        json_object: True: any JSON object.
        tool_calls: made by the server for a forced tool call.
        disable_any_whitespace: JSON without white space between its parts.
        whitespace_pattern: a regular expression for the white space between the parts of JSON.

    Raises:
        ValueError: none of them, or two, or a value of the wrong kind.
    """

    json: Mapping[str, Any] | bool | str | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    tool_calls: ToolCalls | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        given += ["json"] if self.json is False else []
        if len(given) != 1:
            what = f"{' and '.join(given)} exclude each other" if given else "asks for nothing"
            raise ValueError(f"structured_outputs {what}; give one of {', '.join(_KINDS[:-1])}")
        for name in ("regex", "grammar", "whitespace_pattern"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"structured_outputs.{name} must be a text, got {value!r:.80}")
        for name in ("json_object", "disable_any_whitespace"):
            if not isinstance(getattr(self, name), bool | None):
                raise ValueError(f"structured_outputs.{name} must be true or false")
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise ValueError(
                "structured_outputs: whitespace_pattern and disable_any_whitespace exclude "
                "each other"
            )
        if self.choice is not None:
            self._check_choice(self.choice)

    @staticmethod
    def _check_choice(choice: Any) -> None:
        good = isinstance(choice, Sequence) and not isinstance(choice, str) and len(choice) > 0
        if not good or not all(isinstance(text, str) and text for text in choice):
            raise ValueError(
                f"structured_outputs.choice must be a list of texts, none empty, got {choice!r:.80}"
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> "StructuredOutputs":
        """From what somebody typed: an unknown name gets a did-you-mean."""
        known = [field.name for field in dataclasses.fields(cls) if field.name != "tool_calls"]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
                raise ValueError(f"unknown key {name!r} in structured_outputs; {hint}")
        return cls(**options)


class Matcher(Protocol):
    """The state of one text. A mask is uint32 [ceil(V / 32)], bit i % 32 of word i // 32."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete, so that nothing but an end of text could follow."""
        ...

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes tokens that the text got. Raises ValueError for what the grammar does not allow."""
        ...

    def mask(self, out: "np.ndarray") -> None:
        """Writes the tokens that may follow, over all of ``out``."""
        ...

    def forced(self) -> list[int]:
        """Tokens that must follow, often none; they are not accepted by this."""
        ...


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A compiled wish.

    Attributes:
        matcher: starts a text under it.
        wish: what it was compiled from, for a prompt; None for a part of that.
    """

    matcher: Callable[[], Matcher]
    wish: StructuredOutputs | None = None


def read_schema(schema: Any, name: str) -> Mapping[str, Any] | bool:
    """A JSON schema as plain JSON values, its bounds as `nearest_bounds` writes them.

    Args:
        schema: a mapping, True or False, or the text of one of these.
        name: what to call it in errors.

    Raises:
        ValueError: no JSON, not a schema's outer form, or nested too deep.
    """
    try:
        if isinstance(schema, str):
            schema = json.loads(schema, parse_constant=_no_constant)
        else:
            schema = json.loads(json.dumps(schema, allow_nan=False))
        schema = nearest_bounds(schema)
    except RecursionError:
        raise ValueError(f"{name} is nested too deep") from None
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(schema, dict | bool):
        raise ValueError(f"{name} must be a JSON object, got {schema!r:.80}")
    return schema


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
