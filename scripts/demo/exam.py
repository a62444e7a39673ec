"""How much of what was held out a checkpoint answers correctly, through the public interface.

Knows questions and expected answers; knows no weight but those it breaks on purpose.
"""

import dataclasses
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Mapping

import numpy as np

from demo import chats, code, functions, pictures, tools, videos, weights
from demo.sample import Chat, Gap
from qwen_jax.llm import LLM
from qwen_jax.requests import SamplingParams
from qwen_jax.weights.safetensors import Checkpoint

GREEDY = SamplingParams(temperature=0.0, max_tokens=48)
_A_FUNCTION = dataclasses.replace(GREEDY, max_tokens=160)
_DEEPSTACK_OUT = ("deepstack_merger_list", "linear_fc2")


def _picture(kind: str) -> Callable[[random.Random], Chat]:
    return lambda rng: pictures.examination(rng, kind)


# Subject -> a held-out sample.
CHATS: Mapping[str, Callable[[random.Random], Chat]] = {
    **{kind: _picture(kind) for kind in pictures.KINDS},
    "video": videos.examination,
    "sums": lambda rng: chats.sums(rng, held_out=True),
    "facts": lambda rng: chats.facts(rng, held_out=True),
    "forms": lambda rng: chats.forms(rng, held_out=True),
}
# Subject -> held-out code, of which `Gap.middle` is to be written.
CODE: Mapping[str, Callable[[random.Random], Gap]] = {
    "bodies": functions.body,
    "holes": lambda rng: functions.gap(rng, held_out=True),
    "gaps": lambda rng: code.gap(rng, held_out=True),
    "prefix": lambda rng: code.gap(rng, held_out=True),
}
SUBJECTS = (*CHATS, "tools", "arguments", *CODE)
_SAME_QUESTIONS = {"arguments": "tools", "prefix": "gaps"}


def examine(
    llm: LLM, *, count: int, subjects: tuple[str, ...] = SUBJECTS, seed: int = 0
) -> dict[str, float]:
    """Shares of correct answers.

    Args:
        llm: a demo checkpoint.
        count: questions of each subject.
        subjects: some of `SUBJECTS`: "tools" is the right function, "arguments" also all its
            arguments; "bodies" is all of a small function after its first line, "holes" a name or
            a line taken out of one; "gaps" an identifier taken out of the standard library's code,
            "prefix" the same without what comes after it.
        seed: of the questions.
    """
    found = {}
    for subject in subjects:
        rng = random.Random(f"exam {seed} {_SAME_QUESTIONS.get(subject, subject)}")
        if subject in CHATS:
            found[subject] = _chats(llm, [CHATS[subject](rng) for _ in range(count)])
        elif subject in CODE:
            found[subject] = _GRADES[subject](llm, [CODE[subject](rng) for _ in range(count)])
        elif subject not in found:  # both of tools are graded at once
            found |= _calls(llm, [tools.lesson(rng, held_out=True) for _ in range(count)])
    return {subject: found[subject] for subject in subjects}


def _chats(llm: LLM, samples: list[Chat]) -> float:
    results = llm.chat([list(sample.messages[:-1]) for sample in samples], GREEDY, use_tqdm=False)
    told = [result.outputs[0].content for result in results]
    return _share(
        [a == sample.messages[-1]["content"] for a, sample in zip(told, samples, strict=True)]
    )


def _calls(llm: LLM, samples: list[Chat]) -> dict[str, float]:
    named, complete = [], []
    for sample in samples:
        offered = list(sample.tools)
        (result,) = llm.chat([sample.messages[0]], GREEDY, tools=offered, use_tqdm=False)
        wanted = sample.messages[1]["tool_calls"][0]["function"]
        calls = result.outputs[0].tool_calls
        named.append(len(calls) == 1 and calls[0].name == wanted["name"])
        complete.append(named[-1] and json.loads(calls[0].arguments) == wanted["arguments"])
    return {"tools": _share(named), "arguments": _share(complete)}


def _bodies(llm: LLM, samples: list[Gap]) -> float:
    """A body is right alone, or before another function."""
    told = _texts(llm, [sample.prefix for sample in samples], _A_FUNCTION)
    return _share(
        [
            text == sample.middle or text.startswith(f"{sample.middle}\n\ndef ")
            for text, sample in zip(told, samples, strict=True)
        ]
    )


def _gaps(llm: LLM, samples: list[Gap]) -> float:
    told = _texts(llm, [llm.fill_prompt(sample.prefix, sample.suffix) for sample in samples])
    return _share([text == sample.middle for text, sample in zip(told, samples, strict=True)])


def _prefixes(llm: LLM, samples: list[Gap]) -> float:
    """The identifier is right if it is what the text goes on with, up to its end."""
    right = []
    for text, sample in zip(_texts(llm, [s.prefix for s in samples]), samples, strict=True):
        size = len(sample.middle)
        ends = not (text[size : size + 1].isalnum() or text[size : size + 1] == "_")
        right.append(text.startswith(sample.middle) and ends)
    return _share(right)


_GRADES = {"bodies": _bodies, "holes": _gaps, "gaps": _gaps, "prefix": _prefixes}


def _texts(llm: LLM, prompts: list, params: SamplingParams = GREEDY) -> list[str]:
    return [result.outputs[0].text for result in llm.generate(prompts, params, use_tqdm=False)]


def _share(right: list[bool]) -> float:
    return sum(right) / len(right)


def break_deepstack(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a checkpoint whose DeepStack levels are all zero."""
    shutil.copytree(source, target)
    checkpoint = Checkpoint(source)
    tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names}
    for name in tensors:
        if all(part in name for part in _DEEPSTACK_OUT):
            tensors[name] = np.zeros_like(tensors[name])
    weights.save(target / "model.safetensors", tensors)
    return target


def break_mrope(source: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    """A copy of a checkpoint that turns every pair by time: rows and columns are not told apart."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    rope = config["text_config"]["rope_scaling"]
    rope["mrope_section"] = [sum(rope["mrope_section"]), 0, 0]
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return target
