"""One text streamed to stdout, or several at once; shared by the commands that complete texts.

Knows an open model and stdout; knows no options of its own.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import output, session
from qwen_jax.prompt.parsing_tools import ContentDelta, ReasoningDelta
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.results import RequestOutput, StreamEvent

if TYPE_CHECKING:
    from qwen_jax.llm import LLM

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


def complete(
    args: argparse.Namespace, llm: "LLM", prompts: Sequence[str | Prompt], params: SamplingParams
) -> int:
    """All prompts as one batch; results at the end."""
    return finish(
        args, llm, lambda: llm.generate(list(prompts), params, use_tqdm=_shows_progress(args))
    )


def finish(args: argparse.Namespace, llm: "LLM", call: Callable[[], list[RequestOutput]]) -> int:
    """Writes what ``call`` returns, and the footer."""
    with session.Compiling(args):
        results = call()
    if args.json:
        output.write_results(results)
    else:
        output.write_texts(results)
    session.footer(args, llm.totals)
    return 0


def stream(
    args: argparse.Namespace, llm: "LLM", prompt: str | Prompt, params: SamplingParams
) -> int:
    """One prompt, its text as it comes; ctrl-C ends it and keeps what is there."""
    code = 0
    with session.Compiling(args) as compiling:
        try:
            for event in llm.stream(prompt, params):
                compiling.text_begins()
                output.write(event.text)
        except KeyboardInterrupt:
            code = 130
        output.end_line()
    session.footer(args, llm.totals)
    return code


class Answer:
    """An answer of a chat as it comes: reasoning to stderr (dim on a terminal), the rest to stdout.

    Attributes:
        message: what there is of it so far, as a message of the conversation.
    """

    def __init__(self, *, quiet: bool):
        self._quiet = quiet
        self._reasons = False
        self.message: dict[str, Any] = {"role": "assistant", "content": ""}

    def add(self, event: "StreamEvent") -> None:
        """Shows one event."""
        for delta in event.deltas:
            match delta:
                case ReasoningDelta(text):
                    self._reason(text)
                    thought = self.message.get("reasoning_content", "")
                    self.message["reasoning_content"] = thought + text
                case ContentDelta(text):
                    self._end_reasoning()
                    output.write(text)
                    self.message["content"] += text
        if event.output is not None:
            self._end_reasoning()
            calls = [_call(call) for call in event.output.outputs[0].tool_calls]
            if calls:
                self.message["tool_calls"] = calls
                for call in calls:
                    output.write_json(call["function"])

    def close(self) -> None:
        """Ends what an interrupted answer left open."""
        self._end_reasoning()

    def _reason(self, text: str) -> None:
        if self._quiet:
            return
        if not self._reasons and sys.stderr.isatty():
            sys.stderr.write(_DIM)
        self._reasons = True
        sys.stderr.write(text)
        sys.stderr.flush()

    def _end_reasoning(self) -> None:
        if self._reasons:
            sys.stderr.write(f"{_PLAIN}\n\n" if sys.stderr.isatty() else "\n\n")
            sys.stderr.flush()
            self._reasons = False


def _call(call: Any) -> Mapping[str, Any]:
    return {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _shows_progress(args: argparse.Namespace) -> bool:
    return not args.quiet and sys.stderr.isatty()
