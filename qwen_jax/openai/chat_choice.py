"""One answer of a chat completion, as it grows.

Knows the parser's deltas and how OpenAI writes them; knows neither prompt nor request.
"""

from typing import Any

from qwen_jax.engine.events import Delta
from qwen_jax.openai.ids import derived_id
from qwen_jax.openai.logprobs import chat_logprobs
from qwen_jax.prompt.parsing import OutputParser
from qwen_jax.prompt.parsing_tools import ContentDelta, ReasoningDelta, ToolCallDelta
from qwen_jax.prompt.tokenizer import Tokenizer


class Choice:
    """An answer: `take` the engine's events; `pieces` is what is new, `whole` is all of it.

    Args:
        index: among the answers of the request.
        reply_id: of the whole reply; those of its calls come from it.
        parser: takes its text apart.
        tokenizer: for logprobs.
        named: tool_choice named the function: the reason for the end is "stop" then, as OpenAI's.
        one_call: further calls are left out.
        with_reasoning: whether reasoning is shown.
        top: how many logprobs to show, None for none at all.
        with_ids: whether to show token ids.
    """

    def __init__(
        self,
        index: int,
        reply_id: str,
        parser: OutputParser,
        tokenizer: Tokenizer,
        *,
        named: bool,
        one_call: bool,
        with_reasoning: bool,
        top: int | None,
        with_ids: bool,
    ):
        self.tokens = 0
        self._index, self._reply_id = index, reply_id
        self._parser, self._tokenizer = parser, tokenizer
        self._named, self._one_call, self._with_reasoning = named, one_call, with_reasoning
        self._top, self._with_ids = top, with_ids
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._reason: str | None = None
        self._stop: int | str | None = None
        self._new: dict[str, Any] = {}
        self._shown = 0  # logprobs that pieces have shown
        self._shown_ids = 0
        self._ended = False  # the last piece has been shown

    def take(self, event: Delta) -> None:
        """An event of this answer."""
        self.tokens += len(event.token_ids)
        self._ids += event.token_ids
        if self._top is not None and event.logprobs is not None:
            self._logprobs += chat_logprobs(
                self._tokenizer, event.token_ids, event.logprobs, self._top
            )
        deltas = self._parser.push(event.text)
        if event.finish_reason is not None:
            deltas += self._parser.finish()
        for delta in deltas:
            self._add(delta)
        if event.finish_reason is not None:
            self._stop, self._reason = event.stop_reason, event.finish_reason
            if self._reason == "stop" and self._calls and not self._named:
                self._reason = "tool_calls"

    def _add(self, delta: Any) -> None:
        match delta:
            case ContentDelta(text):
                self._content.append(text)
                self._new["content"] = self._new.get("content", "") + text
            case ReasoningDelta(text) if self._with_reasoning:
                self._reasoning.append(text)
                self._new["reasoning_content"] = self._new.get("reasoning_content", "") + text
            case ToolCallDelta(index, name, arguments) if not (self._one_call and index):
                self._add_call(index, name, arguments)

    def _add_call(self, index: int, name: str | None, arguments: str) -> None:
        new = self._new.setdefault("tool_calls", [])
        if name is not None:
            id = derived_id("call_", self._reply_id, self._index, index)
            call = {"id": id, "type": "function"}
            self._calls.append({**call, "function": {"name": name, "arguments": arguments}})
            function = {"name": name, "arguments": arguments}
            new.append({"index": index, **call, "function": function})
            return
        self._calls[index]["function"]["arguments"] += arguments
        if new and new[-1]["index"] == index:
            new[-1]["function"]["arguments"] += arguments
        else:
            new.append({"index": index, "function": {"arguments": arguments}})

    # ---- what is shown -----------------------------------------------------------------------

    def opening(self) -> dict[str, Any]:
        """The first piece."""
        return self._piece({"role": "assistant", "content": ""})

    def pieces(self) -> list[dict[str, Any]]:
        """What came since the last piece; often nothing, while text is held back."""
        found = []
        last = self._reason is not None and not self._ended
        unseen = len(self._logprobs) > self._shown or (
            self._with_ids and len(self._ids) > self._shown_ids
        )
        if self._new or (last and unseen):
            new, self._new = self._new, {}
            piece = self._piece(new)
            if self._top is not None:
                piece["logprobs"] = {"content": self._logprobs[self._shown :], "refusal": None}
                self._shown = len(self._logprobs)
            if self._with_ids:
                piece["token_ids"] = self._ids[self._shown_ids :]
                self._shown_ids = len(self._ids)
            found.append(piece)
        if last:
            self._ended = True
            found.append(
                {**self._piece({}), "finish_reason": self._reason, "stop_reason": self._stop}
            )
        return found

    def _piece(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}

    def whole(self) -> dict[str, Any]:
        """The answer with its message."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self._calls or self._reasoning else ""),
            "refusal": None,
        }
        if self._reasoning:
            message["reasoning_content"] = "".join(self._reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        logprobs = None
        if self._top is not None:
            logprobs = {"content": self._logprobs, "refusal": None}
        found = {
            "index": self._index,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._reason,
            "stop_reason": self._stop,
        }
        return {**found, "token_ids": self._ids} if self._with_ids else found
