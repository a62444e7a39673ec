"""The offline interface: `LLM` takes prompts or messages and returns results.

Knows the pieces and how they fit: checkpoint, tokenizer, template, generate loop. Does not know how
a request is scheduled (`engine/`), nor anything of the command line or of HTTP.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import jax
from jax.sharding import Mesh

from qwen_jax.engine.capacity import plan_cache
from qwen_jax.engine.offline import Offline
from qwen_jax.engine.static_batch import StaticBatch
from qwen_jax.prompt import fim, parsing
from qwen_jax.prompt.chat import ChatTemplate, encode_chat
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import (
    CompletionOutput,
    Prompt,
    PromptLike,
    RequestOutput,
    SamplingParams,
    as_prompts,
    check_prompt_keys,
)
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import Rules
from qwen_jax.weights import checkpoint
from qwen_jax.weights.config import ModelConfig

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 8192  # of one prefill chunk, unless max_num_batched_tokens says otherwise

Messages = Seq[Mapping[str, Any]]


@dataclasses.dataclass
class StreamEvent:
    """A piece of a text as it is generated.

    Attributes:
        text: new text; joined over all events it is the completion's ``text``.
        deltas: the same, parsed into reasoning, content and tool calls (chat only).
        output: the whole result, with the last event only.
    """

    text: str
    deltas: list[parsing.Delta] = dataclasses.field(default_factory=list)
    output: RequestOutput | None = None


class LLM:
    """A model, ready to generate.

    Args:
        model: hub id[@revision], local Hugging Face or orbax directory, gs:// path, or, with
            ``load_format="dummy"``, a preset name.
        mesh, strategy, dtype, kv_cache_dtype, kernels, page_size: see `Runtime.make`; a mesh of
            "auto" puts every device on the expert axis, or on the tensor axis for a dense model.
        quantization: None keeps the checkpoint as it is; "int8" and "fp8" requantise, explicitly.
        max_model_len: longest context; None: the model's, or what fits.
        max_num_seqs: most rows at once.
        max_num_batched_tokens: prompts are prefilled in chunks of at most this many tokens.
        hbm_utilization: share of an accelerator's memory to use.
        load_format: "auto", "safetensors", "orbax" or "dummy".
        seed: of requests that bring none, and of dummy weights.
        revision, cache_dir: of a hub id.
        config_overrides: config.json keys to replace, e.g. ``{"num_hidden_layers": 2}``.

    Raises:
        ValueError: anything that cannot work, before the weights are read where that can be known.
    """

    def __init__(
        self,
        model: str,
        *,
        mesh: str | Mapping[str, int] | Mesh = "auto",
        strategy: str | Rules = "auto",
        dtype: str = "bfloat16",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int | None = None,
        hbm_utilization: float = 0.9,
        load_format: str = "auto",
        kernels: str | Mapping[str, str] = "auto",
        page_size: int = 64,
        seed: int = 0,
        revision: str | None = None,
        cache_dir: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        progress: checkpoint.Progress | None = None,
    ):
        source = checkpoint.resolve(
            model, load_format=load_format, revision=revision, cache_dir=cache_dir
        )
        config = checkpoint.read_config(source, overrides=config_overrides)
        if mesh == "auto":
            mesh = auto_mesh(config)
        self.runtime = Runtime.make(
            mesh=mesh,
            strategy=strategy,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            kernels=kernels,
            page_size=page_size,
        )
        loaded = checkpoint.load(
            source,
            runtime=self.runtime,
            quantization=quantization,
            seed=seed,
            overrides=config_overrides,
            progress=progress,
        )
        self.config, self.params = loaded.config, loaded.params
        self.generation_config = loaded.generation_config
        self.tokenizer, self.template = _text_side(loaded.directory, self.config.text.vocab_size)
        self.max_model_len, pages = plan_cache(
            self.config,
            self.runtime,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            hbm_utilization=hbm_utilization,
        )
        batch = StaticBatch(
            self.params,
            self.config,
            self.runtime,
            self.tokenizer,
            max_pages=pages,
            max_model_len=self.max_model_len,
            max_prefill_tokens=max_num_batched_tokens or _PREFILL_TOKENS,
        )
        self._offline = Offline(
            batch,
            self.tokenizer,
            eos_ids=_eos_ids(self.config, self.generation_config),
            max_model_len=self.max_model_len,
            max_num_seqs=max_num_seqs,
            seed=seed,
        )

    # ---- what users call ---------------------------------------------------------------------

    def generate(
        self,
        prompts: PromptLike | Seq[PromptLike],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Completes prompts; results are in their order.

        Args:
            prompts: a string, ``{"prompt": …}`` or ``{"prompt_token_ids": […]}``, or a list.
            params: for all, or one for each; None: the checkpoint's generation_config.json.
            use_tqdm: show progress on stderr.

        Raises:
            ValueError: an empty, too long or impossible prompt; it names which.
        """
        ready = [self._prompt(p, f"prompt {i}") for i, p in enumerate(as_prompts(prompts))]
        return self._offline.run(ready, self._params_for(params, len(ready)), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Messages | Seq[Messages],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several; outputs carry reasoning and tool calls, parsed."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: list[Any] = list(messages) if several else [messages]
        options = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **(chat_template_kwargs or {}),
        }
        prompts = [self._chat_prompt(c, options) for c in conversations]
        results = self._offline.run(
            prompts, self._params_for(params, len(prompts)), use_tqdm=use_tqdm
        )
        for result in results:
            for output in result.outputs:
                parser = self._parser(result.prompt or "", tools)
                parser.push(output.text)
                parser.finish()
                _add_message(output, parser.message)
        return results

    def fill(
        self,
        prefix: str,
        suffix: str,
        params: SamplingParams | None = None,
        *,
        path: str | None = None,
        repo: str | None = None,
        files: fim.Files | None = None,
        chat_wrapped: bool | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Fills in the middle between ``prefix`` and ``suffix``.

        Args:
            prefix, suffix: the code before and after.
            params: as for `generate`; the FIM stop ids are added.
            path, repo, files: for repository-level prompts, see `fim.encode_fim`.
            chat_wrapped: wrap the prompt as a user turn, as Qwen3-Coder-Instruct was trained;
                None: where the checkpoint has a chat template.
        """
        tokenizer = self._needs_tokenizer("fill")
        template = self.template if chat_wrapped is not False else None
        if chat_wrapped and template is None:
            raise ValueError("chat_wrapped=True needs a chat template; this checkpoint has none")
        ids = fim.encode_fim(
            tokenizer, prefix, suffix, path=path, repo=repo, files=files, template=template
        )
        text = fim.fim_prompt(prefix, suffix, path=path, repo=repo, files=files)
        (given,) = self._params_for(params, 1)
        stops = (*(given.stop_token_ids or ()), *fim.fim_stop_ids(tokenizer))
        given = dataclasses.replace(given, stop_token_ids=stops)
        return self._offline.run([Prompt(tuple(ids), text)], [given], use_tqdm=use_tqdm)

    def stream(
        self,
        prompt_or_messages: PromptLike | Messages,
        params: SamplingParams | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[StreamEvent]:
        """Yields a completion (of a prompt) or an answer (to messages) while it is generated."""
        parser = None
        if isinstance(prompt_or_messages, str | Mapping | Prompt):
            prompt = self._prompt(prompt_or_messages, "prompt")
        else:
            options = {"tools": tools, **(chat_template_kwargs or {})}
            prompt = self._chat_prompt(prompt_or_messages, options)
            parser = self._parser(prompt.text or "", tools)
        (given,) = self._params_for(params, 1)
        for text, result in self._offline.stream(prompt, given):
            deltas = parser.push(text) if parser else []
            if result is not None and parser is not None:
                deltas += parser.finish()
                _add_message(result.outputs[0], parser.message)
            if text or deltas or result is not None:
                yield StreamEvent(text, deltas, result)

    # ---- from what users give to token ids -----------------------------------------------------

    def _prompt(self, prompt: PromptLike, name: str) -> Prompt:
        """Token ids of one prompt, checked."""
        if isinstance(prompt, str):
            prompt = {"prompt": prompt}
        if isinstance(prompt, Mapping):
            check_prompt_keys(prompt)
            if prompt.get("multi_modal_data"):
                raise ValueError(f"{name}: multi_modal_data needs a vision-language model")
            text, ids = prompt.get("prompt"), prompt.get("prompt_token_ids")
            if ids is None:
                ids = self._needs_tokenizer(name).encode(text)
            prompt = Prompt(tuple(ids), text)
        self._check(prompt.token_ids, name)
        return prompt

    def _chat_prompt(self, messages: Messages, options: Mapping[str, Any]) -> Prompt:
        tokenizer = self._needs_tokenizer("chat")
        if self.template is None:
            raise ValueError("chat needs a chat template; this checkpoint has none: use generate")
        ids = encode_chat(tokenizer, self.template, messages, **options)
        self._check(ids, "messages")
        return Prompt(tuple(ids), self.template.render(messages, **options))

    def _check(self, ids: Seq[int], name: str) -> None:
        vocab = self.config.text.vocab_size
        if not ids:
            raise ValueError(f"{name} is empty: it has no token to continue from")
        for i in ids:
            if not isinstance(i, int) or isinstance(i, bool) or not 0 <= i < vocab:
                raise ValueError(f"{name}: token id {i!r} is not an integer in 0 .. {vocab - 1}")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"{name} has {len(ids):,} tokens, max_model_len is {self.max_model_len:,}: shorten "
                "it, or raise max_model_len (one position must be left for the answer)"
            )

    def _needs_tokenizer(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{what}: this checkpoint directory has no tokenizer files; add tokenizer.json, or "
                'give {"prompt_token_ids": [...]}'
            )
        return self.tokenizer

    def _params_for(
        self, params: SamplingParams | Seq[SamplingParams] | None, count: int
    ) -> list[SamplingParams]:
        if params is None:
            params = SamplingParams.from_generation_config(self.generation_config)
        if isinstance(params, SamplingParams):
            params = [params] * count
        if len(params) != count:
            raise ValueError(
                f"{len(params)} sampling params for {count} prompts; give 1 or {count}"
            )
        return list(params)

    def _parser(self, prompt: str, tools) -> parsing.OutputParser:
        assert self.template is not None
        return parsing.OutputParser(
            reasoning=parsing.reasoning_state(prompt),
            tool_format=parsing.tool_format(self.template.source) if tools else None,
            tools=tools,
        )


def auto_mesh(config: ModelConfig) -> dict[str, int]:
    """All devices on the expert axis where it divides the experts, else on the tensor axis."""
    n = len(jax.devices())
    experts = config.text.num_experts
    return {"expert": n} if experts and experts % n == 0 else {"tensor": n}


def _text_side(directory: pathlib.Path | None, vocab: int):
    """Tokenizer and chat template, each None where the checkpoint has none."""
    tokenizer = template = None
    if directory is not None:
        try:
            tokenizer = Tokenizer.from_dir(directory, padded_size=vocab)
        except FileNotFoundError as error:
            log.info("token ids only: %s", error)
        try:
            template = ChatTemplate.from_dir(directory)
        except FileNotFoundError as error:
            log.info("no chat: %s", error)
    return tokenizer, template


def _eos_ids(config: ModelConfig, generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ends of text by config.json and by generation_config.json, which often lists more."""
    more = generation_config.get("eos_token_id")
    more = [] if more is None else more if isinstance(more, list) else [more]
    return tuple(dict.fromkeys([*config.eos_token_ids, *more]))


def _add_message(output: CompletionOutput, message: parsing.Message) -> None:
    output.reasoning_content = message.reasoning_content
    output.content = message.content
    output.tool_calls = list(message.tool_calls)
