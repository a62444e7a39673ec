"""Logprobs as a result holds them: dicts by token id. Knows host arrays and token texts."""

from qwen_jax import sampling
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.results import Logprob

Entry = dict[int, Logprob]


class TokenLogprobs:
    """Makes the entries; ``tokenizer`` gives the tokens' text, None leaves it out."""

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    def entry(self, host: sampling.Logprobs, at, token: int, k: int) -> Entry:
        """The entry of one position: the token itself, then the best ``k`` (-1: all there are)."""
        ids, values = host.top_ids[at], host.top_logprobs[at]
        k = len(ids) if k == -1 else k
        best = {
            int(i): Logprob(float(v), rank, self._text(int(i)))
            for rank, (i, v) in enumerate(zip(ids[:k], values[:k], strict=True), start=1)
        }
        own = Logprob(float(host.logprob[at]), int(host.rank[at]), self._text(token))
        return {token: own} | {i: x for i, x in best.items() if i != token}

    def _text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token(token)


def most_wanted(wanted, vocab_size: int) -> int | None:
    """How many logprobs a program reports for rows that want these numbers of them.

    None where no row wants any, -1 where one wants all, else rounded up to a power of two, at least
    1: a program is compiled for each number.
    """
    asked = [k for k in wanted if k is not None]
    if not asked or -1 in asked:
        return -1 if asked else None
    return min(1 << (max(*asked, 1) - 1).bit_length(), vocab_size)
