"""`qwen-jax batch`: its options, and a whole batch on small models."""

import base64
import io
import re
import sys

import numpy as np
import pytest
import tiny_llm
import vision_model
from batch_samples import line, read, without_times, write
from fake_llm import FakeLLM

import qwen_jax as qj
from qwen_jax import cli
from qwen_jax.commands import batch
from qwen_jax.commands.parser import Parser
from qwen_jax.openai.fetch import Fetcher
from qwen_jax.openai.media import MediaSource
from qwen_jax.requests import SamplingParams

COMPLETIONS = "/v1/completions"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "a model is needed"),
        (["--model", "M"], "-i and -o are needed"),
        (["--model", "M", "-i", "x.jsonl"], "-i and -o are needed"),
        (["--model", "M", "-i", "x", "-o", "y", "--retry-errors"], "needs --resume"),
        (["--model", "M", "-i", "x", "-o", "y", "--in-flight", "0"], "--in-flight 0"),
        (["--model", "M", "-i", "x", "-o", "y", "--shard", "2/2"], "shard 2/2 does not exist"),
        (["--model", "M", "-i", "none.jsonl", "-o", "y.jsonl"], "no such file of lines"),
        (
            ["--model", "M", "-i", "x", "-o", "y", "--allowed-local-media-path", "/nowhere"],
            "is no directory",
        ),
    ],
)
def test_wrong_options_are_one_line_before_the_model_is_loaded(argv, said, capsys):
    assert cli.main(["batch", *argv]) == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pydantic", None)
    assert cli.main(["batch", "--model", "M", "-i", "x", "-o", "y"]) == 2
    assert "qwen-jax[batch]" in capsys.readouterr().err


def arguments(*argv):
    parser = Parser("qwen-jax batch", "", "")
    batch.add_options(parser)
    return parser.parse_args(["--model", "M", *argv])


def test_what_became_of_the_lines_is_said_and_is_the_status(tmp_path, capsys):
    source = MediaSource(Fetcher((), most=0, timeout=1.0), None, {})
    path = write(tmp_path / "in.jsonl", [line(0), line(1)])
    args = arguments("-i", str(path), "-o", str(tmp_path / "out.jsonl"), "--resume")
    assert batch.work(args, FakeLLM(), source) == 0
    assert "2 answered, 0 failed, 0 left, of 2 lines" in capsys.readouterr().err
    path.write_bytes(b"nonsense\n" + path.read_bytes())
    args = arguments("-i", str(path), "-o", str(tmp_path / "b.jsonl"), "--resume")
    for resumed in (False, True):
        assert batch.work(args, FakeLLM(), source) == 1
        err = capsys.readouterr().err
        assert "2 answered, 1 failed, 0 left" in err
        assert ("3 of them by earlier runs" in err) == resumed


# ---- on a small model ----------------------------------------------------------------------------


@pytest.fixture
def few_shapes(process_as_before):
    with tiny_llm.few_shapes():
        yield


def completion(i, **body):
    body = {"prompt": "def f(", "max_tokens": 12, **body}
    return line(i, url=COMPLETIONS, body=body)


def test_a_batch_says_what_llm_says(few_shapes, tmp_path, capsys):
    llm = tiny_llm.shared_llm()
    chats = [[{"role": "user", "content": text}] for text in ("hello", "one two", "print")]
    greedy = {"temperature": 0, "max_tokens": 12}
    lines = [line(i, body={"messages": chat, **greedy}) for i, chat in enumerate(chats)]
    lines += [completion("seeded", seed=5), completion("free"), completion("logprobs", logprobs=1)]
    lines += [completion("long", prompt="x " * 400), completion("other", model="gpt")]
    write(tmp_path / "in.jsonl", lines)
    argv = [
        "batch", "--model", llm.name, "--mesh=expert=1", "--max-model-len=256",
        "--page-size=16", "--max-num-seqs=4", "--compilation-cache=off",
        "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"),
    ]  # fmt: skip
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert "6 answered, 2 failed, 0 left, of 8 lines" in err
    assert re.search(r"^Prompt: \d+ tokens.*Generation: \d+ tokens", err, re.MULTILINE)
    found = without_times(read(tmp_path / "out.jsonl"))
    replies = {id: x["response"]["body"]["choices"][0] for id, x in found.items()}
    params = SamplingParams(temperature=0, max_tokens=12)
    wanted = llm.chat(chats, params, use_tqdm=False)
    for i, result in enumerate(wanted):
        assert replies[f"id-{i}"]["message"]["content"] == result.outputs[0].text
    default = llm.get_default_sampling_params()
    seeded = SamplingParams(**{**vars(default), "seed": 5, "max_tokens": 12})
    (result,) = llm.generate("def f(", seeded, use_tqdm=False)
    assert replies["id-seeded"]["text"] == result.outputs[0].text
    errors = {x["custom_id"]: x["response"]["body"]["error"] for x in read(
        tmp_path / "out.errors.jsonl")}  # fmt: skip
    assert "max_model_len is 256" in errors["id-long"]["message"]
    assert errors["id-other"]["code"] == "model_not_found"
    # Answers do not depend on the neighbours, nor on which process gives them.
    options = {"model_names": [llm.name], "in_flight": 1}
    qj.run_batch(llm, tmp_path / "in.jsonl", tmp_path / "alone.jsonl", **options)
    assert without_times(read(tmp_path / "alone.jsonl")) == found


def logprobs(line):
    (choice,) = line["response"]["body"]["choices"]
    return np.array([entry["logprob"] for entry in choice["logprobs"]["content"]])


def picture(color):
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGB", (64, 96), color).save(data, "PNG")
    return data.getvalue()


def test_pictures_are_seen_from_where_they_may_come(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    urls = {
        "data": "data:image/png;base64," + base64.b64encode(picture("red")).decode(),
        "file": f"file://{tmp_path}/red.png",
        "blue": "data:image/png;base64," + base64.b64encode(picture("blue")).decode(),
        "etc": "file:///etc/passwd",
        "http": "http://127.0.0.1/red.png",
    }
    content = {name: [{"type": "image_url", "image_url": {"url": url}}, {"type": "text",
               "text": "what"}] for name, url in urls.items()}  # fmt: skip
    lines = [
        line(name, body={"messages": [{"role": "user", "content": parts}], "temperature": 0,
             "max_tokens": 8, "logprobs": True})
        for name, parts in content.items()
    ]  # fmt: skip
    media = MediaSource(Fetcher((), most=0, timeout=1.0), tmp_path, {"image": 1, "video": 0})
    source = write(tmp_path / "in.jsonl", lines)
    summary = qj.run_batch(vision_model.shared_llm(), source, tmp_path / "out.jsonl", media=media)
    assert (summary.completed, summary.failed) == (3, 2)
    seen = {x["custom_id"]: logprobs(x) for x in read(tmp_path / "out.jsonl")}
    np.testing.assert_allclose(seen["id-data"], seen["id-file"], atol=1e-4)
    assert np.abs(seen["id-data"] - seen["id-blue"]).max() > 1e-2
    errors = {x["custom_id"]: x["response"]["body"]["error"]["message"] for x in read(
        tmp_path / "out.errors.jsonl")}  # fmt: skip
    assert "no such file below the folder" in errors["id-etc"]
    assert "nothing is fetched from '127.0.0.1'" in errors["id-http"]
