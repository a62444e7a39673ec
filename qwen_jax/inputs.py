"""What users give, as token ids: prompts, conversations, code with a gap, with their pictures.

Knows the checkpoint's tokenizer, its chat template and the limits of a prompt; knows no weight and
no sampling.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.picture_inputs import PictureInputs
from qwen_jax.prompt import fim, parsing
from qwen_jax.prompt.chat import ChatTemplate, chat_parts
from qwen_jax.prompt.media import Media, media_beside, take_media
from qwen_jax.prompt.media_options import MediaOptions
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Prompt, PromptLike, check_prompt_keys
from qwen_jax.results import CompletionOutput
from qwen_jax.weights.checkpoint import Loaded
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]

_HOPELESS = 8  # characters per token; text has about four
_MM_OPTION = "mm_processor_kwargs"


class Inputs:
    """Makes prompts, and refuses what cannot be one.

    Args:
        tokenizer, template: each None where the checkpoint has none.
        pictures: puts them among the tokens.
        vocab_size: ids of the model.
        max_model_len: the longest context.
        most_tokens: what max_model_len could be raised to, for the error that says so.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        pictures: PictureInputs,
        *,
        vocab_size: int,
        max_model_len: int,
        most_tokens: int,
    ):
        self._tokenizer, self._template, self._pictures = tokenizer, template, pictures
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._most_tokens = most_tokens

    @property
    def media_options(self) -> MediaOptions:
        """What pictures and videos are made into, where a prompt does not say it."""
        return self._pictures.options

    def prompt(self, given: PromptLike, name: str = "prompt") -> Prompt:
        """A text, or a mapping with a text or token ids; ``name`` is what errors call it."""
        if isinstance(given, Prompt):
            self._check_length(_checked_ids(given.token_ids, name, self._vocab_size), name)
            return given
        if isinstance(given, str):
            given = {"prompt": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r:.60}: give a text, or a mapping with one")
        check_prompt_keys(given)
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        if text is not None:
            self._check_texts([text], name)
            parts: list[Any] = self.needs_tokenizer(name).split(text)
        else:
            parts = _checked_ids(ids, name, self._vocab_size)
        media = media_beside(given.get("multi_modal_data") or {}, name)
        return self._placed(parts, media, given.get(_MM_OPTION), name, text)

    def chat(
        self,
        messages: Messages,
        options: Mapping[str, Any],
        picture_options: Mapping[str, Any] | None = None,
    ) -> Prompt:
        """A conversation, by the checkpoint's template.

        Args:
            messages: with pictures in their content parts.
            options: those of `chat_parts`.
            picture_options: ``mm_processor_kwargs`` of all pictures; a part's own go before them.
        """
        tokenizer, template = self.needs_tokenizer("chat"), self._template
        if template is None:
            raise ValueError("chat needs a chat template; this checkpoint has none: use generate")
        self._check_texts(_texts(messages), "messages")
        bare, media = take_media(messages) if isinstance(messages, Sequence) else (messages, [])
        self._pictures.check_can_see(media)
        parts = chat_parts(tokenizer, template, bare, **options)
        text = template.render(bare, **options)
        return self._placed(parts, media, picture_options, "messages", text)

    def fill(
        self,
        prefix: str,
        suffix: str,
        *,
        path: str | None = None,
        repo: str | None = None,
        files: fim.Files | None = None,
        chat_wrapped: bool | None = None,
    ) -> Prompt:
        """Code before and after a gap; the arguments are those of `LLM.fill`."""
        tokenizer = self.needs_tokenizer("fill")
        template = None if chat_wrapped is False else self._template
        if chat_wrapped and template is None:
            raise ValueError("chat_wrapped=True needs a chat template; this checkpoint has none")
        ids = fim.encode_fim(
            tokenizer, prefix, suffix, path=path, repo=repo, files=files, template=template
        )
        text = tokenizer.decode(ids, skip_special_tokens=False)
        self._check_length(ids, "prompt")
        return Prompt(tuple(ids), text, fim.fim_stop_ids(tokenizer))

    def parser(self, prompt: Prompt, tools: Sequence[Mapping] | None) -> parsing.OutputParser:
        """Takes answers to a `chat` prompt apart."""
        assert self._template is not None
        return parsing.OutputParser(
            reasoning=parsing.reasoning_state(prompt.text or ""),
            tool_format=parsing.tool_format(self._template.source) if tools else None,
            tools=tools,
        )

    def needs_tokenizer(self, what: str) -> Tokenizer:
        """The tokenizer, for something that cannot be done without one."""
        if self._tokenizer is None:
            raise ValueError(
                f"{what}: this checkpoint has no tokenizer files; add tokenizer.json, or give "
                '{"prompt_token_ids": [...]}'
            )
        return self._tokenizer

    def _placed(
        self,
        parts: list[Any],
        media: list[Media],
        options: Mapping[str, Any] | None,
        name: str,
        text: str | None,
    ) -> Prompt:
        """The prompt of ``parts``: strings and ids, with a placeholder for each picture."""
        vision = self._pictures.place(parts, media, options=options, name=name)
        if vision is not None:
            ids = list(vision.token_ids)
        elif self._tokenizer is not None and any(isinstance(part, str) for part in parts):
            ids = self._tokenizer.encode_parts(parts)
        else:
            ids = parts
        ids = _checked_ids(ids, name, self._vocab_size)
        self._check_length(ids, name)
        return Prompt(tuple(ids), text, vision=vision)

    def _check_texts(self, texts: Iterable[Any], name: str) -> None:
        """Refuses what is hopelessly long by its beginning, before all of it is worked on."""
        first = _HOPELESS * self._max_model_len
        for text in texts:
            if self._tokenizer is None or not isinstance(text, str) or len(text) <= first:
                continue
            # Where a text is cut, a token or two may be others: hardly more than that.
            if len(self._tokenizer.encode(text[:first], special=False)) > self._max_model_len + 8:
                raise ValueError(
                    f"{name} has {len(text):,} characters, far more than max_model_len="
                    f"{self._max_model_len:,} tokens hold: shorten it"
                )

    def _check_length(self, ids: Sequence[int], name: str) -> None:
        limit = self._max_model_len
        if len(ids) >= limit:
            most = self._most_tokens
            more = f"raise max_model_len (KV for {most:,} fits) or " if most > limit else ""
            raise ValueError(
                f"{name} has {len(ids):,} tokens, max_model_len is {limit:,}: {more}shorten it "
                "(one position is needed for the answer)"
            )


