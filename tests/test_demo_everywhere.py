"""The demo gives the same answer through every door: the command line, Python, the server, orbax,
a mesh of eight devices, and a batch."""

import base64
import dataclasses
import io
import json
import pathlib
import random

import demo_model
import numpy as np
import pytest
from batch_samples import line, read, write
from demo import cells
from PIL import Image
from serving import ask

import qwen_jax as qj
from qwen_jax import cli
from qwen_jax.weights import checkpoint

ROOT = pathlib.Path(__file__).parents[1]
QUESTION = "What is at the top left?"
PREFIX = "def largest(prices):\n    result = prices[0]\n    for price in prices:\n        "
SUFFIX = "\n            result = price\n    return result\n"
ANSWER, FILLED = "A green ring.", "if price > result:"


@pytest.fixture(autouse=True)
def few_shapes(process_as_before):
    with demo_model.few_shapes():
        yield


@pytest.fixture
def files(tmp_path):
    """A picture, and code with a gap."""
    Image.fromarray(demo_model.picture()).save(tmp_path / "a.png")
    (tmp_path / "a.py").write_text(f"{PREFIX}<FILL>{SUFFIX}")
    return tmp_path


def chat(picture) -> list[dict]:
    content = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


def told(llm) -> tuple[str, str]:
    """The answer about the picture, and what fills the gap."""
    (answer,) = llm.chat(chat(demo_model.picture()), demo_model.GREEDY, use_tqdm=False)
    (filled,) = llm.fill(PREFIX, SUFFIX, demo_model.GREEDY)
    return answer.outputs[0].content, filled.outputs[0].text


def said(capsys, *argv: str) -> str:
    options = ["--mesh=tensor=1", "--max-num-seqs=32", "--max-model-len=512", "--temperature=0"]
    assert cli.main([*argv, *options, "--max-tokens=48", "--compilation-cache=off"]) == 0
    found = capsys.readouterr()
    assert "this is the demo" in found.err
    return found.out.rstrip("\n")


def test_python_the_command_line_and_the_server_say_the_same(files, capsys):
    answer, filled = told(demo_model.shared_llm())
    assert (answer, filled) == (ANSWER, FILLED)
    picture = str(files / "a.png")
    assert said(capsys, "chat", "--prompt", QUESTION, "--image", picture) == answer
    assert said(capsys, "fill", "--file", str(files / "a.py")) == filled
    encoded = base64.b64encode((files / "a.png").read_bytes()).decode()
    parts = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
        {"type": "text", "text": QUESTION},
    ]
    body = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0}
    found = ask(demo_model.shared_llm(), "POST", "/v1/chat/completions", json=body).json()
    assert found["choices"][0]["message"]["content"] == answer
    body = {"model": "tiny", "prompt": PREFIX, "suffix": SUFFIX, "temperature": 0}
    found = ask(demo_model.shared_llm(), "POST", "/v1/completions", json=body).json()
    assert found["choices"][0]["text"] == filled


def test_the_readme_shows_what_its_first_command_prints():
    llm, shapes = demo_model.shared_llm(), Image.open(ROOT / "notebooks" / "shapes.png")
    longer = dataclasses.replace(demo_model.GREEDY, max_tokens=160)
    until = dataclasses.replace(longer, stop=["def"])
    (written,) = llm.generate("def quicksort", until, use_tqdm=False)
    question = [{"type": "image", "image": np.asarray(shapes.convert("RGB"))}]
    question.append({"type": "text", "text": "Describe the picture."})
    (seen,) = llm.chat([{"role": "user", "content": question}], longer, use_tqdm=False)
    (filled,) = llm.fill(PREFIX, SUFFIX, longer)
    readme = (ROOT / "README.md").read_text()
    printed = [written.outputs[0].text, seen.outputs[0].content, filled.outputs[0].text]
    assert "\n".join(f"{text.rstrip()}\n" for text in printed[:2]) + printed[2] in readme


def test_converted_and_on_eight_devices_it_says_the_same(files):
    out = files / "converted"
    checkpoint.convert(qj.DEMO, out)
    wanted = told(demo_model.shared_llm())
    assert wanted == (ANSWER, FILLED)
    assert told(demo_model.open_llm(out, mesh="tensor=1")) == wanted
    assert told(demo_model.open_llm(out, mesh="expert=8")) == wanted


def test_a_batch_says_the_same(files):
    encoded = io.BytesIO()
    Image.fromarray(demo_model.picture()).save(encoded, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": QUESTION},
    ]
    greedy = {"temperature": 0, "max_tokens": 48}
    lines = [
        line("seen", body={"messages": [{"role": "user", "content": parts}], **greedy}),
        line("gap", url="/v1/completions", body={"prompt": PREFIX, "suffix": SUFFIX, **greedy}),
    ]
    write(files / "in.jsonl", lines)
    llm = demo_model.shared_llm()
    qj.run_batch(llm, files / "in.jsonl", files / "out.jsonl", model_names=[llm.name])
    replies = {
        x["custom_id"]: x["response"]["body"]["choices"][0] for x in read(files / "out.jsonl")
    }
    answer, filled = told(llm)
    assert replies["id-seen"]["message"]["content"] == answer == ANSWER
    assert replies["id-gap"]["text"] == filled == FILLED


def test_a_tool_is_called_and_its_answer_told():
    tool = {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    messages = [{"role": "user", "content": "What is the weather in Oslo?"}]
    llm = demo_model.shared_llm()
    (result,) = llm.chat(messages, demo_model.GREEDY, tools=[tool], use_tqdm=False)
    (call,) = result.outputs[0].tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Oslo"})
    function = {"name": call.name, "arguments": json.loads(call.arguments)}
    messages += [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "content": "12 degrees"},
    ]
    (result,) = llm.chat(messages, demo_model.GREEDY, tools=[tool], use_tqdm=False)
    assert result.outputs[0].content == "It is 12 degrees in Oslo."


def test_a_video_is_seen_second_by_second():
    things = [("circle", "red"), ("square", "blue")]
    rng = random.Random(0)
    stills = [cells.draw({0: thing}, rng, side=1) for thing in things]
    frames = np.repeat(np.stack(stills), 4, axis=0)
    clip = {"type": "video", "video": (frames, {"fps": 4.0})}
    for question, wanted in (
        ("What is seen first?", "A red circle."),
        ("What is seen last?", "A blue square."),
    ):
        content = [clip, {"type": "text", "text": question}]
        (result,) = demo_model.shared_llm().chat(
            [{"role": "user", "content": content}], demo_model.GREEDY, use_tqdm=False
        )
        assert result.outputs[0].content == wanted
