"""Fill-in-the-middle prompts of Qwen3-Coder, for a file and for a repository.

Knows the FIM tokens and their order (prefix, suffix, middle). Does not know sampling or the model.
Source: QwenLM/Qwen3-Coder README and examples.
"""

from collections.abc import Iterable, Mapping

from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.tokenizer import Tokenizer

PREFIX, SUFFIX, MIDDLE = "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"
REPO_NAME, FILE_SEP = "<|repo_name|>", "<|file_sep|>"
STOPS = (PREFIX, SUFFIX, "<|fim_pad|>", REPO_NAME, FILE_SEP, "<|endoftext|>", "<|im_end|>")
SYSTEM = "You are a code completion assistant."
FILL_MARK = "<FILL>"

Files = Mapping[str, str] | Iterable[tuple[str, str]]

_TOKENS = (PREFIX, SUFFIX, MIDDLE, REPO_NAME, FILE_SEP)
_PLACE = "\N{OBJECT REPLACEMENT CHARACTER}"


def fim_prompt(
    prefix: str,
    suffix: str,
    *,
    path: str | None = None,
    repo: str | None = None,
    files: Files | None = None,
) -> str:
    """The prompt as text: to look at; `encode_fim` makes the ids.

    path: the file's own path. repo: the repository's name. files: other files of it, path -> text,
    in the order in which the model shall read them. repo and files need path.
    """
    return "".join(text for text, _ in _parts(prefix, suffix, path, repo, files))


def encode_fim(
    tokenizer: Tokenizer,
    prefix: str,
    suffix: str,
    *,
    path: str | None = None,
    repo: str | None = None,
    files: Files | None = None,
    template: ChatTemplate | None = None,
) -> list[int]:
    """The prompt's token ids; special tokens inside the code, names and paths are plain text.

    template: wraps the prompt as a user turn, as the README of Qwen3-Coder-Instruct does; without
    it the prompt is raw, as for a base model. Raises ValueError for a tokenizer without FIM tokens.
    """
    ids = {text: _required_id(tokenizer, text) for text in _TOKENS}
    parts: list[str | int] = [
        ids[text] if special else text
        for text, special in _parts(prefix, suffix, path, repo, files)
    ]
    if template is None:
        return tokenizer.encode_parts(parts)
    # Rendered around a placeholder; the prompt begins and ends with a special token, so cutting the
    # text there changes nothing in how its sides are encoded.
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": _PLACE}]
    before, found, after = template.render(messages).partition(_PLACE)
    if not found or _PLACE in after:
        raise ValueError("this chat template does not show a user's message exactly once")
    return tokenizer.encode_parts([*tokenizer.split(before), *parts, *tokenizer.split(after)])


def fim_stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a completion: FIM and file tokens, end of text, end of turn."""
    return tuple(_required_id(tokenizer, text) for text in STOPS)


def split_fill(text: str, mark: str = FILL_MARK) -> tuple[str, str]:
    """(prefix, suffix) of a text with one mark where code is to be filled in; else ValueError."""
    count = text.count(mark)
    if count != 1:
        raise ValueError(f"the text has {count} marks {mark!r}, needs exactly one")
    prefix, _, suffix = text.partition(mark)
    return prefix, suffix


def _parts(
    prefix: str, suffix: str, path: str | None, repo: str | None, files: Files | None
) -> list[tuple[str, bool]]:
    """The prompt as (text, is a special token)."""
    others = list(dict(files or ()).items())
    if path is None and (repo is not None or others):
        raise ValueError("a repository-level prompt needs path: the path of the file to complete")
    parts: list[tuple[str, bool]] = []
    if repo is not None:
        parts += [(REPO_NAME, True), (_one_line(repo, "repo") + "\n", False)]
    for name, content in others:
        line = _one_line(name, "path in files")
        parts += [(FILE_SEP, True), (f"{line}\n{content}\n", False)]
    if path is not None:
        parts += [(FILE_SEP, True), (_one_line(path, "path") + "\n", False)]
    return [
        *parts,
        (PREFIX, True),
        (prefix, False),
        (SUFFIX, True),
        (suffix, False),
        (MIDDLE, True),
    ]


def _one_line(text: str, what: str) -> str:
    if not text or "\n" in text or "\r" in text:
        raise ValueError(f"{what} must be one line and not empty, got {text!r:.80}")
    return text


def _required_id(tokenizer: Tokenizer, text: str) -> int:
    id = tokenizer.added.get(text)
    if id is None:
        raise ValueError(
            f"this tokenizer has no token {text}: fill-in-the-middle needs a Qwen tokenizer"
        )
    return id
