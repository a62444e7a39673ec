"""The offline interface: `LLM` takes prompts or messages and returns results.

Knows the pieces and how they fit: checkpoint, tokenizer, template, generate loop. Does not know how
a request is scheduled (`engine/`), nor anything of the command line or of HTTP.
"""

import logging
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from typing import Any

from jax.sharding import Mesh

from qwen_jax.engine import offline
from qwen_jax.engine.capacity import make_plan, prefill_limit
from qwen_jax.engine.engine import Engine, Limits
from qwen_jax.engine.pictures import FeatureStore
from qwen_jax.engine.request import Defaults
from qwen_jax.engine.totals import Totals
from qwen_jax.functional import find_tokenizer
from qwen_jax.inputs import Inputs, Messages, add_message, eos_ids, find_template
from qwen_jax.picture_inputs import PictureInputs, find_rules
from qwen_jax.planner.choose import runtime_for
from qwen_jax.prompt import fim
from qwen_jax.prompt.vision_prompt import VideoForm
from qwen_jax.requests import Prompt, PromptLike, SamplingParams, as_prompts, params_for_each
from qwen_jax.results import RequestOutput, StreamEvent
from qwen_jax.sharding import Rules
from qwen_jax.structured.forms import Forms, matchers
from qwen_jax.weights import checkpoint

log = logging.getLogger(__name__)


