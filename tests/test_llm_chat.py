"""`LLM`: streams, conversations and gaps in code."""

from unittest import mock

import pytest
import tiny_llm

from qwen_jax.engine import offline
from qwen_jax.prompt import fim
from qwen_jax.prompt.chat import encode_chat
from qwen_jax.prompt.parsing_tools import ContentDelta, ReasoningDelta, ToolCallDelta
from qwen_jax.requests import SamplingParams
from qwen_jax.results import CompletionOutput, RequestOutput

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
QUESTION = [{"role": "user", "content": "hello"}]
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "parameters": {"type": "object", "properties": {}}},
    }
]
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
ANSWER = f"<think>\nhm\n</think>\n\nyes\n{CALL}"


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.shared_llm()


@pytest.fixture
def says_answer(llm):
    """The model says `ANSWER`, whatever it is asked, a few letters at a time."""

    def result():
        output = CompletionOutput(0, ANSWER, [1], finish_reason="stop")
        return RequestOutput("0", "", [1], None, [output])

    def run(engine, prompts, params, **_):
        return [result() for _ in prompts]

    def stream(engine, prompt, params):
        pieces = [ANSWER[i : i + 3] for i in range(0, len(ANSWER), 3)]
        yield from ((piece, None) for piece in pieces[:-1])
        yield pieces[-1], result()

    with mock.patch.multiple(offline, run=run, stream=stream):
        yield


# ---- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"stop": "<"}])
def test_a_stream_joins_to_its_whole(llm, params):
    params = SamplingParams(temperature=0.0, max_tokens=20, **params)
    (whole,) = llm.generate("def f(", params, use_tqdm=False)
    events = list(llm.stream("def f(", params))
    assert "".join(event.text for event in events) == whole.outputs[0].text
    assert [event.output is None for event in events] == [True] * (len(events) - 1) + [False]
    last = events[-1].output
    assert last.outputs == whole.outputs
    assert len(events) > 5  # it does not come at once
    assert not any(event.deltas for event in events)


def test_an_abandoned_stream_leaves_the_llm_usable(llm):
    (expected,) = llm.generate("def f(", GREEDY, use_tqdm=False)
    stream = llm.stream("hello world", GREEDY)
    next(stream)
    del stream
    (found,) = llm.generate("def f(", GREEDY, use_tqdm=False)
    assert found.outputs == expected.outputs


def test_a_stream_and_another_call_leave_each_other_alone(llm):
    texts = ["hello world", "def f("]
    expected = [llm.generate(text, GREEDY, use_tqdm=False)[0].outputs for text in texts]
    stream = llm.stream(texts[0], GREEDY)
    first = next(stream)
    (found,) = llm.generate(texts[1], GREEDY, use_tqdm=False)
    events = [first, *stream]
    assert [events[-1].output.outputs, found.outputs] == expected
    assert "".join(event.text for event in events) == expected[0][0].text


def test_several_completions_cannot_be_streamed(llm):
    with pytest.raises(ValueError, match="n=2 cannot be streamed; use n=1, or generate"):
        next(llm.stream("x", SamplingParams(n=2)))


# ---- chat ----------------------------------------------------------------------------------------


