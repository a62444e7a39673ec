"""sentencepiece models, and the published Qwen tokenizer where it is at hand."""

import functools
import io
import pathlib
import tempfile
import unicodedata

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen_jax.prompt.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog", "def quicksort(xs): return sorted(xs)"]


@functools.cache
def model_bytes(dummy_prefix: bool) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=dummy_prefix,
        user_defined_symbols=["<think>"],
        control_symbols=["<|im_end|>"],
        minloglevel=2,
    )
    return model.getvalue()


@functools.cache
def pair(dummy_prefix: bool) -> tuple[Tokenizer, sentencepiece.SentencePieceProcessor]:
    """Ours, and the library's own object as the reference."""
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory)
        (path / "tokenizer.model").write_bytes(model_bytes(dummy_prefix))
        tokenizer = Tokenizer.from_dir(path)
    return tokenizer, sentencepiece.SentencePieceProcessor(model_proto=model_bytes(dummy_prefix))


WORDS = st.sampled_from([" ", "  ", "the", " the", "<", "é", "😀", "\n", "quick"])
TEXTS = st.lists(st.text(st.characters(exclude_categories=("Cs",)), max_size=4) | WORDS, max_size=8)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@given(parts=TEXTS)
def test_sentencepiece_encodes_plain_text_as_the_library_does(dummy_prefix, parts):
    ours, theirs = pair(dummy_prefix)
    text = "".join(parts)
    # U+2581 is sentencepiece's own sign for a space: it cannot come back.
    text = text.replace("\u2581", "")
    if "<think>" not in text and "<|im_end|>" not in text:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.decode(ours.encode(text)) == text


@pytest.mark.parametrize("dummy_prefix", [True, False])
@given(parts=st.lists(TEXTS.map("".join), max_size=3))
def test_sentencepiece_keeps_spaces_around_special_tokens(dummy_prefix, parts):
    ours, _ = pair(dummy_prefix)
    text = "<|im_end|>".join(part.replace("\u2581", "") for part in parts)
    ids = ours.encode(text)
    assert ours.decode(ids, skip_special_tokens=False) == text
    assert ids.count(ours.id("<|im_end|>")) == text.count("<|im_end|>")


@pytest.mark.parametrize("dummy_prefix", [True, False])
@given(data=st.data())
def test_sentencepiece_streams_and_decodes_any_ids_as_the_library_does(dummy_prefix, data):
    ours, theirs = pair(dummy_prefix)
    # The library strips the first visible piece, ours the first id: they agree unless the text
    # begins with control tokens, or with the byte that is a space.
    first = st.integers(5, ours.size - 1).filter(lambda id: theirs.id_to_piece(id) != "<0x20>")
    ids = [data.draw(first), *data.draw(st.lists(st.integers(0, ours.size - 1), max_size=20))]
    stream = ours.stream()
    whole = ours.decode(ids)
    assert "".join([*map(stream.push, ids), stream.finish()]) == whole
    assert whole == theirs.decode(ids)


@pytest.mark.parametrize("dummy_prefix", [True, False])
@pytest.mark.parametrize("between", ["<s>", "<|im_end|>", "<think>", "e"])
def test_sentencepiece_ends_a_character_at_a_token_that_is_left_out(dummy_prefix, between):
    ours, theirs = pair(dummy_prefix)
    pieces = ["e", "<0xE2>", "<0x82>", between, "<0xAC>", "<0xC3>", "<0xA9>", between]
    ids = [theirs.piece_to_id(piece) for piece in pieces]
    assert 0 not in ids
    shown = between if between in ("<think>", "e") else ""
    assert ours.decode(ids) == theirs.decode(ids) == f"e��{shown}�é{shown}"
    stream = ours.stream()
    assert "".join([*map(stream.push, ids), stream.finish()]) == theirs.decode(ids)


def test_sentencepiece_stream_keeps_the_space_between_words():
    ours, _ = pair(True)
    stream = ours.stream()
    ids = ours.encode("the quick the")
    assert "".join(map(stream.push, ids)) == "the quick the"


def test_sentencepiece_user_symbols_cannot_be_smuggled():
    ours, _ = pair(True)
    assert ours.id("<|im_end|>") not in ours.encode("a<|im_end|>", special=False)
    assert ours.decode(ours.encode("a<|im_end|>b", special=False)) == "a<|im_end|>b"


def test_a_broken_sentencepiece_model_is_named(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x00not a model")
    with pytest.raises(ValueError, match=r"tokenizer\.model is not a valid sentencepiece model"):
        Tokenizer.from_dir(tmp_path)


@pytest.fixture(scope="module")
def published(shared_data) -> tuple[Tokenizer, tokenizers.Tokenizer]:
    directory = shared_data / "tokenizer"
    native = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    return Tokenizer.from_dir(directory), native


def test_published_ids(published):
    ours, _ = published
    assert ours.size == 151_669
    assert ours.encode("This image is a") == [1986, 2168, 374, 264]
    assert [ours.id(text) for text in ("<|endoftext|>", "<|im_end|>", "</think>")] == [
        151643,
        151645,
        151668,
    ]
    assert max(ours.special_ids) == 151656


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=40))
def test_published_tokenizer_round_trips(published, text):
    ours, native = published
    ids = ours.encode(text)
    assert ids == native.encode(text, add_special_tokens=False).ids
    assert ours.decode(ids, skip_special_tokens=False) == unicodedata.normalize("NFC", text)


@settings(max_examples=200)
@given(ids=st.lists(st.integers(0, 151_668), max_size=20))
def test_published_tokenizer_streams_any_ids(published, ids):
    ours, native = published
    stream = ours.stream()
    text = "".join([*map(stream.push, ids), stream.finish()])
    assert text == ours.decode(ids) == native.decode(ids)


def test_published_vocab_and_merges_are_the_same_tokenizer(published, shared_data, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).symlink_to(shared_data / "tokenizer" / name)
    rebuilt = Tokenizer.from_dir(tmp_path)
    text = "<|im_start|>user\nIt's 12,345 — naïve café\n\n\n  def f(x):\treturn x<think>日本語😀"
    assert rebuilt.encode(text) == published[0].encode(text)
    assert rebuilt.special_ids == published[0].special_ids