class LLM:
    """A model, ready to generate.

    Args:
        model: hub id[@revision], local Hugging Face or orbax directory, gs:// path, or, with
            ``load_format="dummy"``, a preset name.
        mesh, strategy, dtype, kv_cache_dtype, kernels, page_size, dispatch: see `runtime_for`.
        quantization: None keeps the checkpoint as it is; "int8" and "fp8" requantise, explicitly.
        max_model_len: longest context; None: the model's, or what fits.
        max_num_seqs: most rows at once.
        max_num_batched_tokens: prompts are prefilled in chunks of at most this many tokens.
        hbm_utilization: share of an accelerator's memory to use.
        load_format: "auto", "safetensors", "orbax" or "dummy".
        seed: of requests that bring none, and of dummy weights.
        revision, cache_dir: of a hub id.
        config_overrides: config.json keys to replace, e.g. ``{"num_hidden_layers": 2}``.
        mm_processor_kwargs: wishes for all pictures and videos, see `MediaOptions`.
        video_form: what a video's frames replace in a prompt, see `vision_prompt`.

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
        dispatch: str = "auto",
        seed: int = 0,
        revision: str | None = None,
        cache_dir: str | None = None,
        config_overrides: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        video_form: VideoForm = "transformers-4.57",
        progress: checkpoint.Progress | None = None,
    ):
        source = checkpoint.resolve(
            model, load_format=load_format, revision=revision, cache_dir=cache_dir
        )
        config = checkpoint.read_config(source, overrides=config_overrides)
        self.runtime = runtime_for(
            config,
            rows=max_num_seqs,
            max_model_len=max_model_len,
            mesh=mesh,
            strategy=strategy,
            dtype=dtype,
            kv_cache_dtype=kv_cache_dtype,
            kernels=kernels,
            page_size=page_size,
            dispatch=dispatch,
            quantization=quantization,
        )
        chunk = prefill_limit(self.runtime, max_num_batched_tokens)
        self.plan = make_plan(
            config,
            self.runtime,
            quantization=quantization,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            hbm_utilization=hbm_utilization,
        )
        log.info("%s", self.plan)
        if source.form == "dummy":
            log.info("weights: random ones, of seed %d", seed)
        loaded = checkpoint.load(
            source,
            runtime=self.runtime,
            quantization=quantization,
            seed=seed,
            overrides=config_overrides,
            progress=progress,
        )
        self.name = model
        self.config, self.params = loaded.config, loaded.params
        self.generation_config = loaded.generation_config
        self.tokenizer = find_tokenizer(loaded)
        self.template = find_template(loaded)
        self.max_model_len = self.plan.max_model_len
        self.inputs = Inputs(
            self.tokenizer,
            self.template,
            PictureInputs(
                self.config,
                self.tokenizer,
                rules := find_rules(loaded),
                options=mm_processor_kwargs,
                video_form=video_form,
                buckets=self.runtime.buckets,
                max_model_len=self.max_model_len,
            ),
            vocab_size=self.config.text.vocab_size,
            max_model_len=self.max_model_len,
            most_tokens=min(self.plan.kv_tokens, self.plan.model_limit),
        )
        ends = eos_ids(self.config, self.generation_config)
        self.forms = Forms(self.tokenizer, self.template, ends)
        self.engine = Engine(
            self.params,
            self.config,
            self.runtime,
            Defaults(self.tokenizer, ends, self.max_model_len, seed),
            Limits(max_num_seqs, chunk, self.plan.pages),
            features=FeatureStore.make(self.params, self.config, self.runtime, rules),
            constraints=matchers,
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
            prompts: a string, ``{"prompt": …}`` or ``{"prompt_token_ids": […]}``, or a list; with
                ``"multi_modal_data"`` beside it, one placeholder for each picture.
            params: for all, or one for each; None: the checkpoint's generation_config.json.
            use_tqdm: show progress on stderr.

        Raises:
            ValueError: an empty, too long or impossible prompt; it names which.
        """
        ready = [self.inputs.prompt(p, f"prompt {i}") for i, p in enumerate(as_prompts(prompts))]
        return offline.run(self.engine, ready, self._params_for(params, ready), use_tqdm=use_tqdm)

    def chat(
        self,
        messages: Messages | Seq[Messages],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        add_generation_prompt: bool = True,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answers a conversation, or several; outputs carry reasoning and tool calls, parsed.

        Pictures are content parts, which may bring the options of ``mm_processor_kwargs`` too.
        """
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: list[Any] = list(messages) if several else [messages]
        options = {
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
            **(chat_template_kwargs or {}),
        }
        prompts = [self.inputs.chat(c, options, mm_processor_kwargs) for c in conversations]
        results = offline.run(
            self.engine, prompts, self._params_for(params, prompts), use_tqdm=use_tqdm
        )
        for prompt, result in zip(prompts, results, strict=True):
            for output in result.outputs:
                parser = self.inputs.parser(prompt, tools)
                parser.push(output.text)
                parser.finish()
                add_message(output, parser.message)
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
            params: as for `generate`; the FIM stop ids end the text too.
            path, repo, files: for repository-level prompts, see `fim.encode_fim`.
            chat_wrapped: wrap the prompt as a user turn, as Qwen3-Coder-Instruct was trained;
                None: where the checkpoint has a chat template.
        """
        prompt = self.fill_prompt(
            prefix, suffix, path=path, repo=repo, files=files, chat_wrapped=chat_wrapped
        )
        return offline.run(
            self.engine, [prompt], self._params_for(params, [prompt]), use_tqdm=use_tqdm
        )

    def fill_prompt(
        self,
        prefix: str,
        suffix: str,
        *,
        path: str | None = None,
        repo: str | None = None,
        files: fim.Files | None = None,
        chat_wrapped: bool | None = None,
    ) -> Prompt:
        """The prompt of `fill`, with the same arguments, for `generate` or `stream`."""
        return self.inputs.fill(
            prefix, suffix, path=path, repo=repo, files=files, chat_wrapped=chat_wrapped
        )

    def stream(
        self,
        prompt_or_messages: PromptLike | Messages,
        params: SamplingParams | None = None,
        *,
        tools: Seq[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> Iterator[StreamEvent]:
        """Yields a completion (of a prompt) or an answer (to messages) while it is generated."""
        parser = None
        if isinstance(prompt_or_messages, str | Mapping | Prompt):
            prompt = self.inputs.prompt(prompt_or_messages)
        else:
            options = {"tools": tools, **(chat_template_kwargs or {})}
            prompt = self.inputs.chat(prompt_or_messages, options, mm_processor_kwargs)
            parser = self.inputs.parser(prompt, tools)
        (given,) = self._params_for(params, [prompt])
        for text, result in offline.stream(self.engine, prompt, given):
            deltas = parser.push(text) if parser else []
            if result is not None and parser is not None:
                deltas += parser.finish()
                add_message(result.outputs[0], parser.message)
            if text or deltas or result is not None:
                yield StreamEvent(text, deltas, result)

    def get_default_sampling_params(self) -> SamplingParams:
        """The checkpoint's own, from its generation_config.json: what ``params=None`` means."""
        return SamplingParams.from_generation_config(self.generation_config)

    @property
    def totals(self) -> Totals:
        """Tokens and times of everything so far."""
        return self.engine.totals

    def _params_for(
        self, params: SamplingParams | Seq[SamplingParams] | None, prompts: Seq[Prompt]
    ) -> list[SamplingParams]:
        if params is None:
            params = self.get_default_sampling_params()
        each = params_for_each(
            params,
            len(prompts),
            vocab_size=self.config.text.vocab_size,
            has_tokenizer=self.tokenizer is not None,
        )
        return [self.forms.compiled(own, prompt) for own, prompt in zip(each, prompts, strict=True)]
