r"""Grammars for tool calls that must come, in the two ways in which Qwen models write them.

    <tool_call>                                   <tool_call>
    {"name": "f", "arguments": {"x": 1}}          <function=f>
    </tool_call>                                  <parameter=x>
                                                  1
    the Hermes format                             </parameter>
                                                  </function>
                                                  </tool_call>      the Coder format

Knows the formats, as the chat templates show them, and llguidance's Lark; knows no tokenizer but
the ids of two tokens. The layout is the templates' own, so that a model continues as it was
trained, and so that nothing between the values is left to chance.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qwen_jax.prompt.parsing_tools import CLOSE, OPEN
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.structured.parameters import json_rule, parameter_rules
from qwen_jax.structured.spec import ToolCalls, read_schema

_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,256}")
# As Python's json.dumps writes, and so the templates.
_LAYOUT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclasses.dataclass(frozen=True)
class CallIds:
    """Ids of ``<tool_call>`` and ``</tool_call>``."""

    opens: int
    closes: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "CallIds":
        """Raises ValueError for a tokenizer without them."""
        added = tokenizer.added
        missing = [tag for tag in (OPEN, CLOSE) if tag not in added]
        if missing:
            raise ValueError(
                f"this tokenizer has no token {missing[0]}: a tool call cannot be forced; "
                'use tool_choice="auto"'
            )
        return cls(added[OPEN], added[CLOSE])


def calls_grammar(calls: ToolCalls, ids: CallIds, *, answer_options: Mapping[str, Any]) -> str:
    """The Lark grammar of an output that is calls, or an answer where one is allowed.

    Args:
        calls: what may be called.
        ids: the two tags.
        answer_options: llguidance's options for the JSON of an answer.

    Raises:
        ValueError: no tool, or a name or a schema that the format cannot hold.
    """
    if not calls.tools:
        raise ValueError("a tool call is asked for, and there are no tools")
    bodies = [f"call_{i}" for i in range(len(calls.tools))]
    write = _hermes if calls.format == "hermes" else _coder
    rules = [rule for i, tool in enumerate(calls.tools) for rule in write(f"call_{i}", tool)]
    start = 'call ("\\n" call)*' if calls.many else "call"
    if calls.answer is not None:
        start = f"({start}) | answer"
        rules.append(json_rule("answer", calls.answer, answer_options))
    lines = [
        f"start: {start}",
        f"call: <[{ids.opens}]> ({' | '.join(bodies)}) <[{ids.closes}]>",
        *rules,
    ]
    return "\n".join(lines)


def parameters_of(tool: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """(name, schema of the parameters) of a tool in OpenAI's form; no schema means none at all."""
    function = tool.get("function", tool)
    name = function["name"]
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"tool {name!r:.80}: a name is 1 to 256 letters, digits or any of _ . : / -"
        )
    found = read_schema(function.get("parameters") or {}, f"tool {name!r}: parameters")
    return name, found if isinstance(found, Mapping) else {}


def _hermes(rule: str, tool: Mapping[str, Any]) -> Iterator[str]:
    name, parameters = parameters_of(tool)
    head = json.dumps(f'\n{{"name": "{name}", "arguments": ')
    yield f'{rule}: {head} {rule}_arguments "}}\\n"'
    whole = {"type": "object", **parameters}
    if not any(key in whole for key in ("$ref", "allOf", "anyOf", "oneOf")):
        # A tool takes the parameters that it lists, unless it says otherwise.
        whole = {"additionalProperties": False, **whole}
    yield json_rule(f"{rule}_arguments", whole, _LAYOUT)


def _coder(rule: str, tool: Mapping[str, Any]) -> Iterator[str]:
    name, parameters = parameters_of(tool)
    head = json.dumps(f"\n<function={name}>\n")
    sequence, rules = parameter_rules(rule, name, parameters, _LAYOUT)
    yield f'{rule}: {head} {sequence} "</function>\\n"'
    yield from rules
