"""Trains the byte-level BPE of the demo on what it will read, with all of Qwen's added tokens.

Knows tokenizer.json; the pattern that cuts text and the added tokens are those of the published
models, their ids are not: the vocabulary is small.
"""

import json
import pathlib
import random
from collections.abc import Iterator

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from demo import lessons
from demo.sample import Chat, Gap, Sample
from qwen_jax.prompt.tokenizer_files import QWEN_PATTERN

SIZE = 2304  # tokens in all
READ = 20_000  # samples
# (text, special), in the order of the published vocabulary.
ADDED = (
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end")),
    *((f"<|{name}_{end}|>", True) for name in ("object_ref", "box") for end in ("start", "end")),
    *((f"<|{name}_{end}|>", True) for name in ("quad", "vision") for end in ("start", "end")),
    *((f"<|{name}_pad|>", True) for name in ("vision", "image", "video")),
    *((word, False) for word in ("<tool_call>", "</tool_call>")),
    *((f"<|fim_{name}|>", False) for name in ("prefix", "middle", "suffix", "pad")),
    *((word, False) for word in ("<|repo_name|>", "<|file_sep|>")),
    *((f"<{end}{name}>", False) for name in ("tool_response", "think") for end in ("", "/")),
)


def train(seed: int) -> tokenizers.Tokenizer:
    """A tokenizer of `SIZE` tokens; the same for the same seed and Python."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(ADDED),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    # One by one: a call with several would number the special ones first.
    for text, special in ADDED:
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)])
    return tokenizer


def write(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 1024,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _texts(seed: int) -> Iterator[str]:
    rng = random.Random(f"tokenizer {seed}")
    for _ in range(READ):
        yield from _strings(lessons.sample(rng, _READABLE))


# Pictures cost time to draw, and their words come with videos' and everybody else's; definitions of
# tools are the longest texts.
_READABLE = {**lessons.MIXTURE, "pictures": 0.06, "videos": 0.02, "tools": 0.24, "gaps": 0.12}


def _strings(sample: Sample) -> Iterator[str]:
    if isinstance(sample, Gap):
        yield sample.prefix + sample.middle + sample.suffix
    elif isinstance(sample, Chat):
        for message in sample.messages:
            content = message["content"]
            parts = [{"text": content}] if isinstance(content, str) else content
            yield from (part["text"] for part in parts if "text" in part)
        for tool in sample.tools:
            function = tool["function"]
            yield f"<name>{function['name']}</name>\n<description>{function['description']}"
    else:
        yield sample.text
