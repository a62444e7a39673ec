"""A tokenizer and a chat template for tiny checkpoints, in the form of the published ones.

Knows tokenizer.json, tokenizer_config.json and chat_template.jinja; knows no weights. The tokenizer
is byte-level BPE with Qwen's own pattern, a few merges and Qwen's 26 added tokens in their order;
rows of the embedding behind them are padding, as in the real vocabulary.
"""

import json
import pathlib
import shutil

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tiny.checkpoint import SEED, write

TOKENIZER_VOCAB = 320  # rows of the embedding; ids in use end below it
REAL_VOCAB = 151936
REAL_EOS = (151645, 151643)

_MERGES = """Ġ Ġ|ĠĠ ĠĠ|i n|Ġ t|e r|o n|Ġ a|r e|a t|Ġt h|Ġth e|Ċ Ċ|d e|de f|in t|p r|pr int|Ġ s
o u|e l|l o|h el|hel lo|o r|w or|re t|u r|ret ur|retur n|i s|( )"""
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# (content, special), in the order of the published vocabulary.
_ADDED = [
    *((f"<|{name}|>", True) for name in ("endoftext", "im_start", "im_end")),
    *((f"<|{name}_{end}|>", True) for name in ("object_ref", "box") for end in ("start", "end")),
    *((f"<|{name}_{end}|>", True) for name in ("quad", "vision") for end in ("start", "end")),
    *((f"<|{name}_pad|>", True) for name in ("vision", "image", "video")),
    *((word, False) for word in ("<tool_call>", "</tool_call>")),
    *((f"<|fim_{name}|>", False) for name in ("prefix", "middle", "suffix", "pad")),
    *((word, False) for word in ("<|repo_name|>", "<|file_sep|>")),
    *((f"<{end}{name}>", False) for name in ("tool_response", "think") for end in ("", "/")),
]

CHAT_TEMPLATE = r"""{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}
        {{- '\n' + (tool | tojson) }}
    {%- endfor %}
    {{- '\n</tools>\n\n<tool_call>\n{"name": <name>, "arguments": <json>}\n</tool_call>' }}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content or '') }}
    {%- for call in message.tool_calls or [] %}
        {{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
        {{- (call.function.arguments | tojson) + '}\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""


def write_text_model(
    directory: str | pathlib.Path,
    variant: str,
    *,
    real: pathlib.Path | None = None,
    dtype: str = "float32",
    seed: int = SEED,
) -> pathlib.Path:
    """Writes a checkpoint together with a tokenizer whose ids fit it.

    Args:
        directory: made where missing.
        variant: a key of `VARIANTS`.
        real: a directory of published files: use their tokenizer and its 151,936 rows.
        dtype, seed: as in `write`.
    """
    tokenizer = write_tokenizer(directory, real=real)
    eos = (tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>"))
    size = REAL_VOCAB if real else TOKENIZER_VOCAB
    return write(directory, variant, dtype=dtype, vocab_size=size, eos=eos, seed=seed)


def write_tokenizer(
    directory: str | pathlib.Path, *, real: pathlib.Path | None = None
) -> Tokenizer:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja.

    Args:
        directory: made where missing.
        real: a directory of published files: copy ``tokenizer/`` and the hybrid Qwen3 template.

    Returns:
        the tokenizer, as the library that reads it sees it.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if real:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(real / "tokenizer" / name, directory / name)
        template = real / "Qwen3-30B-A3B" / "chat_template.jinja"
        shutil.copyfile(template, directory / "chat_template.jinja")
        return Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer = _tokenizer()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return tokenizer


def _tokenizer() -> Tokenizer:
    merges = [tuple(pair.split()) for pair in _MERGES.replace("\n", "|").split("|")]
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated")
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    # One by one: a call with several would number the special ones first.
    for content, special in _ADDED:
        tokenizer.add_tokens([AddedToken(content, special=special, normalized=False)])
    return tokenizer
