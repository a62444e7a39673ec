"""What the demo learns: nothing held out, batches that repeat, the prompts that serving makes."""

import json
import random
import re

import jax
import numpy as np
import pytest
from demo import (
    chats,
    code,
    encode,
    files,
    functions,
    kernels,
    lessons,
    packing,
    pictures,
    tokenizer,
    tools,
    videos,
)
from demo.sample import Chat, Gap
from demo.split import is_held_out
from demo.words import DIGITS, PLACES, SHAPES

from qwen_jax.inputs import Inputs
from qwen_jax.picture_inputs import PictureInputs
from qwen_jax.runtime import Buckets
from qwen_jax.weights import derive
from qwen_jax.weights.hf_config import from_hf

LINES = packing.Shape.of(2)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    directory = tmp_path_factory.mktemp("demo")
    files.write(tokenizer.train(0), directory)
    return encode.Encoder(directory, from_hf(json.loads((directory / "config.json").read_text())))


@pytest.mark.parametrize(
    "lesson",
    [pictures.lesson, pictures.places_lesson, pictures.alike_lesson, pictures.shapes_lesson],
)
def test_no_held_out_thing_is_in_a_picture_to_learn_from(lesson):
    rng, kinds = random.Random(1), set()
    for _ in range(200):
        for place, (what, *more) in enumerate(lesson(rng).seen):
            if what != "nothing":
                kinds.add(what)
                assert not is_held_out(what, more[0], place)
    assert kinds == {*SHAPES, *DIGITS}


@pytest.mark.parametrize("kind", ["colour", "shape", "place", "digit"])
def test_an_examination_asks_for_the_held_out_thing(kind):
    rng = random.Random(2)
    for _ in range(50):
        sample = pictures.examination(rng, kind)
        question, answer = sample.messages[0]["content"][1]["text"], sample.messages[1]["content"]
        held = [
            (what, more[0], PLACES[place])
            for place, (what, *more) in enumerate(sample.seen)
            if what != "nothing" and is_held_out(what, more[0], place)
        ]
        ((what, colour, where),) = held
        words = set(question.rstrip("?").split()) | set(answer.lower().rstrip(".").split())
        expected = {"colour": colour, "shape": what, "digit": what, "place": what}[kind]
        assert {expected, *where.split()} <= words


def test_things_of_few_colours_are_told_apart_by_their_shapes():
    rng, counts = random.Random(5), set()
    for _ in range(50):
        sample = pictures.alike_lesson(rng)
        things = dict(zip(sample.seen, PLACES, strict=True))
        things.pop(("nothing",))
        assert len(things) == sum(words != ("nothing",) for words in sample.seen)
        counts.add(len({colour for _, colour in things}))
        question, answer = (message["content"] for message in sample.messages[-2:])
        asked = question.removeprefix("Where are these: ").removesuffix("?").split(", ")
        wanted = {f"{colour} {what}": where for (what, colour), where in things.items()}
        assert sorted(asked) == sorted(wanted)
        assert answer == f"{', '.join(f'{name}: {wanted[name]}' for name in asked)}."
    assert counts == {1, 2}


def test_a_shape_is_asked_for_where_it_is_alone():
    rng, kinds = random.Random(6), set()
    for _ in range(50):
        sample = pictures.shapes_lesson(rng)
        there = [(*words, where) for words, where in zip(sample.seen, PLACES, strict=True)]
        shapes = [what for what, *_ in there]
        lone = {each[0]: each for each in there if len(each) == 3 and shapes.count(each[0]) == 1}
        texts = [m["content"] for m in sample.messages]
        texts[0] = texts[0][1]["text"]
        for question, answer in zip(texts[::2], texts[1::2], strict=True):
            begins, asked = re.fullmatch(r"(.*?)(\w+(?:, \w+)*)\?", question).groups()
            kinds.add(begins)
            if begins == "What colour is the ":
                assert answer == f"{lone[asked][1].capitalize()}."
            elif begins == "Where is the ":
                assert answer == f"At the {lone[asked][2]}."
            elif begins == "Which colours have these: ":
                told = {what: lone[what][1] for what in asked.split(", ")}
                assert set(told) == set(lone)
                assert answer == f"{', '.join(': '.join(pair) for pair in told.items())}."
            else:
                assert answer == "Nothing."
    assert len(kinds) >= 3


def test_what_is_told_last_is_all_that_is_in_the_picture():
    rng, kinds = random.Random(4), set()
    for _ in range(50):
        sample = pictures.lesson(rng)
        question, answer = (message["content"] for message in sample.messages[-2:])
        assert [" ".join(words) for words in sample.where] == list(PLACES)
        things = [" ".join(reversed(words)) for words in sample.seen]
        found = dict(zip(PLACES, things, strict=True))
        if question == "Describe the picture.":
            told = [f"{place}: {thing}" for place, thing in found.items()]
            assert answer == f"I see: {', '.join(told)}."
        elif question == "List all things.":
            told = [f"{thing}: {place}" for place, thing in found.items() if thing != "nothing"]
            assert answer == f"There are: {', '.join(told)}."
        kinds.add(question)
    assert {"Describe the picture.", "List all things."} < kinds


