"""Chat templates: rendering, messages, files, and the errors a user meets."""

import hashlib
import json
import logging

import pytest
from prompt_samples import CASES, GOLDENS, TEMPLATE, TEXT_CASES

from qwen_jax.prompt.chat import ChatTemplate

USER = [{"role": "user", "content": "hi"}]


def render(template: ChatTemplate, case: dict) -> str:
    return template.render(
        case["messages"],
        tools=case.get("tools"),
        **case.get("flags", {}),
        **case.get("kwargs", {}),
    )


@pytest.mark.parametrize("name", TEXT_CASES)
def test_own_template_renders_as_transformers_did(name):
    assert render(ChatTemplate(TEMPLATE), CASES[name]) == GOLDENS["chatml.jinja"][name]


@pytest.mark.parametrize("path", GOLDENS["published"])
def test_published_templates_render_as_transformers_did(shared_data, path):
    template = ChatTemplate((shared_data / path).read_text(encoding="utf-8"))
    digests = {
        name: hashlib.sha256(render(template, CASES[name]).encode()).hexdigest()[:16]
        for name in GOLDENS["published"][path]
    }
    assert digests == GOLDENS["published"][path]


@pytest.mark.parity
@pytest.mark.parametrize("path", GOLDENS["published"])
def test_published_templates_render_as_transformers_does(shared_data, path):
    transformers = pytest.importorskip("transformers", reason="needs the extra 'parity'")
    text = (shared_data / path).read_text(encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(shared_data / "tokenizer" / "tokenizer.json"), chat_template=text
    )
    template = ChatTemplate(text)
    for name in GOLDENS["published"][path]:
        case = CASES[name]
        flags = {"add_generation_prompt": True, **case.get("flags", {}), **case.get("kwargs", {})}
        theirs = tokenizer.apply_chat_template(
            case["messages"], tools=case.get("tools"), tokenize=False, **flags
        )
        assert render(template, case) == theirs, name


def test_parts_are_taken_by_templates_that_loop_over_content():
    loops = "{% for m in messages %}{% for c in m.content %}{{ c.text }}{% endfor %}{% endfor %}"
    assert ChatTemplate(loops).accepts_parts
    assert ChatTemplate(loops.replace("m.content", "m['content']")).accepts_parts
    assert not ChatTemplate(TEMPLATE).accepts_parts


def test_text_parts_are_joined_for_a_text_template():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    joined = ChatTemplate(TEMPLATE).render([{"role": "user", "content": parts}])
    assert joined == ChatTemplate(TEMPLATE).render([{"role": "user", "content": "a\nb"}])


def test_a_video_url_part_is_seen_as_a_video():
    template = ChatTemplate(
        "{% for m in messages %}{% for c in m.content %}"
        "{{ 'V' if c.type == 'video' or 'video' in c else '-' }}{% endfor %}{% endfor %}"
    )
    part = {"type": "video_url", "video_url": {"url": "v.mp4"}}
    assert template.render([{"role": "user", "content": [part]}]) == "V"


def test_tool_arguments_may_be_a_json_string_or_empty():
    template = ChatTemplate(TEMPLATE)

    def calling(arguments):
        function = {"name": "f", "arguments": arguments}
        calls = [{"type": "function", "function": function}]
        return [*USER, {"role": "assistant", "content": None, "tool_calls": calls}]

    text = template.render(calling('{"b":[1,null],"a":"ü"}'))
    assert '{"name": "f", "arguments": {"b": [1, null], "a": "ü"}}' in text
    assert text == template.render(calling({"b": [1, None], "a": "ü"}))
    assert template.render(calling("")) == template.render(calling({}))


def test_tojson_neither_escapes_nor_sorts():
    template = ChatTemplate("{{ tools[0] | tojson }}|{{ tools[0] | tojson(indent=1) }}")
    tool = {"name": "z", "b": "<ü'>", "a": None}
    text = template.render(USER, tools=[tool])
    assert text == '{"name": "z", "b": "<ü\'>", "a": null}|' + json.dumps(
        tool, indent=1, ensure_ascii=False
    )


def test_the_time_is_one_and_the_same_in_a_rendering():
    text = ChatTemplate("{{ strftime_now('%f') == strftime_now('%f') }}").render(USER)
    assert text == "True"


def test_raise_exception_reaches_the_caller():
    template = ChatTemplate("{{ raise_exception('no tools here, please') }}")
    with pytest.raises(ValueError, match="no tools here, please"):
        template.render(USER)


