"""What an LLM should answer, from the model's logits alone: greedy texts, penalties, logprobs.

Runs the whole text through `step` for every token, with no cache kept; the arithmetic on logits is
float64 numpy.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from qwen_jax.llm import LLM
from qwen_jax.model.cache import make_cache, pack
from qwen_jax.model.step import jit_step

_TOKENS, _ROWS = 64, 4


def logits(llm: LLM, tokens: Sequence[int]) -> np.ndarray:
    """float64 [len(tokens), V]: of every position, in one prefill into an empty cache."""
    text, runtime = llm.config.text, llm.runtime
    width = _TOKENS // runtime.page_size
    table = np.arange(_ROWS * width, dtype=np.int32).reshape(_ROWS, width)
    cache = make_cache(text, runtime, _ROWS * width)
    batch = pack([list(tokens)], [0], table, num_tokens=_TOKENS)
    out = jit_step(llm.params, llm.config, runtime, batch, cache, logits="all")
    return np.asarray(out.logits, np.float64)[: len(tokens)]


def log_softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def greedy(
    llm: LLM,
    prompt: Sequence[int],
    count: int,
    *,
    repetition: float = 1.0,
    presence: float = 0.0,
    frequency: float = 0.0,
    bias: Mapping[int, float] | None = None,
    allowed: Sequence[int] | None = None,
) -> list[int]:
    """The best tokens, one by one, under vLLM's penalties (docs: sampling parameters)."""
    new: list[int] = []
    for _ in range(count):
        x = logits(llm, [*prompt, *new])[-1]
        if allowed is not None:
            masked = np.full_like(x, -np.inf)
            masked[list(allowed)] = x[list(allowed)]
            x = masked
        for token, value in (bias or {}).items():
            x[token] += value
        for token in {*prompt, *new}:
            x[token] = x[token] / repetition if x[token] > 0 else x[token] * repetition
        for token in set(new):
            x[token] -= presence + frequency * new.count(token)
        new.append(int(x.argmax()))
    return new
