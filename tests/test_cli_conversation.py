"""`qwen-jax chat` without --prompt: turns, commands, interrupts."""

import argparse
import json

import pytest

from qwen_jax.commands.conversation import Conversation
from qwen_jax.engine.totals import Totals
from qwen_jax.llm import StreamEvent
from qwen_jax.prompt.parsing import OutputParser
from qwen_jax.requests import SamplingParams
from qwen_jax.results import CompletionOutput, RequestOutput

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'


class Scripted:
    """Stands in for an LLM: says one answer after the other, and keeps what it was asked."""

    def __init__(self, *answers):
        self.answers, self.asked = list(answers), []
        self.totals = Totals()

    def stream(self, messages, params, *, tools, chat_template_kwargs):
        self.asked.append((list(messages), tools, chat_template_kwargs))
        answer = self.answers.pop(0)
        if isinstance(answer, ValueError):
            raise answer
        parser = OutputParser(tool_format="hermes")
        for letter in answer:
            if letter == "^":
                raise KeyboardInterrupt
            yield StreamEvent(letter, parser.push(letter))
        spent = {"prompt_tokens": 3, "generated_tokens": 2, "prefill_time": 1.5}
        self.totals -= Totals(**{name: -n for name, n in spent.items()})
        deltas = parser.finish()
        output = CompletionOutput(0, answer, [], tool_calls=list(parser.message.tool_calls))
        yield StreamEvent("", deltas, RequestOutput("0", None, [], None, [output]))


@pytest.fixture
def talk():
    def talk(*answers, lines=(), system=None, tools=None, quiet=True):
        args = argparse.Namespace(quiet=quiet, system=system)
        model = Scripted(*answers)
        it = Conversation(args, model, SamplingParams(), tools=tools, kwargs={"k": 1})
        script = iter(lines)

        def read():
            line = next(script, None)
            if line is None:
                raise EOFError
            if line == "^C":
                raise KeyboardInterrupt
            return line

        return it.loop(read), model.asked, it.messages

    return talk


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def test_turns_are_remembered(talk, capsys):
    status, asked, messages = talk("one", "two", lines=["a\n", "  ", "b\n"], system="s")
    system = {"role": "system", "content": "s"}
    assert status == 0
    assert asked == [
        ([system, user("a")], None, {"k": 1}),
        ([system, user("a"), assistant("one"), user("b")], None, {"k": 1}),
    ]
    assert messages[-1] == assistant("two")
    assert capsys.readouterr() == ("onetwo", "")


def test_reset_forgets_all_but_the_system_message(talk):
    _, asked, messages = talk("one", "two", lines=["a", "/reset", "b"], system="s")
    assert asked[1][0] == [{"role": "system", "content": "s"}, user("b")]
    assert len(messages) == 3


@pytest.mark.parametrize("word", ["/exit", "/quit"])
def test_exit_leaves(talk, word):
    status, asked, _ = talk(lines=[word, "more"])
    assert (status, asked) == (0, [])


def test_a_word_that_is_no_command_gets_a_did_you_mean(talk, capsys):
    _, asked, _ = talk("yes", lines=["/rest", "/help", "/etc/passwd is what?"])
    assert [messages for messages, *_ in asked] == [[user("/etc/passwd is what?")]]
    said = capsys.readouterr().err
    assert "there is no /rest; did you mean /reset?" in said
    assert "/exit or ctrl-D leaves" in said


def test_ctrl_c_stops_an_answer_and_keeps_what_was_said(talk, capsys):
    status, asked, _ = talk("on^e", "two", lines=["a", "b"])
    assert status == 0
    assert asked[1][0] == [user("a"), assistant("on"), user("b")]
    assert capsys.readouterr().out == "ontwo"


def test_ctrl_c_leaves_when_it_is_typed_twice(talk, capsys):
    status, asked, _ = talk("one", lines=["^C", "a", "^C", "^C", "b"])
    assert (status, len(asked)) == (130, 1)
    assert capsys.readouterr().err.count("ctrl-C once more leaves") == 2


def test_an_error_leaves_the_conversation_as_it_was(talk, capsys):
    _, asked, _ = talk("one", ValueError("too long"), "two", lines=["a", "b", "c"])
    assert asked[2][0] == [user("a"), assistant("one"), user("c")]
    assert "qwen-jax: error: too long (/reset begins anew)" in capsys.readouterr().err


def test_reasoning_goes_to_stderr_and_calls_are_json(talk, capsys):
    tools = [{"type": "function", "function": {"name": "add"}}]
    answer = f"<think>\nhm\n</think>\n\nyes\n{CALL}"
    _, asked, _ = talk(answer, "4", lines=["a", "b"], tools=tools, quiet=False)
    out, err = capsys.readouterr()
    assert out.startswith("yes")
    assert json.loads(out.removeprefix("yes").splitlines()[1]) == {
        "name": "add",
        "arguments": '{"a": 1}',
    }
    assert "hm\n" in err
    assert asked[0][1] == tools
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    assert asked[1][0][1] == assistant("yes\n", reasoning_content="hm", tool_calls=[call])
    each = "Prompt: 3 tokens, 2.000 tokens-per-sec / Generation: 2 tokens"
    assert err.count(each) == 2  # of its turn alone
