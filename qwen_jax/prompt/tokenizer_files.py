"""Reads the three forms in which checkpoints ship a tokenizer into one `Vocabulary`.

Knows file names and formats. Does not know prompts, templates or which tokens mean what.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable
from typing import Any

import tokenizers

# How Qwen2Tokenizer cuts text before BPE (HF: tokenization_qwen2.py PRETOKENIZE_REGEX). The files
# vocab.json and merges.txt do not carry it; tokenizer.json does.
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_LONG = 10_000  # characters: some milliseconds
_BLANKS = 1_000_000
_MANY_BLANKS = re.compile(rf"\s{{{_BLANKS}}}")
_SP_UNKNOWN, _SP_CONTROL, _SP_USER, _SP_BYTE = 2, 3, 4, 6  # sentencepiece_model.proto, Piece.Type
_SP_UNKNOWN_TEXT = " \N{DOUBLE QUESTION MARK} ".encode()


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What every tokenizer is here: a byte string per id, and a way to encode plain text.

    `token_bytes[id]` is None for an id that belongs to no token. `added` maps the text of every
    added token (special or not) to its id; `encode_plain(text, at_start)` never yields them.
    `drops_first_space`: text gets a leading space on encoding that decoding takes off again.
    `bytewise`: every byte of broken UTF-8 is one U+FFFD (sentencepiece), not every broken sequence;
    and a character ends at a token that decoding leaves out.
    """

    token_bytes: list[bytes | None]
    added: dict[str, int]
    special_ids: frozenset[int]
    encode_plain: Callable[[str, bool], list[int]]
    drops_first_space: bool = False
    bytewise: bool = False


