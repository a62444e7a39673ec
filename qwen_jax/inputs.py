"""What users give, as token ids: prompts, conversations, code with a gap.

Knows the checkpoint's tokenizer, its chat template and the limits of a prompt; knows no weight and
no sampling.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from qwen_jax.prompt import fim, parsing
from qwen_jax.prompt.chat import ChatTemplate, encode_chat
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Prompt, PromptLike, check_prompt_keys
from qwen_jax.results import CompletionOutput
from qwen_jax.weights.checkpoint import Loaded
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]


class Inputs:
    """Makes prompts, and refuses what cannot be one.

    Args:
        tokenizer, template: each None where the checkpoint has none.
        vocab_size: ids of the model.
        max_model_len: the longest context.
        most_tokens: what max_model_len could be raised to, for the error that says so.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        template: ChatTemplate | None,
        *,
        vocab_size: int,
        max_model_len: int,
        most_tokens: int,
    ):
        self._tokenizer, self._template = tokenizer, template
        self._vocab_size, self._max_model_len = vocab_size, max_model_len
        self._most_tokens = most_tokens

    def prompt(self, given: PromptLike, name: str = "prompt") -> Prompt:
        """A text, or a mapping with a text or token ids; ``name`` is what errors call it."""
        if isinstance(given, Prompt):
            return self._checked(given.token_ids, name, given.text, given.stop_ids)
        if isinstance(given, str):
            given = {"prompt": given}
        if not isinstance(given, Mapping):
            raise ValueError(f"{name} is {given!r:.60}: give a text, or a mapping with one")
        check_prompt_keys(given)
        if given.get("multi_modal_data"):
            raise ValueError(f"{name}: multi_modal_data needs a vision-language model")
        text, ids = given.get("prompt"), given.get("prompt_token_ids")
        if text is not None:
            ids = self.needs_tokenizer(name).encode(text)
        return self._checked(ids, name, text)

    def chat(self, messages: Messages, options: Mapping[str, Any]) -> Prompt:
        """A conversation, by the checkpoint's template; ``options`` are those of `encode_chat`."""
        tokenizer, template = self.needs_tokenizer("chat"), self._template
        if template is None:
            raise ValueError("chat needs a chat template; this checkpoint has none: use generate")
        ids = encode_chat(tokenizer, template, messages, **options)
        return self._checked(ids, "messages", template.render(messages, **options))

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
        return self._checked(ids, "prompt", text, fim.fim_stop_ids(tokenizer))

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

    def _checked(
        self, ids: Any, name: str, text: str | None, stop_ids: tuple[int, ...] = ()
    ) -> Prompt:
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise ValueError(f"{name}: {ids!r:.60} is not a list of token ids")
        ids = list(ids)
        if not ids:
            raise ValueError(f"{name} is empty: it has no token to continue from")
        for token in ids:
            integer = isinstance(token, int | np.integer) and not isinstance(token, bool)
            if not integer or not 0 <= token < self._vocab_size:
                raise ValueError(
                    f"{name}: token id {token!r} is not an integer in 0 .. {self._vocab_size - 1}"
                )
        limit = self._max_model_len
        if len(ids) >= limit:
            most = self._most_tokens
            more = f"raise max_model_len (KV for {most:,} fits) or " if most > limit else ""
            raise ValueError(
                f"{name} has {len(ids):,} tokens, max_model_len is {limit:,}: {more}shorten it "
                "(one position is needed for the answer)"
            )
        return Prompt(tuple(map(int, ids)), text, stop_ids)


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
