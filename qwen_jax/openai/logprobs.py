"""Logprobs as the two kinds of replies write them. Knows both forms; knows no request."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.results import Logprob

Entry = Mapping[int, Logprob]

_LEAST = -9999.0  # JSON has no -inf; vLLM writes this


def chat_logprobs(
    tokenizer: Tokenizer, tokens: Sequence[int], entries: Sequence[Entry], top: int
) -> list[dict[str, Any]]:
    """``content`` of a chat choice's logprobs: each token with its ``top`` best."""
    found = []
    for token, entry in zip(tokens, entries, strict=True):
        best = sorted(entry.items(), key=lambda item: item[1].rank)[:top]
        own = _token(tokenizer, token, entry[token])
        found.append({**own, "top_logprobs": [_token(tokenizer, i, x) for i, x in best]})
    return found


def _token(tokenizer: Tokenizer, token: int, found: Logprob) -> dict[str, Any]:
    return {
        "token": tokenizer.token(token),
        "logprob": finite(found.logprob),
        "bytes": list(tokenizer.token_bytes(token)),
    }


class TextLogprobs:
    """Logprobs of a completion: lists side by side, with the offsets of tokens in the text.

    Args:
        tokenizer: for the tokens' texts.
        top: how many of the best to report.
        offset: of the first token in the text that is returned.
    """

    def __init__(self, tokenizer: Tokenizer, top: int, offset: int = 0):
        self._tokenizer, self._top, self._offset = tokenizer, top, offset

    def add(self, tokens: Sequence[int], entries: Sequence[Entry | None]) -> dict[str, Any]:
        """The lists for more tokens; an entry of None is the first token's, which nothing told."""
        texts, own, best, offsets = [], [], [], []
        for token, entry in zip(tokens, entries, strict=True):
            text = self._tokenizer.token(token)
            texts.append(text)
            offsets.append(self._offset)
            self._offset += len(text)
            own.append(None if entry is None else finite(entry[token].logprob))
            best.append(None if entry is None else self._best(token, entry))
        return {
            "tokens": texts,
            "token_logprobs": own,
            "top_logprobs": best,
            "text_offset": offsets,
        }

    def _best(self, token: int, entry: Entry) -> dict[str, float]:
        """By text, as OpenAI has it: of two tokens with one text the better one stays."""
        ranked = sorted(entry.items(), key=lambda item: -item[1].rank)
        kept = [(i, x) for i, x in ranked if x.rank <= self._top or i == token]
        return {self._tokenizer.token(i): finite(x.logprob) for i, x in kept}


def prompt_logprobs(entries: Sequence[Entry | None] | None) -> list[Any] | None:
    """vLLM's form: for each token of the prompt a mapping by id."""
    if entries is None:
        return None
    return [
        None
        if entry is None
        else {
            str(token): {
                "logprob": finite(found.logprob),
                "rank": found.rank,
                "decoded_token": found.decoded_token,
            }
            for token, found in entry.items()
        }
        for entry in entries
    ]


def finite(value: float) -> float:
    """A logprob that JSON can hold."""
    return value if math.isfinite(value) else _LEAST
