"""A small Qwen-like tokenizer, and the conversations and template of tests/data, for the tests."""

import json
import pathlib

import hypothesis
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# Examples are counted, not timed: a busy machine must not fail a test.
hypothesis.settings.register_profile("prompt", deadline=None)
hypothesis.settings.load_profile("prompt")

DATA = pathlib.Path(__file__).parent / "data"
CASES = json.loads((DATA / "chat_cases.json").read_text(encoding="utf-8"))
TEXT_CASES = {name: case for name, case in CASES.items() if not case.get("parts")}
GOLDENS = json.loads((DATA / "template_goldens.json").read_text(encoding="utf-8"))
TEMPLATE = (DATA / "chatml.jinja").read_text(encoding="utf-8")

# As in the published tokenizer: the first three are special, the others are not.
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>"]
ADDED = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = ["t h", "th e", "Ġ the", "i m", "e n", "en d", "< |", "| >", "|> (", "Ã ©", "Ċ Ċ", "a n"]


def byte_level_model() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges): the 256 bytes in GPT-2's alphabet, and what MERGES makes of them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: id for id, char in enumerate(alphabet)}
    merges = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return vocab, merges


def native_tokenizer() -> tokenizers.Tokenizer:
    """The tokenizer as an object of the tokenizers library: the independent reference."""
    vocab, merges = byte_level_model()
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    plain = {"normalized": False}
    tokenizer.add_special_tokens([tokenizers.AddedToken(text, **plain) for text in SPECIAL])
    tokenizer.add_tokens([tokenizers.AddedToken(text, **plain) for text in ADDED])
    return tokenizer


def write_tokenizer(directory: pathlib.Path) -> pathlib.Path:
    """Write tokenizer.json as a checkpoint has it."""
    native_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_vocab_and_merges(directory: pathlib.Path) -> pathlib.Path:
    """Write the same tokenizer as vocab.json, merges.txt and tokenizer_config.json."""
    vocab, _ = byte_level_model()
    (directory / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
    merges = "\n".join(["#version: 0.2", *MERGES]) + "\n"
    (directory / "merges.txt").write_text(merges, encoding="utf-8")
    added = {
        str(len(vocab) + n): {"content": text, "special": text in SPECIAL}
        for n, text in enumerate(SPECIAL + ADDED)
    }
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": added}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory
