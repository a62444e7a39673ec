"""The forms that outputs of one checkpoint can be held to, compiled when they are asked for.

Knows the checkpoint's tokenizer, ends of text and template; knows neither requests nor the engine.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from qwen_jax.prompt import parsing
from qwen_jax.prompt.chat import ChatTemplate
from qwen_jax.prompt.tokenizer import Tokenizer
from qwen_jax.requests import Prompt, SamplingParams
from qwen_jax.structured.compile import GrammarCompiler
from qwen_jax.structured.spec import Grammar, Matcher, StructuredOutputs

_ASSISTANT = "<|im_start|>assistant"


class Forms:
    """Compiles `SamplingParams.structured_outputs`. Threads may share it.

    Args:
        tokenizer, template: each None where the checkpoint has none.
        eos_ids: its ends of text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, template: ChatTemplate | None, eos_ids: Sequence[int]
    ):
        self._tokenizer, self._template, self._eos_ids = tokenizer, template, tuple(eos_ids)

    @functools.cached_property
    def compiler(self) -> GrammarCompiler:
        """Made once, which takes a moment for a large vocabulary.

        Raises:
            ModuleNotFoundError: llguidance is not installed.
            ValueError: no tokenizer, or one that does not do.
        """
        if self._tokenizer is None:
            raise ValueError(
                "structured outputs need a tokenizer, which this checkpoint has none of"
            )
        return GrammarCompiler(self._tokenizer, self._eos_ids)

    def grammar(self, wish: StructuredOutputs, prompt: Prompt) -> Grammar:
        """The grammar of an answer to a prompt: it begins where the reasoning ends.

        Raises:
            ValueError: the wish cannot be compiled; it says why.
            ModuleNotFoundError: llguidance is not installed.
        """
        text = prompt.text or ""
        # Whether a text reasons first where the prompt says nothing: only in an assistant's turn.
        asks = text[text.rfind("<|im_start|>") :].startswith(_ASSISTANT)
        grammar = self.compiler.after_reasoning(
            self.compiler.compile(wish),
            parsing.reasoning_state(text),
            may_open=asks and self._template is not None and "<think>" in self._template.source,
        )
        return dataclasses.replace(grammar, wish=wish)

    def compiled(self, params: SamplingParams, prompt: Prompt) -> SamplingParams:
        """The parameters with their form compiled for a prompt; raises as `grammar`."""
        wish = params.structured_outputs
        if not isinstance(wish, StructuredOutputs):
            return params
        return dataclasses.replace(params, structured_outputs=self.grammar(wish, prompt))


def matchers(form: object) -> Callable[[], Matcher]:
    """What the engine makes constraints with. Raises ValueError for a form that is not compiled."""
    if not isinstance(form, Grammar):
        raise ValueError("structured_outputs must be compiled for its prompt: see `Forms.compiled`")
    return form.matcher
