"""A grammar in use: which tokens may come next in one text.

Knows packed masks and the state of one text. Does not know logits, rows or requests.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from qwen_jax.structured.spec import Grammar, Matcher

Mask = np.ndarray


class GrammarMatcher:
    """A text under an llguidance grammar.

    Args:
        state: an `LLMatcher` of its own.
        words: 32-bit words of its mask; rows of the vocabulary behind them are padding, which is
            never allowed.
    """

    def __init__(self, state: Any, words: int):
        self._state, self._words = state, words

    @property
    def finished(self) -> bool:
        return self._state.is_stopped()

    def accept(self, tokens: Sequence[int]) -> None:
        self._state.consume_tokens(list(tokens))
        self._check()

    def mask(self, out: Mask) -> None:
        if out.dtype != np.uint32 or not out.flags.c_contiguous or out.size < self._words:
            raise ValueError(
                f"a mask needs {self._words} words of uint32 in a row, got {out.dtype} {out.shape}"
            )
        self._state.unsafe_compute_mask_ptr(out.ctypes.data, 4 * self._words)
        self._check()
        out[self._words :] = 0

    def forced(self) -> list[int]:
        tokens = self._state.compute_ff_tokens()
        self._check()
        return tokens

    def _check(self) -> None:
        # llguidance raises nothing: it goes into a state of error and stays there.
        if self._state.is_error():
            raise ValueError(f"structured output: {first_line(self._state.get_error())}")


def first_line(message: str) -> str:
    """The reason in an error of llguidance, whose further lines show its internal state."""
    line, _, _ = message.strip().partition("\n")
    return line[:500]


@dataclasses.dataclass(frozen=True)
class Thinking:
    """How a checkpoint writes its reasoning.

    Attributes:
        opens, closes: ids of ``<think>`` and ``</think>``.
        gap: ids of what stands between ``</think>`` and the answer.
        free: mask of everything that may be thought: no end of text.
    """

    opens: int
    closes: int
    gap: tuple[int, ...]
    free: Mask


class AfterReasoning:
    """A text that reasons freely first, and then follows a grammar.

    Args:
        inner: of what follows the reasoning.
        thinking: how it is written.
        inside: the prompt has opened it; else the text may open it with its first token.
    """

    def __init__(self, inner: Matcher, thinking: Thinking, *, inside: bool):
        self._inner, self._thinking = inner, thinking
        self._gap: list[int] = []
        self._state: Literal["start", "free", "gap", "answer"] = "free" if inside else "start"

    @property
    def finished(self) -> bool:
        return self._inner.finished  # which has taken nothing before the answer

    def accept(self, tokens: Sequence[int]) -> None:
        for i, token in enumerate(tokens):
            match self._state:
                case "start" if token == self._thinking.opens:
                    self._state = "free"
                case "free":
                    if token == self._thinking.closes:
                        self._gap = list(self._thinking.gap)
                        self._state = "gap" if self._gap else "answer"
                case "gap":
                    if token != self._gap.pop(0):
                        raise ValueError(f"structured output: token {token} after the reasoning")
                    self._state = "gap" if self._gap else "answer"
                case _:
                    self._state = "answer"
                    self._inner.accept(tokens[i:])
                    return

    def mask(self, out: Mask) -> None:
        if self._state == "free":
            out[: self._thinking.free.size] = self._thinking.free
            out[self._thinking.free.size :] = 0
        elif self._state == "gap":
            out[:] = 0
            _allow(out, self._gap[0])
        else:
            self._inner.mask(out)
            if self._state == "start":
                _allow(out, self._thinking.opens)

    def forced(self) -> list[int]:
        if self._state == "gap":
            return list(self._gap)
        return self._inner.forced() if self._state == "answer" else []


def _allow(mask: Mask, token: int) -> None:
    mask[token // 32] |= np.uint32(1 << (token % 32))


def after_reasoning(grammar: Grammar, thinking: Thinking, *, inside: bool) -> Grammar:
    """The same grammar, for texts that may reason first."""
    return Grammar(lambda: AfterReasoning(grammar.matcher(), thinking, inside=inside))


def from_state(state: Any, words: int) -> Grammar:
    """A grammar whose texts all start as copies of an `LLMatcher`."""
    return Grammar(lambda: GrammarMatcher(state.deep_copy(), words))