def test_chat_asks_what_the_template_says(llm):
    (result,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    ids = encode_chat(llm.tokenizer, llm.template, QUESTION)
    assert result.prompt_token_ids == ids
    assert result.prompt == llm.template.render(QUESTION)
    (plain,) = llm.generate({"prompt_token_ids": ids}, GREEDY, use_tqdm=False)
    (output,) = result.outputs
    assert output.token_ids == plain.outputs[0].token_ids
    assert (output.content, output.reasoning_content) == (output.text, None)


def test_several_conversations_are_a_batch(llm):
    other = [{"role": "user", "content": "<|im_end|>"}]  # text, in a user's message
    results = llm.chat([QUESTION, other], GREEDY, use_tqdm=False)
    alone = [llm.chat(m, GREEDY, use_tqdm=False)[0] for m in (QUESTION, other)]
    assert [r.outputs[0].token_ids for r in results] == [r.outputs[0].token_ids for r in alone]
    assert results[1].prompt_token_ids.count(289) == 1  # the template's own <|im_end|>


def test_chat_options_reach_the_template(llm):
    (result,) = llm.chat(QUESTION, GREEDY, add_generation_prompt=False, use_tqdm=False)
    assert result.prompt == llm.template.render(QUESTION, add_generation_prompt=False)
    kwargs = {"chat_template_kwargs": {"add_generation_prompt": False}}
    (again,) = llm.chat(QUESTION, GREEDY, **kwargs, use_tqdm=False)
    assert again.prompt_token_ids == result.prompt_token_ids


def test_an_answer_is_taken_apart(llm, says_answer):
    (result,) = llm.chat(QUESTION, GREEDY, tools=TOOLS, use_tqdm=False)
    (output,) = result.outputs
    assert (output.text, output.reasoning_content, output.content) == (ANSWER, "hm", "yes\n")
    assert [(c.name, c.arguments) for c in output.tool_calls] == [("add", '{"a": 1}')]


def test_calls_are_text_where_no_tools_were_offered(llm, says_answer):
    (result,) = llm.chat(QUESTION, GREEDY, use_tqdm=False)
    (output,) = result.outputs
    assert output.tool_calls == []
    assert output.content.startswith("yes\n<tool_call>")


def test_a_streamed_answer_is_taken_apart_as_it_comes(llm, says_answer):
    events = list(llm.stream(QUESTION, GREEDY, tools=TOOLS))
    deltas = [delta for event in events for delta in event.deltas]
    assert "".join(d.text for d in deltas if isinstance(d, ReasoningDelta)) == "hm"
    assert "".join(d.text for d in deltas if isinstance(d, ContentDelta)) == "yes\n"
    calls = [d for d in deltas if isinstance(d, ToolCallDelta)]
    assert (calls[0].name, "".join(d.arguments for d in calls)) == ("add", '{"a": 1}')
    output = events[-1].output.outputs[0]
    assert (output.reasoning_content, output.content, len(output.tool_calls)) == ("hm", "yes\n", 1)
    first = next(i for i, event in enumerate(events) if event.deltas)
    assert first < len(events) // 2


def test_a_checkpoint_without_a_template_cannot_chat(llm):
    with (
        mock.patch.object(llm.inputs, "_template", None),
        pytest.raises(ValueError, match="this checkpoint has none: use generate"),
    ):
        llm.chat(QUESTION)


# ---- fill in the middle --------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [None, False])
def test_fill_asks_what_the_model_was_trained_on(llm, wrapped):
    where, one = {"path": "a.py", "repo": "r"}, SamplingParams(temperature=0.0, max_tokens=1)
    (result,) = llm.fill("def f(", "return x", one, chat_wrapped=wrapped, **where)
    template = llm.template if wrapped is None else None
    ids = fim.encode_fim(llm.tokenizer, "def f(", "return x", template=template, **where)
    assert result.prompt_token_ids == ids
    assert llm.tokenizer.encode(result.prompt) == ids
    prompt = llm.fill_prompt("def f(", "return x", chat_wrapped=wrapped, **where)
    assert list(llm.stream(prompt, one))[-1].output.outputs == result.outputs


@pytest.mark.parametrize("token", ["<|fim_pad|>", "<|file_sep|>", "<|im_end|>"])
def test_fill_ends_at_every_fim_token_and_generate_does_not(llm, token):
    id = llm.tokenizer.id(token)
    params = SamplingParams(temperature=0.0, max_tokens=1, logit_bias={id: 100.0})
    (filled,) = llm.fill("def f(", ")", params)
    assert (filled.outputs[0].token_ids, filled.outputs[0].finish_reason) == ([id], "stop")
    assert filled.outputs[0].stop_reason is None  # the checkpoint's own, as an end of text is
    (plain,) = llm.generate("def f(", params, use_tqdm=False)
    assert (plain.outputs[0].finish_reason == "stop") == (token == "<|im_end|>")


def test_fill_cannot_be_wrapped_without_a_template(llm):
    with (
        mock.patch.object(llm.inputs, "_template", None),
        pytest.raises(ValueError, match="chat_wrapped=True needs a chat template"),
    ):
        llm.fill("a", "b", chat_wrapped=True)