def test_files_are_taken_in_order(tmp_path):
    config = {"chat_template": "config {{ eos_token }}", "eos_token": {"content": "<|im_end|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "config <|im_end|>"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "json"}')
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja {{ eos_token }}")
    assert ChatTemplate.from_dir(tmp_path).render(USER) == "jinja <|im_end|>"


def test_named_templates_switch_on_tools(tmp_path):
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = ChatTemplate.from_dir(tmp_path)
    assert template.render(USER) == "plain"
    assert template.render(USER, tools=[{"name": "f"}]) == "tools"
    with pytest.raises(ValueError, match=r"no 'default' among the chat templates: .'tool_use'"):
        ChatTemplate({"tool_use": "tools"})


def test_no_template_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"chat_template\.jinja, chat_template\.json"):
        ChatTemplate.from_dir(tmp_path)


def test_a_dropped_system_message_is_logged(caplog):
    template = ChatTemplate("{{ messages[0].content }}")
    with caplog.at_level(logging.WARNING):
        template.render([*USER, {"role": "system", "content": "be kind"}])
    assert "leaves out messages[1] (system)" in caplog.text


def assistant(**extra) -> list[dict]:
    return [*USER, {"role": "assistant", **extra}]


def calls(*function) -> list[dict]:
    return assistant(content="", tool_calls=[{"function": item} for item in function])


BAD_MESSAGES = {
    "empty": ([], "non-empty list"),
    "a mapping": ({"role": "user", "content": "x"}, "non-empty list"),
    "a string": ("hello", "non-empty list"),
    "an item that is a string": (["hello"], r"messages\[0\] must be a mapping"),
    "no role": ([{"content": "x"}], r"messages\[0\]: role None is unknown; use one of system"),
    "another role": ([*USER, {"role": "bot", "content": "x"}], r"messages\[1\]: role 'bot'"),
    "a role of another type": ([{"role": ["user"], "content": "x"}], "role .'user'. is unknown"),
    "no content": ([{"role": "user"}], r"messages\[0\] \(user\) has no content"),
    "null content": (assistant(content=None), r"messages\[1\] \(assistant\) has no content"),
    "a number": ([{"role": "user", "content": 5}], "string or a list of parts, got 5"),
    "a part without type": ([{"role": "user", "content": [{"x": 1}]}], r"content\[0\]: type None"),
    "audio": ([{"role": "user", "content": [{"type": "input_audio"}]}], "'input_audio' is unknown"),
    "text that is none": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "needs a string 'text'",
    ),
    "a picture": ([{"role": "user", "content": [{"type": "image"}]}], "takes text only"),
    "reasoning of another type": (assistant(content="x", reasoning_content=1), "must be a string"),
    "calls of a user": ([{**USER[0], "tool_calls": [{}]}], "only an assistant message"),
    "calls that are no list": (assistant(content="", tool_calls="x"), "tool_calls must be a list"),
    "a call without name": (calls({"arguments": "{}"}), r"tool_calls\[0\] needs a function with"),
    "broken arguments": (calls({"name": "f", "arguments": '{"a": '}), "arguments is not JSON"),
    "NaN arguments": (calls({"name": "f", "arguments": '{"a": NaN}'}), "NaN is not JSON"),
    "arguments that are a list": (
        calls({"name": "f", "arguments": "[1]"}),
        "must be a JSON object",
    ),
}


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_are_named(name):
    messages, complaint = BAD_MESSAGES[name]
    with pytest.raises(ValueError, match=complaint):
        ChatTemplate(TEMPLATE).render(messages)


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, [{}], ["f"], [{"function": {"name": ""}}]])
def test_bad_tools_are_named(tools):
    with pytest.raises(ValueError, match=r"tools(\[0\])? must be"):
        ChatTemplate(TEMPLATE).render(USER, tools=tools)
    with pytest.raises(ValueError, match=r"tools\[0\] \(f\): parameters must be"):
        ChatTemplate(TEMPLATE).render(USER, tools=[{"name": "f", "parameters": "x"}])


def test_a_picture_in_a_system_message_is_an_error_where_parts_are_taken():
    template = ChatTemplate("{% for c in messages[0].content %}{{ c.text }}{% endfor %}")
    with pytest.raises(ValueError, match="a system message cannot hold 'image'"):
        template.render([{"role": "system", "content": [{"type": "image", "image": "a.png"}]}])


def test_continuing_and_starting_exclude_each_other():
    with pytest.raises(ValueError, match="give add_generation_prompt=False"):
        ChatTemplate(TEMPLATE).render(USER, continue_final_message=True)


def test_a_message_to_continue_must_be_rendered():
    with pytest.raises(ValueError, match="left the last message out"):
        ChatTemplate("x").render(USER, add_generation_prompt=False, continue_final_message=True)


def test_a_trimmed_message_to_continue_ends_where_the_template_ends_it():
    options = {"add_generation_prompt": False, "continue_final_message": True}
    messages = [{"role": "user", "content": "one, "}]
    assert ChatTemplate("[{{ messages[0].content }}]").render(messages, **options) == "[one, "
    assert ChatTemplate("[{{ messages[0].content|trim }}]").render(messages, **options) == "[one,"


@pytest.mark.parametrize("text", ["{% if %}", "{{ 'a'|nofilter }}", "{% for x in y %}", 5])
def test_a_bad_template_is_named(text):
    with pytest.raises(ValueError, match="chat template 'default' is"):
        ChatTemplate({"default": text})