def test_every_stage_has_its_mixture():
    begins = [step for step, _ in lessons.STAGES]
    assert begins == sorted({0, *begins})
    for step, mixture in lessons.STAGES:
        assert lessons.mixture_at(step) == mixture
        assert step == 0 or lessons.mixture_at(step - 1) != mixture
    assert set(lessons.STAGES[-1][1]) == set(lessons.LESSONS)
    assert lessons.mixture_at(0, ["sums", "tools"]) == {
        name: lessons.STAGES[-1][1][name] for name in ("sums", "tools")
    }
    with pytest.raises(ValueError, match=r"lessons \['summs'\] are unknown; there are pictures"):
        lessons.mixture_at(0, ["summs"])


@pytest.mark.parametrize("held_out", [False, True])
def test_sums_and_calls_keep_to_their_side(held_out):
    rng = random.Random(3)
    for _ in range(100):
        question = chats.sums(rng, held_out=held_out).messages[0]["content"]
        a, sign, b = question.removeprefix("What is ").rstrip("?").split()
        assert is_held_out("sum", sign == "+", int(a), int(b)) == held_out
        for message in tools.lesson(rng, held_out=held_out).messages:
            for call in message.get("tool_calls", ()):
                function = call["function"]
                key = (function["name"], *function["arguments"].values())
                assert is_held_out(*key) == held_out


def test_a_gap_to_examine_with_is_from_another_file_and_named_elsewhere():
    rng, seen = random.Random(4), code.sources(held_out=False)
    for _ in range(20):
        gap = code.gap(rng, held_out=True)
        whole = gap.prefix + gap.middle + gap.suffix
        assert not any(whole in text for text in seen)
        assert gap.middle in gap.prefix + gap.suffix


GIVEN = {"a": 7, "b": 3, "many": [5, -2, 9, 5]}
RETURNED = {
    "add": 10, "subtract": 4, "multiply": 21, "divide": 7 / 3, "is_equal": False,
    "is_smaller": False, "swap": (3, 7), "larger": 7, "smaller": 3, "is_even": False,
    "is_odd": True, "double": 14, "square": 49, "negate": -7, "absolute": 7, "factorial": 5040,
    "fibonacci": 13, "first": 5, "last": 5, "is_empty": False, "count": 4, "average": 4.25,
    "backwards": [5, 9, -2, 5], "total": 17, "largest": 9, "smallest": -2, "contains": False,
    "positive": [5, 9, 5], "doubled": [10, -4, 18, 10], "squares": [25, 4, 81, 25],
    "quicksort": [-2, 5, 5, 9],
}  # fmt: skip


def test_small_functions_do_what_their_names_say():
    found = {}
    for form in functions.FORMS:
        world = {}
        exec(form.format(a="a", b="b", many="many", one="one"), world)
        (name,) = set(world) - {"__builtins__"}
        code = world[name].__code__
        found[name] = world[name](*(GIVEN[arg] for arg in code.co_varnames[: code.co_argcount]))
    assert found == RETURNED


@pytest.mark.parametrize("held_out", [False, True])
def test_a_hole_is_in_a_function_of_its_side(held_out):
    rng, kinds = random.Random(6), set()
    for _ in range(50):
        hole = functions.gap(rng, held_out=held_out)
        whole = hole.prefix + hole.middle + hole.suffix
        kinds.add(hole.middle.isidentifier())
        assert whole.count("def ") == 1 or not held_out
        compile(whole, "whole", "exec")
    assert kinds == {False, True}
    learned = {functions.function(rng) for _ in range(300)}
    assert not learned & {functions.function(rng, held_out=True) for _ in range(300)}


def test_the_checkpoint_will_have_at_most_twelve_megabytes(encoder):
    assert 2 * derive.count(encoder.config) < 12_000_000
    assert encoder.config.text.moe_intermediate_size != encoder.config.text.hidden_size


@pytest.mark.parametrize("name", list(lessons.LESSONS))
def test_hardly_a_sample_is_too_long_for_a_line(encoder, name):
    rng = random.Random(8)
    sizes = [len(encoder.encode(lessons.LESSONS[name](rng)).tokens) for _ in range(100)]
    assert sum(size > kernels.TEXT_LINE for size in sizes) <= 5


def test_a_batch_follows_from_seed_and_step(encoder):
    one, same, other = (packing.make(encoder, LINES, seed=5, step=step) for step in (3, 3, 4))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert (one.tokens != other.tokens).any()


