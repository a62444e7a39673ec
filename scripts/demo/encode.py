"""Samples to tokens, by the same prompt code that serves: template, pictures, fill-in-the-middle.

Knows which tokens are to be learned; knows no batch.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from demo.sample import Chat, Gap, Sample, Text
from qwen_jax.prompt import fim, images
from qwen_jax.prompt.chat import ChatTemplate, chat_parts
from qwen_jax.prompt.media import take_media
from qwen_jax.prompt.preprocessor import VisionRules
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.prompt.vision_prompt import build_prompt
from qwen_jax.weights.config import ModelConfig

_TURN = "assistant\n"


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A sample as the model sees it.

    Attributes:
        tokens: int32 [n].
        positions: int32 [3, n].
        learned: bool [n], whether a token is to be predicted from those before it.
        named: (token, id) pairs: what is to be said at a picture's token itself.
        shown: (row of the features, id) pairs: what the tower alone is to tell of that row.
        pictures: of the sample, in order.
        visual: int32 [n], a token's row of the pictures' features, -1 for text.
    """

    tokens: np.ndarray
    positions: np.ndarray
    learned: np.ndarray
    pictures: tuple[images.Picture, ...] = ()
    visual: np.ndarray | None = None
    named: tuple[tuple[int, int], ...] = ()
    shown: tuple[tuple[int, int], ...] = ()


class Encoder:
    """Encodes by the files of a checkpoint directory (weights are not needed)."""

    def __init__(self, directory: pathlib.Path, config: ModelConfig):
        assert config.vision is not None
        self.config = config
        self.tokenizer = Tokenizer.from_dir(directory)
        self.template = ChatTemplate.from_dir(directory)
        self.rules = VisionRules.from_dir(directory, config.vision)
        self._start, self._end, self._stop = (
            self.tokenizer.added[text] for text in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
        )
        self._turn = self.tokenizer.encode(_TURN)

    def encode(self, sample: Sample) -> Encoded:
        """Any sample."""
        if isinstance(sample, Chat):
            return self._chat(sample)
        if isinstance(sample, Gap):
            return self._gap(sample)
        return self._text(sample)

    def _chat(self, sample: Chat) -> Encoded:
        bare, media = take_media(list(sample.messages))
        parts = chat_parts(
            self.tokenizer,
            self.template,
            bare,
            tools=list(sample.tools) or None,
            add_generation_prompt=False,
        )
        prompt = build_prompt(
            self._answers_apart(parts),
            images.prepare(media, self.rules),
            self.config,
            tokenizer=self.tokenizer,
        )
        tokens = np.asarray(prompt.token_ids, np.int32)
        learned = self._answers(tokens)
        if not prompt.pictures:
            return Encoded(tokens, prompt.positions, learned)
        visual = prompt.feature_rows(0, len(tokens))
        (slots,) = np.nonzero(visual >= 0)
        seen = self._ids(slots, sample.seen)
        named = seen + (self._ids(slots, sample.where) if sample.where else ())
        shown = tuple((int(visual[slot]), word) for slot, word in seen)
        return Encoded(tokens, prompt.positions, learned, prompt.pictures, visual, named, shown)

    def _ids(
        self, slots: np.ndarray, words: Sequence[tuple[str, ...]]
    ) -> tuple[tuple[int, int], ...]:
        """(token, id) of every word said of a token."""
        return tuple(
            (int(slot), self.tokenizer.encode(f" {word}")[-1])
            for slot, told in zip(slots, words, strict=True)
            for word in told
        )

    def _answers_apart(self, parts: list[str | int]) -> list[str | int]:
        """Encodes what follows "assistant" and a line break on its own, as in generation."""
        found: list[str | int] = []
        for before, part in zip([None, *parts], parts, strict=False):
            if before == self._start and isinstance(part, str) and part.startswith(_TURN):
                found += [_TURN, *self.tokenizer.encode(part[len(_TURN) :], special=False)]
            else:
                found.append(part)
        return found

    def _answers(self, tokens: np.ndarray) -> np.ndarray:
        """From behind "assistant" and a line break to the end of the turn, that included."""
        learned, inside, opening = np.zeros(len(tokens), bool), False, [self._start, *self._turn]
        for i, token in enumerate(tokens.tolist()):
            learned[i] = inside
            if inside:
                inside = token != self._end
            else:
                inside = tokens[max(0, i + 1 - len(opening)) : i + 1].tolist() == opening
        return learned

    def _gap(self, sample: Gap) -> Encoded:
        template = self.template if sample.wrapped else None
        prompt = fim.encode_fim(self.tokenizer, sample.prefix, sample.suffix, template=template)
        middle = self.tokenizer.encode(sample.middle, special=False)
        end = self._end if sample.wrapped else self._stop
        learned = np.arange(len(prompt) + len(middle) + 1) >= len(prompt)
        return _plain([*prompt, *middle, end], learned)

    def _text(self, sample: Text) -> Encoded:
        parts = sample.text[: sample.cut], sample.text[sample.cut :]
        tokens = [t for part in parts for t in self.tokenizer.encode(part, special=False)]
        tokens += [self._stop] * sample.ends
        return _plain(tokens, np.arange(len(tokens)) > 0)


def _plain(tokens: list[int], learned: np.ndarray) -> Encoded:
    positions = np.tile(np.arange(len(tokens), dtype=np.int32), (3, 1))
    return Encoded(np.asarray(tokens, np.int32), positions, learned)
