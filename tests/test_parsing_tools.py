"""Tool calls in both formats, against the published rules written as regular expressions."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.prompt.parsing import OutputParser, ToolCallDelta, parse

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "write",
            "parameters": {
                "type": "object",
                "properties": {
                    "path": {"type": "string"},
                    "text": {"type": "string"},
                    "mode": {"type": "integer"},
                    "tags": {"type": "array"},
                },
            },
        },
    }
]


def hermes(text):
    return parse(text, reasoning="off", tool_format="hermes")


def coder(text):
    return parse(text, reasoning="off", tool_format="coder", tools=TOOLS)


def calls(message):
    return [(call.name, json.loads(call.arguments)) for call in message.tool_calls]


def function(name, **parameters):
    body = "".join(
        f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters.items()
    )
    return f"<function={name}>\n{body}</function>"


def block(*functions):
    return "<tool_call>\n" + "\n".join(functions) + "\n</tool_call>"


def test_hermes_calls_and_the_text_before_them():
    one = '<tool_call>\n{"name": "a", "arguments": {"x": "ü", "y": [1, 2.5, null]}}\n</tool_call>'
    two = '<tool_call>{"arguments": {}, "name": "b"}</tool_call>'
    message = hermes(f"Let me.\n{one}\n{two}\nDone.")
    assert message.content == "Let me.\n"
    assert calls(message) == [("a", {"x": "ü", "y": [1, 2.5, None]}), ("b", {})]
    assert message.tool_calls[0].arguments == '{"x": "ü", "y": [1, 2.5, null]}'
    assert hermes(one).content is None


def test_hermes_last_call_may_be_unclosed():
    message = hermes('a<tool_call>\n{"name": "f", "arguments": {"x": 1}}')
    assert (message.content, calls(message)) == ("a", [("f", {"x": 1})])


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": {"x": 1}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f"}',
        '{"name": 5, "arguments": {}}',
        '{"name": "", "arguments": {}}',
        '{"name": "f", "arguments": {"x": NaN}}',
        '{"name": "f", "arguments": {}} and more',
        "[1]",
        "not JSON",
        "",
    ],
)
def test_hermes_text_that_is_no_call_is_content(body):
    for text in (f"a<tool_call>{body}</tool_call>b", f"a<tool_call>{body}"):
        message = hermes(text)
        assert (message.content, message.tool_calls) == (text, ())


def test_hermes_call_after_a_broken_one_counts():
    good = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    bad = '<tool_call>{"name": "f", "arguments": {</tool_call>'
    message = hermes(f"x{bad}y{good}{bad}{good}")
    assert message.content == f"x{bad}y"
    assert [name for name, _ in calls(message)] == ["f", "f"]


def test_hermes_arguments_may_be_a_json_string():
    message = hermes('<tool_call>{"name": "f", "arguments": "{\\"x\\": 1}"}</tool_call>')
    assert calls(message) == [("f", {"x": 1})]


def test_arguments_can_always_be_sent_as_utf8():
    message = hermes('<tool_call>{"name": "f", "arguments": {"x": "\\ud800"}}</tool_call>')
    assert message.tool_calls[0].arguments.encode() == b'{"x": "\\ud800"}'


@pytest.mark.parametrize("tool_format", ["hermes", "coder"])
def test_a_tag_mentioned_in_prose_does_not_silence_the_stream(tool_format):
    parser = OutputParser(reasoning="off", tool_format=tool_format, tools=TOOLS)
    text = "Write `<tool_call>` and `<function=` tags, "
    assert "".join(delta.text for delta in parser.push(text)) == text
    assert [delta.text for delta in parser.push("then go on.")] == ["then go on."]


def test_coder_calls_and_the_text_before_them():
    text = "Sure.\n" + block(function("write", path="a.py", text="x\n\ny", mode="420"))
    message = coder(text)
    assert message.content == "Sure.\n"
    assert message.tool_calls[0].arguments == '{"path": "a.py", "text": "x\\n\\ny", "mode": 420}'


def test_coder_two_calls_of_one_tool_are_two():
    two = (
        block(function("write", path="a"))
        + "\n"
        + block(function("write", path="b"), function("w"))
    )
    assert calls(coder(two)) == [("write", {"path": "a"}), ("write", {"path": "b"}), ("w", {})]


def test_coder_opening_tag_may_be_missing():
    text = "Hm.\n" + function("write", path="a") + "\n</tool_call>"
    message = coder(text)
    assert (message.content, calls(message)) == ("Hm.\n", [("write", {"path": "a"})])


def test_coder_last_call_may_be_unclosed():
    for end in ("", "\n", "\n</parameter>", "\n</parameter>\n", "\n</parameter>\n</function>"):
        message = coder("<tool_call>\n<function=write>\n<parameter=path>\na b" + end)
        assert calls(message) == [("write", {"path": "a b"})], end
    assert calls(coder("<tool_call>\n<function=write>")) == [("write", {})]


def test_coder_parameter_may_be_unclosed():
    text = "<function=write><parameter=path>\na\n<parameter=mode>\n7\n</function>"
    assert calls(coder(text)) == [("write", {"path": "a", "mode": 7})]


def test_coder_value_loses_one_newline_at_either_side():
    text = block("<function=write><parameter=text>\n\n  x\n\n</parameter></function>")
    assert calls(coder(text)) == [("write", {"text": "\n  x\n"})]


def test_coder_value_may_hold_tags_that_do_not_end_it():
    value = 'if a < b: <tool_call> print("</div> <function=x> >")'
    text = block(function("write", text=value, path="p"))
    assert calls(coder(text)) == [("write", {"text": value, "path": "p"})]


def test_coder_value_ends_at_the_first_closing_tag():
    text = block(function("write", text="a</parameter>b", path="p"))
    assert calls(coder(text)) == [("write", {"text": "a", "path": "p"})]


def test_coder_parameter_without_a_name_is_left_out():
    text = block(
        "<function=write><parameter=path\n</parameter><parameter=mode>1</parameter></function>"
    )
    assert calls(coder(text)) == [("write", {"mode": 1})]


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nprint()\n</tool_call>",
        "<tool_call></tool_call>",
        "a <function= b",
        "a <function=> b",
        "the <function=two words> tag",
        "<tool_call>\n<function=write",
        "<function=" + "x" * 300,
        "<tool_call>\n<tool_call> twice",
    ],
)
def test_coder_text_that_is_no_call_is_content(text):
    message = coder(text)
    assert (message.content, message.tool_calls) == (text, ())


def test_coder_fragments_come_with_each_parameter():
    parser = OutputParser(reasoning="off", tool_format="coder", tools=TOOLS)
    push = lambda text: [(d.index, d.name, d.arguments) for d in parser.push(text)]
    assert push("<tool_call>\n<function=wri") == []
    assert push("te>") == [(0, "write", "")]
    assert push("\n<parameter=path>\na.py\n</parameter") == []
    assert push(">\n") == [(0, None, '{"path": "a.py"')]
    assert push("<parameter=mode>\n7\n</parameter>") == [(0, None, ', "mode": 7')]
    assert push("\n</function>") == [(0, None, "}")]
    assert push("\n<function=empty>\n</function>") == [(1, "empty", ""), (1, None, "{}")]
    assert parser.finish() == []
    assert all(isinstance(delta, ToolCallDelta) for delta in parser.finish())


# The published rules (sglang qwen3_coder_detector.py), as an independent parser of whole texts.
def oracle(text: str) -> tuple[str | None, list[tuple[str, dict]]]:
    flags = re.DOTALL
    blocks = [
        a or b for a, b in re.findall(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", text, flags)
    ]
    start = text.find("<tool_call>")
    if start < 0:
        blocks, start = [text], text.find("<function=")
    found = []
    for one in blocks:
        for a, b in re.findall(r"<function=(.*?)</function>|<function=(.*)$", one, flags):
            name, _, body = (a or b).partition(">")
            pattern = r"<parameter=(.*?)(?:</parameter>|(?=<parameter=)|(?=</function>)|$)"
            values = {}
            for pair in re.findall(pattern, body, flags):
                key, closed, value = pair.partition(">")
                if closed:
                    values[key] = value.removeprefix("\n").removesuffix("\n")
            found.append((name, values))
    return (text[:start] or None) if found else text, found


VALUES = st.lists(
    st.sampled_from(["a", "\n", " ", "<", ">", "</", "<parameter=k>", "</div>", "<param", "é"]),
    max_size=6,
).map("".join)
PARAMETER = st.tuples(
    st.sampled_from(["k", "l", "m"]), VALUES, st.sampled_from(["</parameter>", ""])
)


@st.composite
def outputs(draw) -> str:
    """Well-meant output of a Coder model, with the slips that the rules provide for."""

    def one() -> str:
        body = "".join(
            f"\n<parameter={k}>{v}{end}" for k, v, end in draw(st.lists(PARAMETER, max_size=3))
        )
        return f"<function={draw(st.sampled_from(['f', 'g']))}>{body}"

    text = draw(st.sampled_from(["", "Sure.\n", "a < b "]))
    bare = draw(st.booleans())
    for _ in range(1 if bare else draw(st.integers(1, 3))):
        inside = "\n".join(one() + "\n</function>" for _ in range(draw(st.integers(1, 2))))
        text += inside if bare else f"<tool_call>\n{inside}\n</tool_call>\n"
    if draw(st.booleans()):  # cut off in the middle of a last call
        text += ("" if bare else "<tool_call>\n") + one()
    return text


@settings(max_examples=200)
@given(outputs())
def test_coder_equals_the_published_rules(text):
    message = parse(text, reasoning="off", tool_format="coder")
    content, found = oracle(text)
    assert message.content == content
    # Without schemas every value is a string, apart from null, which VALUES cannot spell.
    assert calls(message) == found
