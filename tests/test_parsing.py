"""Reasoning, and the parser as a whole: any chunking of any text gives the same message."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.parsing import (
    ContentDelta,
    Message,
    OutputParser,
    ReasoningDelta,
    ToolCall,
    ToolCallDelta,
    parse,
    reasoning_state,
    tool_format,
)

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "parameters": {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "f", "arguments": {"n": 1}}\n</tool_call>'
ONE = (ToolCall("f", '{"n": 1}'),)


@pytest.mark.parametrize(
    ("text", "reasoning", "thought", "content"),
    [
        ("<think>\nwhy\n</think>\n\nbecause", "auto", "why", "because"),
        ("why\n</think>\n\nbecause", "inside", "why", "because"),
        ("<think>\nwhy\n</think>\n\nbecause", "inside", "why", "because"),
        ("<think>\nwhy\n</think>\n\nbecause", "off", None, "<think>\nwhy\n</think>\n\nbecause"),
        (" \n<think>a</think>b", "auto", "a", "b"),
        ("<think>\n\n</think>\n\nb", "auto", None, "b"),
        ("<think>\n\na\n\n</think>\n\n\nb\n", "auto", "\na\n", "\nb\n"),
        ("no thought", "auto", None, "no thought"),
        ("\n no thought", "auto", None, "\n no thought"),
        ("late <think>a</think>b", "auto", None, "late <think>a</think>b"),
        ("a</think>b<think>c</think>", "inside", "a", "b<think>c</think>"),
        ("never closed\n", "inside", "never closed\n", None),
        ("<think>never closed", "auto", "never closed", None),
        ("<think", "auto", None, "<think"),
        ("half </thin", "inside", "half </thin", None),
        ("a</think>", "inside", "a", None),
        ("", "inside", None, ""),
        ("", "auto", None, ""),
    ],
)
def test_reasoning_is_cut_off(text, reasoning, thought, content):
    assert parse(text, reasoning=reasoning) == Message(thought, content)


@pytest.mark.parametrize(
    ("prompt", "state"),
    [
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n", "auto"),
        ("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n", "inside"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "off"),
        ("<|im_start|>assistant\n<think>\nso far", "inside"),
        ("<|im_start|>assistant\n<think>\na\n</think>\n\nThe answer", "off"),
        ("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n", "auto"),
        ("<|im_start|>user\nwhat is <think>", "auto"),
        ("2 + 2 = ", "auto"),
    ],
)
def test_the_prompt_tells_where_the_output_starts(prompt, state):
    assert reasoning_state(prompt) == state


def test_published_templates_tell_where_the_output_starts(shared_data):
    states = {}
    for name in ("Qwen3-30B-A3B", "Qwen3-30B-A3B-Thinking-2507", "Qwen3-30B-A3B-Instruct-2507"):
        template = ChatTemplate.from_dir(shared_data / name)
        messages = [{"role": "user", "content": "<think>"}]
        states[name] = [
            reasoning_state(template.render(messages, enable_thinking=on)) for on in (True, False)
        ]
    assert list(states.values()) == [["auto", "off"], ["inside", "inside"], ["auto", "auto"]]


def test_published_templates_tell_how_calls_are_written(shared_data):
    read = lambda name: (shared_data / name / "chat_template.jinja").read_text()
    assert tool_format(read("Qwen3-30B-A3B")) == "hermes"
    assert tool_format(read("Qwen3-VL-8B-Instruct")) == "hermes"
    assert tool_format(read("Qwen3-Coder-30B-A3B-Instruct")) == "coder"
    assert tool_format("{{ messages[0].content }}") is None


def test_a_call_after_the_reasoning_is_a_call():
    message = parse(f"why {CALL}\n</think>\n\nok{CALL}", reasoning="inside", tool_format="hermes")
    assert message == Message(f"why {CALL}", "ok", ONE)


def test_a_call_ends_reasoning_that_never_closes():
    message = parse(f"why\n{CALL}", reasoning="inside", tool_format="hermes")
    assert message == Message("why", None, ONE)
    coder = (
        "why <tool_call>\n<function=f>\n<parameter=n>\n1\n</parameter>\n</function>\n</tool_call>"
    )
    message = parse(f"<think>{coder}", tool_format="coder", tools=TOOLS)
    assert message == Message("why ", None, ONE)


def test_prose_about_calls_does_not_end_reasoning():
    text = "I could use <tool_call> here"
    assert parse(text, reasoning="inside", tool_format="hermes") == Message(text, None)
    parser = OutputParser(reasoning="inside", tool_format="hermes")
    assert parser.push(text) == [ReasoningDelta(text)]  # at once


def test_without_tools_calls_are_content():
    assert parse(CALL) == Message(None, CALL)
    assert parse(f"<think>{CALL}</think>{CALL}") == Message(CALL, CALL)


def test_deltas_come_as_early_as_they_are_certain():
    parser = OutputParser(tool_format="hermes")
    assert parser.push("<thi") == []
    assert parser.push("nk>\nso") == [ReasoningDelta("so")]
    assert parser.push("\n") == []
    assert parser.push("on\n</thi") == [ReasoningDelta("\non")]
    assert parser.push("nk>\n") == []
    assert parser.push("\nHi <") == [ContentDelta("Hi ")]
    assert parser.push("b> <tool_call>") == [ContentDelta("<b> ")]
    assert parser.push(CALL[len("<tool_call>") : -1]) == []
    assert parser.push(">") == [ToolCallDelta(0, "f"), ToolCallDelta(0, arguments='{"n": 1}')]
    assert parser.finish() == []
    assert parser.message == Message("so\non", "Hi <b> ", ONE)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match="reasoning='maybe' is unknown"):
        OutputParser(reasoning="maybe")
    with pytest.raises(ValueError, match="tool_format='xml' is unknown"):
        OutputParser(tool_format="xml")
    parser = OutputParser()
    parser.finish()
    with pytest.raises(ValueError, match="push after finish"):
        parser.push("x")


PIECES = st.sampled_from(
    [
        "<think>", "</think>", "<tool_call>", "</tool_call>", "<function=f>", "<function=", "f>",
        "</function>", "<parameter=n>", "<parameter=s>", "</parameter>", "\n", "\n\n", " ", "1",
        "a", "<", ">", '{"name": "f", "arguments": {"n": 1}}', '{"', '{"name"', "null", "é",
        CALL, "<tool_call>\n<function=f>\n<parameter=s>\nx\n</parameter>\n</function></tool_call>",
    ]
)  # fmt: skip
OUTPUTS = st.lists(PIECES, max_size=14).map("".join)


def streamed(text: str, cuts: list[int], **options) -> tuple[Message, list]:
    parser = OutputParser(**options)
    edges = [0, *sorted(cut for cut in cuts if cut <= len(text)), len(text)]
    chunks = [text[start:end] for start, end in itertools.pairwise(edges)]
    deltas = [delta for chunk in chunks for delta in parser.push(chunk)] + parser.finish()
    return parser.message, deltas


@settings(max_examples=200)
@given(
    text=OUTPUTS,
    cuts=st.lists(st.integers(0, 200), max_size=30),
    reasoning=st.sampled_from(["auto", "inside", "off"]),
    tool_format=st.sampled_from([None, "hermes", "coder"]),
)
def test_any_chunking_gives_the_same_message(text, cuts, reasoning, tool_format):
    options = {"reasoning": reasoning, "tool_format": tool_format, "tools": TOOLS}
    whole = parse(text, **options)
    assert streamed(text, cuts, **options)[0] == whole
    assert streamed(text, list(range(len(text))), **options)[0] == whole


@settings(max_examples=200)
@given(text=OUTPUTS, tool_format=st.sampled_from(["hermes", "coder"]))
def test_deltas_join_to_the_message(text, tool_format):
    message, deltas = streamed(text, list(range(len(text))), tool_format=tool_format, tools=TOOLS)
    texts = {ReasoningDelta: "", ContentDelta: ""}
    calls: list[list[str]] = []
    for delta in deltas:
        if isinstance(delta, ToolCallDelta):
            if delta.name is not None:
                assert delta.index == len(calls)  # calls are numbered in order
                calls.append([delta.name, ""])
            calls[delta.index][1] += delta.arguments
        else:
            assert delta.text
            assert not calls  # nothing but calls once there is one
            texts[type(delta)] += delta.text
    assert (message.reasoning_content or "") == texts[ReasoningDelta]
    assert (message.content or "") == texts[ContentDelta]
    assert [[call.name, call.arguments] for call in message.tool_calls] == calls


@given(OUTPUTS)
def test_where_nothing_is_called_the_content_is_unchanged(text):
    for form in ("hermes", "coder"):
        message = parse(text, reasoning="off", tool_format=form, tools=TOOLS)
        if not message.tool_calls:
            assert message.content == text