def test_what_is_learned_is_the_next_token_of_the_same_row(encoder):
    batch = packing.make(encoder, LINES, seed=6, step=0, mixture={"tools": 1.0, "gaps": 1.0})
    real = batch.weights > 0
    at, targets = batch.learned[real], batch.targets[real]
    assert real.sum() > 20
    np.testing.assert_array_equal(batch.tokens[at + 1], targets)
    row = np.searchsorted(batch.row_starts[1:], at, side="right")
    assert (at + 1 < batch.row_starts[row + 1]).all()


def test_a_row_of_the_tower_tells_what_its_patches_show(encoder):
    samples = [make(random.Random(4)) for make in (pictures.lesson, videos.lesson)]
    wanted = []
    for rng in (random.Random(3), None):
        packer = packing.Packer(encoder.config, LINES, rng)
        assert all(packer.put(encoder.encode(sample)) for sample in samples)
        rows = packer.batch().shown.reshape(-1, kernels.PATCH_LINE // 4, packing.WORDS)
        told = [[encoder.tokenizer.decode(r[r >= 0]).split() for r in line] for line in rows]
        wanted.append(told)
        for line, sample in zip(told, samples, strict=False):
            seen = [list(words) for words in sample.seen]
            assert line == seen + [[]] * (len(line) - len(seen))
        assert not any(words for line in told[len(samples) :] for words in line)
    assert wanted[0] == wanted[1]


def test_tokens_of_a_picture_are_reordered_with_all_that_belongs_to_them(encoder):
    sample = encoder.encode(pictures.lesson(random.Random(9)))
    facts = {}
    for name, rng in (("learning", random.Random(3)), ("serving", None)):
        packer = packing.Packer(encoder.config, LINES, rng)
        assert packer.put(sample)
        batch = packer.batch()
        said = {}
        for at, word, own in zip(batch.learned, batch.targets, batch.sample, strict=True):
            if own < 0 and batch.source[at] >= 0:
                said.setdefault(int(at), []).append(int(word))
        facts[name] = [
            (int(batch.source[at]), *batch.positions[:, at].tolist(), *sorted(words))
            for at, words in sorted(said.items())
        ]
    assert len(facts["serving"]) == 9
    assert sorted(facts["learning"]) == sorted(facts["serving"]) != facts["learning"]
    assert facts["serving"] == sorted(facts["serving"])


@pytest.mark.parametrize("name", list(lessons.LESSONS))
def test_training_sees_the_prompt_that_serving_makes(encoder, name):
    inputs = Inputs(
        encoder.tokenizer,
        encoder.template,
        PictureInputs(
            encoder.config,
            encoder.tokenizer,
            encoder.rules,
            options=None,
            video_form="transformers-4.57",
            buckets=Buckets(),
            max_model_len=1024,
        ),
        vocab_size=tokenizer.SIZE,
        max_model_len=1024,
        most_tokens=1024,
    )
    rng = random.Random(7)
    for _ in range(8):
        sample = lessons.LESSONS[name](rng)
        encoded = encoder.encode(sample)
        first = int(np.argmax(encoded.learned))
        if isinstance(sample, Chat):
            options = {"tools": list(sample.tools) or None}
            prompt = inputs.chat([sample.messages[0]], options)
            said = encoder.tokenizer.decode(encoded.tokens[encoded.learned])
            answers = [m["content"] for m in sample.messages if m["role"] == "assistant"]
            assert "".join(answers) == re.sub("<tool_call>.*</tool_call>", "", said, flags=re.S)
        elif isinstance(sample, Gap):
            wrapped = None if sample.wrapped else False
            prompt = inputs.fill(sample.prefix, sample.suffix, chat_wrapped=wrapped)
        else:
            prompt = inputs.prompt(sample.text[: sample.cut])  # these are not cut at 0
            first = len(prompt.token_ids)
            rest = encoder.tokenizer.decode(
                encoded.tokens[first : len(encoded.tokens) - sample.ends]
            )
            assert rest == sample.text[sample.cut :]
        np.testing.assert_array_equal(encoded.tokens[:first], prompt.token_ids)
        if prompt.vision is not None:
            np.testing.assert_array_equal(
                encoded.positions[:, :first], prompt.vision.positions[:, :first]
            )


def test_a_video_is_told_in_the_seconds_that_the_prompt_shows(encoder):
    rng = random.Random(8)
    for _ in range(20):
        sample = videos.lesson(rng)
        text = encoder.tokenizer.decode(encoder.encode(sample).tokens)
        for message in sample.messages:
            words = str(message["content"]).split()
            if message["role"] == "assistant" and "seconds." in words:
                assert f"<{words[1]} seconds>" in text