def read_vocabulary(directory: pathlib.Path) -> Vocabulary:
    """Read tokenizer.json, else vocab.json + merges.txt, else tokenizer.model.

    Raises FileNotFoundError naming what was looked for, ValueError for a file that is not valid.
    """
    config = read_json_object(directory / "tokenizer_config.json", missing={})
    if (directory / "tokenizer.json").is_file():
        return _from_tokenizer_json(directory / "tokenizer.json", config)
    if (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        return _from_vocab_and_merges(directory, config)
    if (directory / "tokenizer.model").is_file():
        return _from_sentencepiece(directory / "tokenizer.model", config)
    raise FileNotFoundError(
        f"{directory} has no tokenizer: looked for tokenizer.json, for vocab.json with merges.txt, "
        "and for tokenizer.model (a checkpoint without one still serves token-id prompts)"
    )


def read_json_object(path: pathlib.Path, *, missing: dict | None = None) -> dict[str, Any]:
    """The JSON object in a file, or `missing` where there is no such file; ValueError if broken."""
    if missing is not None and not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON (truncated?): {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def _from_tokenizer_json(path: pathlib.Path, config: dict[str, Any]) -> Vocabulary:
    tokenizer = _native(tokenizers.Tokenizer.from_file, path)
    added = {
        token.content: (id, token) for id, token in tokenizer.get_added_tokens_decoder().items()
    }
    for content, (_, token) in added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise ValueError(
                f"{path}: added token {content!r} uses lstrip, rstrip or single_word; "
                "only plain added tokens are supported"
            )
    specials = {content: (id, token.special) for content, (id, token) in added.items()}
    return _byte_level(path, tokenizer, {**_config_tokens(path, config), **specials})


def _encode(plain: tokenizers.Tokenizer, text: str) -> list[int]:
    if len(text) < _LONG:
        return plain.encode(text, add_special_tokens=False).ids
    if len(text) >= _BLANKS and _MANY_BLANKS.search(text):
        # The regex engine behind it gives up, by a panic, at some ten million.
        raise ValueError(f"text has more than {_BLANKS:,} white-space characters in a row")
    # A batch, even of one, is encoded without holding up Python's other threads.
    return plain.encode_batch_fast([text], add_special_tokens=False)[0].ids


def _from_vocab_and_merges(directory: pathlib.Path, config: dict[str, Any]) -> Vocabulary:
    known = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
    if config.get("tokenizer_class") not in known:
        raise ValueError(
            f"{directory}: vocab.json and merges.txt of a {config['tokenizer_class']!r}: "
            "only Qwen2Tokenizer can be rebuilt from these two; ship its tokenizer.json"
        )
    path = directory / "vocab.json"
    model = _native(tokenizers.models.BPE.from_file, path, str(directory / "merges.txt"))
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_PATTERN), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    added = _config_tokens(path, config)
    # Without added_tokens_decoder, the older pair of files says the same.
    special = _special_names(read_json_object(directory / "special_tokens_map.json", missing={}))
    for content, id in read_json_object(directory / "added_tokens.json", missing={}).items():
        added.setdefault(content, (id, content in special))
    return _byte_level(path, tokenizer, added)


def _special_names(token_map: dict[str, Any]) -> set[str]:
    entries = [*token_map.pop("additional_special_tokens", []), *token_map.values()]
    return {entry["content"] if isinstance(entry, dict) else entry for entry in entries}


def _native(read: Callable, path: pathlib.Path, *more: str) -> Any:
    """Call a reader of the tokenizers library; it raises bare Exception for whatever is wrong."""
    try:
        return read(str(path), *more)
    except Exception as error:
        raise ValueError(f"{path} is not a valid tokenizer file: {error}") from error


def _config_tokens(path: pathlib.Path, config: dict[str, Any]) -> dict[str, tuple[int, bool]]:
    tokens = {}
    for id, token in config.get("added_tokens_decoder", {}).items():
        if not (id.isdecimal() and isinstance(token, dict) and token.get("content")):
            raise ValueError(
                f"tokenizer_config.json beside {path}: bad added token {id!r}: {token!r}"
            )
        tokens[token["content"]] = (int(id), bool(token.get("special", False)))
    return tokens


def _byte_level(
    path: pathlib.Path, full: tokenizers.Tokenizer, added: dict[str, tuple[int, bool]]
) -> Vocabulary:
    if type(full.decoder).__name__ != "ByteLevel":
        raise ValueError(
            f"{path}: decoder {type(full.decoder).__name__} is not supported; expected ByteLevel "
            "(byte-level BPE), or a sentencepiece tokenizer.model"
        )
    # The same model without the added tokens: to it, "<|im_end|>" is ten characters of text.
    plain = tokenizers.Tokenizer(full.model)
    if full.normalizer is not None:
        plain.normalizer = full.normalizer
    if full.pre_tokenizer is not None:
        plain.pre_tokenizer = full.pre_tokenizer
    vocab = plain.get_vocab()
    pieces: dict[int, bytes] = {id: _bytes_of(token) for token, id in vocab.items()}
    pieces.update({id: content.encode() for content, (id, _) in added.items()})
    return Vocabulary(
        token_bytes=[pieces.get(id) for id in range(max(pieces, default=-1) + 1)],
        added={content: id for content, (id, _) in added.items()},
        special_ids=frozenset(id for id, special in added.values() if special),
        encode_plain=lambda text, at_start: _encode(plain, text),
    )


def _byte_alphabet() -> dict[int, int]:
    """GPT-2's table: the character that stands for each byte, as a translation to Latin-1.

    Printable Latin-1 characters stand for themselves, the other 68 bytes for U+0100 and up; a
    character that stands for no byte goes to U+FFFF, so that encoding to Latin-1 fails on it.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return dict.fromkeys(others, 0xFFFF) | {0x100 + n: byte for n, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


def _bytes_of(token: str) -> bytes:
    try:
        return token.translate(_BYTE_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:  # not a byte-level token: it is its own text
        return token.encode()


def _from_sentencepiece(path: pathlib.Path, config: dict[str, Any]) -> Vocabulary:
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2

    try:
        # The module is generated: its names exist only when it runs.
        model = getattr(sentencepiece_model_pb2, "ModelProto").FromString(path.read_bytes())  # noqa: B009
        prefix = model.normalizer_spec.add_dummy_prefix
        model.normalizer_spec.add_dummy_prefix = False
        # The leading space is ours to add, since only text at the very start gets it: what follows
        # a special token does not.
        processor = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # protobuf's DecodeError and sentencepiece's RuntimeError
        raise ValueError(f"{path} is not a valid sentencepiece model: {error}") from error
    added = _config_tokens(path, config)
    pieces: dict[int, bytes] = {}
    for id, piece in enumerate(model.pieces):
        pieces[id] = piece.piece.replace("\u2581", " ").encode()
        if piece.type == _SP_BYTE:
            pieces[id] = bytes([int(piece.piece[1:-1], 16)])
        elif piece.type == _SP_UNKNOWN:
            pieces[id] = _SP_UNKNOWN_TEXT
        elif piece.type in (_SP_CONTROL, _SP_USER):
            added.setdefault(piece.piece, (id, piece.type == _SP_CONTROL))
    pieces.update({id: content.encode() for content, (id, _) in added.items()})

    def encode_plain(text: str, at_start: bool) -> list[int]:
        return processor.encode(f" {text}" if at_start and prefix else text)

    return Vocabulary(
        token_bytes=[pieces.get(id) for id in range(max(pieces, default=-1) + 1)],
        added={content: id for content, (id, _) in added.items()},
        special_ids=frozenset(id for id, special in added.values() if special),
        encode_plain=encode_plain,
        drops_first_space=prefix,
        bytewise=True,
    )
