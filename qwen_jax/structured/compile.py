"""Wishes compiled to grammars over a tokenizer's tokens, by llguidance.

Knows llguidance (the extra ``structured``) and tokenizers. Does not know requests or the engine.
"""

import json
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from qwen_jax.prompt.parsing import Reasoning
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.structured.matcher import (
    Thinking,
    after_reasoning,
    first_line,
    from_state,
)
from qwen_jax.structured.spec import Grammar, StructuredOutputs, read_schema
from qwen_jax.structured.tool_calls import CallIds, calls_grammar, parameters_of

# Between the parts of JSON. llguidance's own default has no bound, and a small model may go on with
# blanks for ever.
_WHITESPACE = r"[ \t\r\n]{1,32}"
_TRIED = 16  # tokens


class GrammarCompiler:
    """Compiles the wishes of requests to one checkpoint. Threads may share it.

    Args:
        tokenizer: of the checkpoint; its ids are those of the masks.
        eos_ids: ends of text, allowed where a grammar may end.

    Raises:
        ModuleNotFoundError: llguidance is not installed.
        ValueError: a tokenizer whose tokens do not join to the text, or no end of text.
    """

    def __init__(self, tokenizer: Tokenizer, eos_ids: Sequence[int]):
        llguidance = _llguidance()
        ends = [i for i in eos_ids if i < tokenizer.size]
        if not ends:
            raise ValueError("structured outputs need a checkpoint that names an end of text")
        if tokenizer.drops_first_space:
            raise ValueError(
                "structured outputs need a byte-level tokenizer (tokenizer.json or vocab.json with "
                "merges.txt); this checkpoint has a sentencepiece tokenizer.model, whose first "
                "token reads differently"
            )
        self._llguidance, self._tokenizer = llguidance, tokenizer
        wrapper = llguidance.TokenizerWrapper(_Adapter(tokenizer, ends[0]))
        self._tokens = llguidance.LLTokenizer(wrapper, n_vocab=tokenizer.size, eos_token=ends)
        self._words = (tokenizer.size + 31) // 32
        self._thinking = _thinking(tokenizer, ends)

    def compile(self, wish: StructuredOutputs) -> Grammar:
        """The grammar of a wish.

        Raises:
            ValueError: the schema, expression or grammar is wrong, too large, or asks for something
                that cannot be promised; it says what.
        """
        if wish.tool_calls is not None:
            return self._compile_calls(wish)
        grammar, name = self._source(wish)
        return self._started(grammar, name)

    def after_reasoning(self, grammar: Grammar, state: Reasoning, *, may_open: bool) -> Grammar:
        """The grammar for a text that may reason before.

        Args:
            grammar: of what comes after the reasoning.
            state: where the text starts, see `prompt.parsing.reasoning_state`.
            may_open: whether the checkpoint reasons where the prompt says nothing of it.
        """
        if state == "off" or (state == "auto" and not may_open) or self._thinking is None:
            return grammar
        return after_reasoning(grammar, self._thinking, inside=state == "inside")

    def _source(self, wish: StructuredOutputs) -> tuple[str, str]:
        matcher = self._llguidance.LLMatcher
        if wish.regex is not None:
            return matcher.grammar_from_regex(wish.regex), "structured_outputs.regex"
        if wish.choice is not None:
            options = " | ".join(lark_text(text) for text in dict.fromkeys(wish.choice))
            # A terminal, in capitals: one automaton, however many texts.
            return matcher.grammar_from_lark(f"start: CHOICE\nCHOICE: {options}"), "choice"
        if wish.grammar is not None:
            return matcher.grammar_from_lark(wish.grammar), "structured_outputs.grammar"
        name = "JSON schema"
        schema = read_schema({"type": "object"} if wish.json is None else wish.json, name)
        if isinstance(schema, bool):  # which has no place for options
            schema = {"anyOf": [schema]}
        return matcher.grammar_from_json_schema(schema, overrides=json_options(wish)), name

    def _compile_calls(self, wish: StructuredOutputs) -> Grammar:
        calls = wish.tool_calls
        assert calls is not None
        ids = CallIds.of(self._tokenizer)
        lark = calls_grammar(calls, ids, answer_options=json_options(wish))
        try:
            return self._started(self._llguidance.LLMatcher.grammar_from_lark(lark), "tools")
        except ValueError:
            # One of the schemas is to blame: say which.
            for tool in calls.tools:
                name, parameters = parameters_of(tool)
                one = self._llguidance.LLMatcher.grammar_from_json_schema(json.dumps(parameters))
                self._started(one, f"tool {name!r}: parameters")
            if calls.answer is not None:
                self.compile(StructuredOutputs(json=calls.answer))
            raise

    def _started(self, grammar: str, name: str) -> Grammar:
        state = self._llguidance.LLMatcher(self._tokens, grammar, log_level=0)
        if state.is_error():
            raise ValueError(f"{name} cannot be compiled: {first_line(state.get_error())}")
        self._try_out(state.deep_copy(), name)
        return from_state(state, self._words)

    def _try_out(self, state: Any, name: str) -> None:
        """Some first tokens: limits on a grammar's complexity show only where it is used."""
        for _ in range(_TRIED):
            mask = np.frombuffer(state.compute_bitmask(), np.uint8)
            words = np.flatnonzero(mask)
            if not state.is_error() and not state.is_stopped() and words.size:
                bits = int(mask[words[0]])
                state.consume_token(int(words[0]) * 8 + (bits & -bits).bit_length() - 1)
            if state.is_error():
                raise ValueError(f"{name} is too complex: {first_line(state.get_error())}")
            if state.is_stopped():
                return


def json_options(wish: StructuredOutputs) -> dict[str, Any]:
    """llguidance's options for the JSON of a wish."""
    if wish.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": wish.whitespace_pattern or _WHITESPACE}


def lark_text(text: str) -> str:
    """A text as a literal in Lark."""
    return json.dumps(text, ensure_ascii=False)


class _Adapter:
    """A tokenizer as llguidance wants one: bytes of all tokens, and text to ids."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, eos_id: int):
        self.eos_token_id = eos_id
        self.tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.size)]
        # Text must never become an added token, special or not: `<tool_call>` in a string is text.
        self.special_token_ids = sorted(tokenizer.added.values())
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        text = text.decode() if isinstance(text, bytes) else text
        return self._tokenizer.encode(text, special=False)


def _thinking(tokenizer: Tokenizer, eos_ids: Sequence[int]) -> Thinking | None:
    added = tokenizer.added
    if "<think>" not in added or "</think>" not in added:
        return None
    allowed = np.zeros(32 * ((tokenizer.size + 31) // 32), np.uint8)
    allowed[: tokenizer.size] = 1
    allowed[list(eos_ids)] = 0
    return Thinking(
        opens=added["<think>"],
        closes=added["</think>"],
        gap=tuple(tokenizer.encode("\n\n", special=False)),
        free=np.packbits(allowed, bitorder="little").view("<u4").astype(np.uint32),
    )


def _llguidance() -> ModuleType:
    try:
        import llguidance
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "structured outputs need llguidance: pip install 'qwen-jax[structured]'",
            name="llguidance",
        ) from None
    return llguidance
