"""What the demo checkpoint knows: held-out questions, and what is lost when a part is broken.

The limits were chosen from what `scripts/eval_demo.py --questions 200 --broken` measured, less what
chance may take from sixty questions.
"""

import json
import pathlib

import demo_model
import pytest
from demo import exam

import qwen_jax as qj

COUNT = 60
# Subject -> the least share of correct answers.
LEAST = {
    "colour": 0.95,
    "shape": 0.95,
    "place": 0.95,
    "count": 0.85,
    "digit": 0.95,
    "video": 0.95,
    "sums": 0.45,
    "facts": 0.95,
    "forms": 0.68,
    "tools": 0.95,
    "arguments": 0.85,
    "bodies": 0.90,
    "holes": 0.68,
}
SEEN = ("colour", "shape", "place")
SEEN_LEAST = 0.97  # of all questions about colours, shapes and places
# "Near chance" is below. Any thing of the picture, whichever is asked for, is the right one of
# sixty shapes in 27 % +- 6 %: a picture has two to seven things.
CHANCE = {"colour": 0.45, "shape": 0.38, "place": 0.30}
QUANTISED_LOSS = 0.05  # of the share of correct answers, at most


@pytest.fixture(scope="module")
def whole():
    """Shares of the demo as it is."""
    return exam.examine(demo_model.shared_llm(), count=COUNT, subjects=tuple(LEAST))


def test_what_it_was_taught_it_answers_about_new_things(whole):
    missed = {subject: share for subject, share in whole.items() if share < LEAST[subject]}
    assert not missed, whole
    assert sum(whole[subject] for subject in SEEN) / len(SEEN) >= SEEN_LEAST


def test_a_gap_is_filled_better_than_from_its_prefix_alone():
    shares = exam.examine(demo_model.shared_llm(), count=COUNT, subjects=("gaps", "prefix"))
    assert shares["gaps"] > max(2 * shares["prefix"], shares["prefix"] + 0.04), shares


@pytest.mark.parametrize("broken", [exam.break_deepstack, exam.break_mrope])
def test_without_a_part_pictures_are_guessed(broken, tmp_path):
    llm = demo_model.open_llm(broken(pathlib.Path(qj.DEMO), tmp_path / "broken"), mesh="tensor=1")
    shares = exam.examine(llm, count=COUNT, subjects=SEEN)
    assert all(shares[subject] <= CHANCE[subject] for subject in SEEN), shares


@pytest.mark.parametrize("quantization", ["fp8", "int8"])
def test_quantised_it_answers_nearly_as_well(whole, quantization):
    llm = demo_model.open_llm(quantization=quantization, mesh="tensor=1")
    shares = exam.examine(llm, count=COUNT, subjects=SEEN)
    lost = {subject: whole[subject] - shares[subject] for subject in SEEN}
    assert max(lost.values()) <= QUANTISED_LOSS, lost


def test_every_expert_is_used():
    llm = demo_model.shared_llm()
    texts = [
        "What is 3 + 4?",
        "Where does Mira live?",
        "Where is the red ring? Which digit is at the top left?",
        "Give apple, river and key as a JSON list.",
        "import os\n\n\ndef main(argv):\n    ",
        "def last(rows):\n    return rows[-1]\n\n\ndef double(x):\n    return 2 * x\n",
    ]
    prompts = [llm.tokenizer.encode(text) for text in texts]
    routed = qj.routing(llm.params, llm.config, prompts, runtime=llm.runtime)
    for layer in range(llm.config.text.num_hidden_layers):
        used = {int(expert) for each in routed for expert in each[layer].reshape(-1)}
        assert used == set(range(llm.config.text.num_experts)), layer


def test_it_is_small_and_whole():
    files = {path.name: path.stat().st_size for path in pathlib.Path(qj.DEMO).iterdir()}
    assert sum(files.values()) < 12e6
    config = json.loads((pathlib.Path(qj.DEMO) / "config.json").read_text())
    assert config["architectures"] == ["Qwen3VLMoeForConditionalGeneration"]
    assert {"model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(files)
