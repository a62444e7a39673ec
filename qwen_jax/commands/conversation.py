"""A conversation in the terminal: turns, and the few words that are commands.

Knows messages, stdin and stdout; the model is somebody else's.
"""

import argparse
import contextlib
import difflib
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import output, session
from qwen_jax.commands.completion import Answer
from qwen_jax.requests import SamplingParams

if TYPE_CHECKING:
    from qwen_jax.llm import LLM

_HELP = (
    "/image FILE and /video FILE go with the next question, /reset forgets the turns, /exit or "
    "ctrl-D leaves, ctrl-C stops an answer"
)
_COMMANDS = ("/reset", "/exit", "/quit", "/help", "/image", "/video")
_WORD = re.compile(r"/[a-z]+")
_PICTURE = re.compile(r"/(image|video)\s+(.+)")


class Conversation:
    """Turns with a model.

    Attributes:
        messages: so far.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        llm: "LLM",
        params: SamplingParams,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ):
        self._args, self._llm, self._params = args, llm, params
        self._options = {"tools": tools, "chat_template_kwargs": kwargs}
        self.messages: list[Mapping[str, Any]] = []
        self._pictures: list[Mapping[str, Any]] = []
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system message."""
        system = self._args.system
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self._pictures = []

    def attach(self, kind: str, path: str) -> None:
        """Puts a picture or a video ("image", "video") before the next question."""
        self._pictures.append({"type": kind, kind: os.path.expanduser(path)})

    def asked(self, text: str) -> list[Mapping[str, Any]]:
        """The conversation with a question behind it, and the pictures that go with that."""
        content: Any = text
        if self._pictures:
            content = [*self._pictures, {"type": "text", "text": text}]
        return [*self.messages, {"role": "user", "content": content}]

    def turn(self, text: str) -> int:
        """One question and its answer; 130 where ctrl-C ended it, which keeps what was said.

        Raises:
            ValueError: the conversation has become too long, or a picture cannot be used; the
                turns are as before, and the pictures of this one are dropped.
        """
        asked, self._pictures = self.asked(text), []
        before, code = self._llm.totals, 0
        answer = Answer(quiet=self._args.quiet)
        with session.Compiling(self._args) as compiling:
            try:
                for event in self._llm.stream(asked, self._params, **self._options):
                    compiling.text_begins()
                    answer.add(event)
            except KeyboardInterrupt:
                code = 130
            answer.close()
            output.end_line()
        session.footer(self._args, self._llm.totals - before)
        self.messages = [*asked, answer.message]
        return code

    def loop(self, read: Callable[[], str] | None = None) -> int:
        """Turns until the end of input; ``read`` gets a line, and raises EOFError at the end."""
        read = read or _reader()
        session.say(self._args, _HELP)
        stopped = False
        while True:
            try:
                text = read().strip()
            except EOFError:
                output.end_line()
                return 0
            except KeyboardInterrupt:
                if stopped:
                    return 130
                stopped = True
                print("\nctrl-C once more leaves", file=sys.stderr, flush=True)
                continue
            stopped = False
            picture = _PICTURE.fullmatch(text)
            if picture:
                self.attach(*picture.groups())
                session.say(self._args, f"{picture[2]} goes with the next question")
            elif _WORD.fullmatch(text):
                if text in ("/exit", "/quit"):
                    return 0
                self._command(text)
            elif text:
                self._try_turn(text)

    def _try_turn(self, text: str) -> None:
        try:
            self.turn(text)
        except ValueError as error:
            print(f"qwen-jax: error: {error} (/reset begins anew)", file=sys.stderr, flush=True)

    def _command(self, word: str) -> None:
        if word == "/reset":
            self.reset()
        elif word in ("/image", "/video"):
            print(f"{word} needs a file: {word} FILE", file=sys.stderr, flush=True)
            return
        elif word != "/help":
            near = difflib.get_close_matches(word, _COMMANDS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            print(f"there is no {word}{hint}", file=sys.stderr, flush=True)
            return
        print(_HELP if word == "/help" else "forgotten", file=sys.stderr, flush=True)


def _reader() -> Callable[[], str]:
    """Reads lines from the terminal, with editing and history, or from a pipe, without a sign."""
    if not sys.stdin.isatty():

        def line() -> str:
            text = sys.stdin.readline()
            if not text:
                raise EOFError
            return text

        return line
    with contextlib.suppress(ImportError):  # not on every platform
        import readline  # noqa: F401  (importing it gives input() editing and history)
    return lambda: input("> ")
