"""Text to token ids and back, and back again one token at a time.

Knows ids, bytes and which strings are added tokens. Does not know chat, templates or the model.
"""

import codecs
import operator
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

from qwen_jax.prompt.tokenizer_files import Vocabulary, read_vocabulary


def _one_mark_per_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end


codecs.register_error("qwen_jax.bytewise", _one_mark_per_byte)


class Tokenizer:
    """Encodes text and decodes ids; one object for byte-level BPE and sentencepiece.

    An *added token* is a string such as `<|im_end|>` or `<think>` with an id of its own; it is
    *special* when decoding leaves it out by default. No token is ever put before or after a text.
    """

    def __init__(self, vocabulary: Vocabulary, *, padded_size: int | None = None):
        self._vocabulary = vocabulary
        self._bytes = vocabulary.token_bytes
        self._id_limit = max(self.size, padded_size or 0)
        self.special_ids: frozenset[int] = vocabulary.special_ids
        self._errors = "qwen_jax.bytewise" if vocabulary.bytewise else "replace"
        longest_first = sorted(vocabulary.added, key=len, reverse=True)
        # "(?!)" matches nowhere: a tokenizer without added tokens.
        self._added_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._id_of: dict[str, int] | None = None

    @classmethod
    def from_dir(
        cls, path: str | os.PathLike[str], *, padded_size: int | None = None
    ) -> "Tokenizer":
        """Read tokenizer.json, else vocab.json + merges.txt, else tokenizer.model.

        padded_size: rows of the model's embedding. Ids from `size` up to it belong to no token and
        decode to nothing; without it they raise. Raises FileNotFoundError or ValueError.
        """
        return cls(read_vocabulary(pathlib.Path(path)), padded_size=padded_size)

    @property
    def size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._bytes)

    @property
    def drops_first_space(self) -> bool:
        """Whether the first token of a text reads differently: without the space it begins with."""
        return self._vocabulary.drops_first_space

    @property
    def added(self) -> dict[str, int]:
        """Text of every added token -> id (a copy)."""
        return dict(self._vocabulary.added)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode text; `special=False` reads the text of an added token as any other text.

        Raises ValueError when the text is not a string that UTF-8 can hold.
        """
        return self.encode_parts(self.split(text) if special else [text])

    def split(self, text: str) -> list[str | int]:
        """Cut text at its added tokens: plain strings and, between them, the tokens' ids."""
        parts: list[str | int] = []
        position = 0
        for match in self._added_pattern.finditer(_checked(text)):
            parts += [text[position : match.start()], self._vocabulary.added[match.group()]]
            position = match.end()
        parts.append(text[position:])
        return [part for part in parts if part != ""]

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Encode strings as plain text and pass ids through: strings can never yield added tokens.

        Neighbouring strings are one text: nothing is cut between them.
        """
        ids: list[int] = []
        text: list[str] = []
        for part in parts:
            if isinstance(part, str):
                text.append(part)
                continue
            self._encode_plain("".join(text), ids)
            text = []
            ids.append(self._checked_id(part))
        self._encode_plain("".join(text), ids)
        return ids

    def _encode_plain(self, text: str, ids: list[int]) -> None:
        if not text:
            return
        new = self._vocabulary.encode_plain(_checked(text), not ids)
        smuggled = self.special_ids.intersection(new)
        if smuggled:
            raise ValueError(
                f"plain text encodes to the special token {self.token(min(smuggled))!r}: this "
                "tokenizer's vocabulary cannot keep text and special tokens apart"
            )
        ids += new

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. ValueError: id out of range."""
        stream = self.stream(skip_special_tokens=skip_special_tokens)
        return stream.feed(ids) + stream.finish()

    def stream(self, *, skip_special_tokens: bool = True) -> "StreamDecoder":
        """A decoder that takes one id at a time and gives complete characters only."""
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def token(self, id: int) -> str:
        """The text of one token, special or not; "" for an id that belongs to no token."""
        return (self._bytes_at(id) or b"").decode(errors=self._errors)

    def token_bytes(self, id: int) -> bytes:
        """The bytes of one token, which may be part of a character; b"" for no token's id."""
        return self._bytes_at(id) or b""

    def id(self, token: str) -> int | None:
        """The id of an added token, or of the token whose text this is; None if there is none."""
        if token in self._vocabulary.added:
            return self._vocabulary.added[token]
        if self._id_of is None:
            self._id_of = {}
            for id, piece in enumerate(self._bytes):
                if piece is not None:
                    self._id_of.setdefault(piece.decode(errors=self._errors), id)
        return self._id_of.get(token)

    def _bytes_at(self, id: int) -> bytes | None:
        id = self._checked_id(id)
        return self._bytes[id] if id < self.size else None

    def _checked_id(self, id: int) -> int:
        id = operator.index(id)
        if not 0 <= id < self._id_limit:
            raise ValueError(
                f"token id {id} is out of range: this tokenizer has {self._id_limit} ids "
                f"(0 to {self._id_limit - 1})"
            )
        return id


class StreamDecoder:
    """Decodes a stream of ids: what `push` and `finish` return joins to `decode` of all ids.

    A token may hold part of a character; the text comes out with the token that completes it.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(tokenizer._errors)
        self._drop_space = tokenizer._vocabulary.drops_first_space
        # What is left out still ends a character there; byte-level BPE joins what is around it.
        self._cuts = self._skip if tokenizer._vocabulary.bytewise else frozenset()

    def push(self, id: int) -> str:
        """Take one id; the text that is now complete (often "")."""
        return self.feed([id])

    def feed(self, ids: Sequence[int]) -> str:
        """Take several ids at once."""
        text, start = [], 0
        for end, id in enumerate(ids if self._cuts else (), 1):
            if id in self._cuts:
                text += [self._joined(ids[start:end]), self.finish()]
                start = end
        return "".join([*text, self._joined(ids[start:])])

    def _joined(self, ids: Sequence[int]) -> str:
        bytes_at, skip = self._tokenizer._bytes_at, self._skip
        pieces = [bytes_at(id) or b"" for id in ids if id not in skip]
        if self._drop_space and len(ids):
            # Only the very first id of a text carries the space that encoding put there.
            if ids[0] not in self._tokenizer._vocabulary.added.values() and pieces:
                pieces[0] = pieces[0].removeprefix(b" ")
            self._drop_space = False
        return self._utf8.decode(b"".join(pieces))

    def finish(self) -> str:
        """End the stream: bytes of a character that never was completed come out as U+FFFD."""
        return self._utf8.decode(b"", final=True)


def _checked(text: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds a lone surrogate (U+{ord(text[error.start]):04X}) at position "
            f"{error.start}: it is not valid Unicode"
        ) from None
    return text
