"""Byte-level tokenizers: encode, decode, streams, and both ways in which they are shipped."""

import functools
import json
import pathlib
import tempfile
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prompt_samples import (
    ADDED,
    SPECIAL,
    native_tokenizer,
    write_tokenizer,
    write_vocab_and_merges,
)

from qwen_jax.prompt.tokenizer import Tokenizer


@functools.cache
def small() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.from_dir(write_tokenizer(pathlib.Path(directory)))


@functools.cache
def native():
    return native_tokenizer()


# Without surrogates, which UTF-8 cannot hold, and unassigned characters, whose normal form depends
# on the version of Unicode that Python and the tokenizers library were built with.
CHARACTERS = st.characters(exclude_categories=("Cs", "Cn"))
WORDS = st.sampled_from(
    [*SPECIAL, *ADDED, "<|im_", "end|>", "<|", "|>", " the", "é", "e\u0301", "\n\n"]
)
TEXTS = st.lists(st.text(CHARACTERS, max_size=6) | WORDS, max_size=8).map("".join)
IDS = st.lists(st.integers(0, native_tokenizer().get_vocab_size() - 1), max_size=30)


@given(TEXTS)
def test_encode_equals_the_tokenizers_library(text):
    assert small().encode(text) == native().encode(text, add_special_tokens=False).ids


@given(TEXTS, st.booleans())
def test_decode_of_encode_is_the_normal_form(text, special):
    ids = small().encode(text, special=special)
    parts = small().split(text) if special else [text]
    normal = "".join(
        unicodedata.normalize("NFC", part) if isinstance(part, str) else small().token(part)
        for part in parts
    )
    assert small().decode(ids, skip_special_tokens=False) == normal


@given(TEXTS)
def test_special_false_yields_no_added_token(text):
    assert not set(small().added.values()).intersection(small().encode(text, special=False))


def test_special_false_is_one_text_across_a_would_be_special_token():
    plain = small().encode("the<|im_end|>(", special=False)
    texts = [small().token(id) for id in plain]
    assert texts == ["the", "<|", "im", "_", "end", "|>("]  # merged over the seam


@given(IDS, st.booleans())
def test_decode_equals_the_tokenizers_library_on_any_ids(ids, skip):
    assert small().decode(ids, skip_special_tokens=skip) == native().decode(
        ids, skip_special_tokens=skip
    )


@given(IDS, st.booleans())
def test_a_stream_joins_to_the_whole(ids, skip):
    stream = small().stream(skip_special_tokens=skip)
    pieces = [stream.push(id) for id in ids]
    assert "".join(pieces) + stream.finish() == small().decode(ids, skip_special_tokens=skip)


def test_a_stream_gives_a_character_only_when_it_is_complete():
    stream = small().stream()
    ids = small().encode("a😀b")
    assert [stream.push(id) for id in ids] == ["a", "", "", "", "😀", "b"]
    assert stream.finish() == ""


def test_a_stream_that_ends_inside_a_character_says_so():
    stream = small().stream()
    assert [stream.push(id) for id in small().encode("😀")[:3]] == ["", "", ""]
    assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_only_special_tokens_are_skipped():
    ids = small().encode("<|im_start|><think>a</think><tool_call><|im_end|>")
    assert small().decode(ids) == "<think>a</think><tool_call>"
    assert small().special_ids == {small().id(text) for text in SPECIAL}


def test_token_and_id_are_inverse_on_text_tokens():
    tokenizer = small()
    assert tokenizer.token(tokenizer.id(" the")) == " the"
    assert tokenizer.token(tokenizer.id("<|im_end|>")) == "<|im_end|>"
    assert tokenizer.id("no such token") is None
    assert tokenizer.size == len(SPECIAL) + len(ADDED) + 256 + 12


def test_an_id_out_of_range_is_named_with_the_size():
    size = small().size
    for bad in (size, -1, 151_936):
        with pytest.raises(ValueError, match=rf"token id {bad} .* has {size} ids"):
            small().decode([bad])
    with pytest.raises(ValueError, match=f"token id {size} "):
        small().stream().push(size)
    with pytest.raises(ValueError, match="token id -5 "):
        small().token(-5)


def test_padding_rows_of_the_model_decode_to_nothing(tmp_path):
    tokenizer = Tokenizer.from_dir(write_tokenizer(tmp_path), padded_size=small().size + 10)
    assert tokenizer.size == small().size
    assert tokenizer.decode([small().size + 9, tokenizer.id("the")]) == "the"
    assert tokenizer.token(small().size) == ""
    with pytest.raises(ValueError, match="out of range"):
        tokenizer.decode([small().size + 10])


def test_ids_may_be_numpy():
    ids = small().encode("the <think>")
    assert small().decode(np.asarray(ids, np.int32)) == "the <think>"


def test_a_lone_surrogate_is_an_error_not_a_crash():
    with pytest.raises(ValueError, match=r"lone surrogate \(U\+D800\) at position 1"):
        small().encode("a\ud800b")


@settings(max_examples=25)
@given(TEXTS)
def test_vocab_and_merges_equal_tokenizer_json(text):
    assert from_vocab_and_merges().encode(text) == small().encode(text)
    assert from_vocab_and_merges().special_ids == small().special_ids


@functools.cache
def from_vocab_and_merges() -> Tokenizer:
    with tempfile.TemporaryDirectory() as directory:
        return Tokenizer.from_dir(write_vocab_and_merges(pathlib.Path(directory)))


def test_older_files_tell_which_added_tokens_are_special(tmp_path):
    write_vocab_and_merges(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    added = {token["content"]: int(id) for id, token in config["added_tokens_decoder"].items()}
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "added_tokens.json").write_text(json.dumps(added))
    names = {"eos_token": {"content": "<|im_end|>"}, "pad_token": "<|endoftext|>"}
    names["additional_special_tokens"] = ["<|im_start|>", "<|image_pad|>"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    tokenizer = Tokenizer.from_dir(tmp_path)
    assert tokenizer.added == small().added
    assert tokenizer.special_ids == small().special_ids


def test_no_tokenizer_names_what_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json.*vocab\.json.*tokenizer\.model"):
        Tokenizer.from_dir(tmp_path)


def test_a_truncated_tokenizer_file_is_named(tmp_path):
    write_tokenizer(tmp_path)
    text = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a valid tokenizer file"):
        Tokenizer.from_dir(tmp_path)


def test_a_broken_tokenizer_config_is_named(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_dir(tmp_path)


def test_vocab_and_merges_of_another_family_are_refused(tmp_path):
    write_vocab_and_merges(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
    with pytest.raises(ValueError, match=r"GPT2Tokenizer.*only Qwen2Tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_a_vocabulary_that_makes_a_special_token_of_plain_text_is_refused(tmp_path):
    native = native_tokenizer()
    native.add_special_tokens(["the"])  # takes the id that plain "the" has in the vocabulary
    native.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="plain text encodes to the special token 'the'"):
        Tokenizer.from_dir(tmp_path).encode("the", special=False)


def test_a_long_text_is_encoded_like_a_short_one():
    text = "hello, the world 12\n\n é" * 2000
    assert small().encode(text) == native().encode(text, add_special_tokens=False).ids


def test_blanks_without_end_are_refused():
    # The regex engine of the tokenizers library panics at some ten million.
    with pytest.raises(ValueError, match="1,000,000 white-space characters"):
        small().encode("a" + " \n" * 500_000 + "b")
    assert small().encode(" " * 20_000 + "a")
