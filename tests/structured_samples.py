"""Texts sampled from random logits under a grammar, as an engine would. Knows masks and tokens."""

import functools
import pathlib
import tempfile

import numpy as np
import tiny

from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.structured.compile import GrammarCompiler

VOCAB = tiny.TOKENIZER_VOCAB


@functools.cache
def tokenizer() -> Tokenizer:
    with tempfile.TemporaryDirectory() as path:
        tiny.write_tokenizer(path)
        return Tokenizer.from_dir(pathlib.Path(path), padded_size=VOCAB)


@functools.cache
def compiler() -> GrammarCompiler:
    added = tokenizer().added
    return GrammarCompiler(tokenizer(), (added["<|im_end|>"], added["<|endoftext|>"]))


def allowed(matcher, vocab=VOCAB) -> np.ndarray:
    """Ids that a matcher's mask lets through; the array is poisoned before."""
    words = np.full((vocab + 31) // 32, 0xFFFFFFFF, np.uint32)
    matcher.mask(words)
    return np.flatnonzero(np.unpackbits(words.astype("<u4").view(np.uint8), bitorder="little"))


def sample(grammar, seed: int, *, most: int = 3000, patience: int = 60, close: str = "") -> str:
    """A whole text: random logits, and once ``patience`` is over a liking for what closes things.

    Forced tokens are taken as they come, after checking that the mask lets them through.

    Args:
        grammar: of the text.
        seed: of the logits.
        most: tokens; a text that is longer fails the test.
        patience: tokens that are drawn without that liking.
        close: a text that is tried, token by token, once ``patience`` is over.
    """
    rng = np.random.default_rng(seed)
    matcher, ids, plan = grammar.matcher(), [], []
    while not matcher.finished:
        assert len(ids) < most, f"does not end: {tokenizer().decode(ids[-300:])!r}"
        forced, mask = matcher.forced(), allowed(matcher)
        late = len(ids) > patience
        if late and set(map(tokenizer().id, _ENDS)) & set(mask):
            break
        if late and not plan:
            plan = tokenizer().encode(close)
        if forced:
            assert forced[0] in mask
            chosen, plan = forced, []
        elif plan and plan[0] in mask:
            chosen, plan = plan[:1], plan[1:]
        else:
            plan = []
            logits = rng.normal(size=VOCAB)
            for text, liking in _CLOSING.items() if late and rng.random() < 0.7 else ():
                logits[tokenizer().id(text)] += liking
            chosen = [int(mask[np.argmax(logits[mask])])]
        if chosen[0] in map(tokenizer().id, _ENDS):
            break
        matcher.accept(chosen)
        ids += chosen
    return tokenizer().decode(ids, skip_special_tokens=False)


_ENDS = ("<|im_end|>", "<|endoftext|>")
_CLOSING = {"]": 20.0, "}": 15.0, '"': 30.0, "<|im_end|>": 40.0, "<|endoftext|>": 40.0}
