"""The exam counts right answers as right and wrong ones as wrong, whoever gives them."""

import dataclasses
import json
import random

import numpy as np
import pytest
import tiny
from demo import exam, tools
from demo.sample import Gap

from qwen_jax.prompt.parsing import ToolCall
from qwen_jax.weights.safetensors import Checkpoint


@dataclasses.dataclass
class Output:
    """What the exam reads of an answer."""

    content: str | None = None
    tool_calls: tuple = ()
    text: str = ""


@dataclasses.dataclass
class Result:
    outputs: list


class Pupil:
    """Knows the answers to what will be asked, and gives every fourth of them wrong."""

    def __init__(self, samples, more=""):
        self._samples, self._more, self._asked = samples, more, 0

    def _next(self, right, wrong):
        self._asked += 1
        return Result([wrong if self._asked % 4 == 0 else right])

    def chat(self, conversations, params, tools=None, use_tqdm=True):
        if tools is None:
            return [
                self._next(Output(s.messages[-1]["content"]), Output("What?"))
                for s in self._samples
            ]
        sample = next(s for s in self._samples if s.messages[0] == conversations[0])
        function = sample.messages[1]["tool_calls"][0]["function"]
        arguments = function["arguments"]
        call = ToolCall(function["name"], json.dumps(arguments))
        wrong = ToolCall(function["name"], json.dumps({**arguments, "more": 1}))
        return [self._next(Output(tool_calls=(call,)), Output(tool_calls=(wrong,)))]

    def fill_prompt(self, prefix, suffix):
        return next(s for s in self._samples if (s.prefix, s.suffix) == (prefix, suffix))

    def generate(self, prompts, params, use_tqdm=True):
        if isinstance(prompts[0], Gap):
            return [self._next(Output(text=p.middle), Output(text=f"{p.middle}x")) for p in prompts]
        return [
            self._next(Output(text=f"{s.middle}{self._more}"), Output(text=f"{s.middle}x = 1"))
            for s in self._samples
        ]


MAKES = {**exam.CHATS, **exam.CODE, "tools": lambda rng: tools.lesson(rng, held_out=True)}


@pytest.mark.parametrize("subject", ["colour", "video", "sums", "tools", *exam.CODE])
def test_three_of_four_answers_are_right(subject):
    key = {"prefix": "gaps"}.get(subject, subject)
    rng, make = random.Random(f"exam 5 {key}"), MAKES[key]
    pupil = Pupil([make(rng) for _ in range(8)], more="(1)" if subject == "prefix" else "")
    if subject == "tools":
        shares = exam.examine(pupil, count=8, subjects=("tools", "arguments"), seed=5)
        assert shares == {"tools": 1.0, "arguments": 0.75}
    else:
        assert exam.examine(pupil, count=8, subjects=(subject,), seed=5) == {subject: 0.75}


def test_breaking_a_part_changes_nothing_else(tmp_path):
    whole = tiny.write_vision_model(tmp_path / "whole", "vl_moe")
    flat = exam.break_mrope(whole, tmp_path / "flat")
    rope = json.loads((flat / "config.json").read_text())["text_config"]["rope_scaling"]
    assert rope["mrope_section"] == [16, 0, 0]
    assert (flat / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    before = Checkpoint(whole)
    after = Checkpoint(exam.break_deepstack(whole, tmp_path / "shallow"))
    assert set(after.names) == set(before.names)
    for name in before.names:
        gone = "deepstack_merger_list" in name and "linear_fc2" in name
        wanted = np.zeros_like(before.tensor(name)) if gone else before.tensor(name)
        np.testing.assert_array_equal(after.tensor(name), wanted)