def _texts(messages: Any) -> Iterable[Any]:
    """Texts of a conversation, which has not been checked yet."""
    for message in messages if isinstance(messages, Sequence) else ():
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list) else [content]:
            yield part.get("text") if isinstance(part, Mapping) else part


def _checked_ids(ids: Any, name: str, vocab_size: int) -> list[int]:
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise ValueError(f"{name}: {ids!r:.60} is not a list of token ids")
    ids = list(ids)
    if not ids:
        raise ValueError(f"{name} is empty: it has no token to continue from")
    for token in ids:
        integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
        if not integer or not 0 <= token < vocab_size:
            raise ValueError(
                f"{name}: token id {token!r} is not an integer in 0 .. {vocab_size - 1}"
            )
    return [int(token) for token in ids]


def add_message(output: CompletionOutput, message: parsing.Message) -> None:
    """Puts a parsed answer into a result."""
    output.reasoning_content = message.reasoning_content
    output.content = message.content
    output.tool_calls = list(message.tool_calls)


def find_template(loaded: Loaded) -> ChatTemplate | None:
    """The checkpoint's chat template, or None (said in the log) where it has none."""
    if loaded.directory is None:
        return None
    try:
        return ChatTemplate.from_dir(loaded.directory)
    except FileNotFoundError as error:
        log.info("no chat: %s", error)
        return None


def eos_ids(config: ModelConfig, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ends of text by config.json and by generation_config.json, which often lists more."""
    more = generation_config.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    ids = dict.fromkeys([*config.eos_token_ids, *more])
    beyond = [i for i in ids if not 0 <= i < config.text.vocab_size]
    if beyond:
        log.info("ends of text that the vocabulary does not have are never chosen: %s", beyond)
    return tuple(i for i in ids if i not in beyond)
