"""`qwen-jax` on a small model: what goes to stdout, what to stderr, and the exit status."""

import dataclasses
import io
import json
import math
import re
from unittest import mock

import pytest
import tiny_llm
from published import FP8_BYTES, TOTALS

from qwen_jax import cli
from qwen_jax.llm import LLM
from qwen_jax.requests import SamplingParams
from qwen_jax.roofline import Machine

FOOTER = re.compile(
    r"^Prompt: (\d+) tokens, [\d.]+ tokens-per-sec / "
    r"Generation: (\d+) tokens, [\d.]+ tokens-per-sec / Peak memory: [\d.]+ GB$"
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=20)
PROMPT = "def f("


@pytest.fixture(autouse=True)
def few_shapes(process_as_before):
    with tiny_llm.few_shapes():
        yield


@pytest.fixture
def call(capsys):
    """Runs a command on the small model; returns its status, stdout and stderr."""

    def call(name, *argv, model=None, machine=True):
        options = ["--model", str(model or tiny_llm.directory())]
        if machine:
            options += ["--mesh=expert=1", "--max-model-len=256", "--page-size=16"]
            options += ["--compilation-cache=off"]
        if machine and name != "bench":
            options += ["--max-num-seqs=4"]
        status = cli.main([name, *options, *argv])
        return status, *capsys.readouterr()

    return call


@pytest.fixture(scope="module")
def llm():
    return tiny_llm.shared_llm()


@pytest.fixture(scope="module")
def expected(llm):
    return llm.generate(PROMPT, GREEDY, use_tqdm=False)[0].outputs[0]


GREEDILY = ("--temperature=0", "--max-tokens=20")


# ---- generate ------------------------------------------------------------------------------------


def test_generate_streams_the_text_and_says_the_rest_on_stderr(call, expected):
    status, out, err = call("generate", "--prompt", PROMPT, *GREEDILY)
    assert (status, out) == (0, expected.text)
    lines = err.splitlines()
    plan = next(i for i, line in enumerate(lines) if "contexts up to 256" in line)
    load = next(i for i, line in enumerate(lines) if re.match(r"load: .* GB/s$", line))
    assert plan < load
    assert any(line.startswith("dtype: float32 instead of bfloat16") for line in lines[:plan])
    assert FOOTER.match(lines[-1]).groups() == ("4", "20")


def test_json_is_one_object_per_result(call, llm, expected):
    status, out, err = call("generate", "--prompt", PROMPT, "--prompt", "x", *GREEDILY, "--json")
    first, second = map(json.loads, out.splitlines())
    assert status == 0
    assert (first["prompt"], second["prompt"]) == (PROMPT, "x")
    assert first["prompt_token_ids"] == llm.tokenizer.encode(PROMPT)
    (output,) = first["outputs"]
    assert output["token_ids"] == expected.token_ids
    assert (output["text"], output["finish_reason"]) == (expected.text, "length")
    assert output["logprobs"] is None
    assert FOOTER.match(err.splitlines()[-1]).groups() == ("5", "40")


def test_several_texts_have_titles_on_stderr(call, expected):
    status, out, err = call("generate", "--prompt", PROMPT, *GREEDILY, "--n=2")
    assert (status, out) == (0, f"{expected.text}\n" * 2)
    titles = [line for line in err.splitlines() if line.startswith("==>")]
    assert titles == ["==> prompt 0, completion 0", "==> prompt 0, completion 1"]


def test_quiet_leaves_the_text_alone(call, expected, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    assert call("generate", "--prompt=-", *GREEDILY, "--quiet") == (0, expected.text, "")


def test_options_go_over_the_checkpoints_own(call):
    with mock.patch("qwen_jax.commands.completion.stream", return_value=0) as stream:
        call("generate", "--prompt", PROMPT, "--top-p=0.5", "--stop=a", "--seed=7")
    params = stream.call_args.args[3]
    own = SamplingParams(temperature=0.6, top_k=20, top_p=0.95)  # generation_config.json
    assert params == dataclasses.replace(own, top_p=0.5, stop=["a"], seed=7)


def test_ctrl_c_keeps_the_text_and_ends_with_130(call, expected):
    whole = LLM.stream

    def interrupted(self, *args, **options):
        for i, event in enumerate(whole(self, *args, **options)):
            if i == 3:
                raise KeyboardInterrupt
            yield event

    with mock.patch.object(LLM, "stream", interrupted):
        status, out, err = call("generate", "--prompt", PROMPT, *GREEDILY)
    assert status == 130
    assert out
    assert expected.text.startswith(out)
    assert FOOTER.match(err.splitlines()[-1])


def test_errors_of_the_model_are_one_line(call, tmp_path):
    status, out, err = call("generate", "--prompt", PROMPT * 100, "--quiet")
    assert (status, out) == (2, "")
    assert re.match(r"qwen-jax: error: prompt has \d+ tokens, max_model_len is 256: raise", err)
    status, out, err = call("generate", "--prompt=x", "--quiet", model=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith(f"qwen-jax: error: {tmp_path}: no checkpoint")
    status, out, err = call("generate", "--prompt=x", "--mesh=expert=3", "--quiet")
    assert (status, err.count("\n")) == (2, 1)


# ---- chat and fill -------------------------------------------------------------------------------


def test_chat_answers_one_question(call, llm):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "hello"}]
    (result,) = llm.chat(messages, GREEDY, use_tqdm=False)
    asked = ("--system=s", "--prompt=hello", *GREEDILY)
    assert call("chat", *asked)[:2] == (0, result.outputs[0].content)
    status, out, err = call("chat", *asked, "--json")
    (output,) = json.loads(out)["outputs"]
    assert (status, output["content"]) == (0, result.outputs[0].content)
    assert (output["reasoning_content"], output["tool_calls"]) == (None, [])
    assert FOOTER.match(err.splitlines()[-1])


def test_chat_needs_a_template(call):
    status, out, err = call(
        "chat", "--prompt=x", "--quiet", model=tiny_llm.directory(tokenizer=False)
    )
    assert (status, out) == (2, "")
    assert "no chat template: use qwen-jax generate" in err


@pytest.mark.parametrize("two_files", [False, True])
def test_fill_writes_the_middle_alone(call, llm, tmp_path, two_files):
    one = SamplingParams(temperature=0.0, max_tokens=1)
    (result,) = llm.fill("def f(", "return x\n", one, path="a.py")
    for name, text in (("all", "def f(<FILL>return x\n"), ("a", "def f("), ("b", "return x\n")):
        (tmp_path / name).write_text(text)
    files = ("--prefix-file", str(tmp_path / "a"), "--suffix-file", str(tmp_path / "b"))
    given = files if two_files else ("--file", str(tmp_path / "all"))
    found = call("fill", *given, "--path=a.py", "--temperature=0", "--max-tokens=1")
    assert found[:2] == (0, result.outputs[0].text)
    _, out, _ = call("fill", *given, "--path=a.py", "--temperature=0", "--max-tokens=1", "--json")
    assert json.loads(out)["prompt_token_ids"] == result.prompt_token_ids


# ---- convert and info ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "model"
    assert cli.main(["convert", "--model", str(tiny_llm.directory()), "--out", str(out)]) == 0
    return out


def test_a_converted_checkpoint_says_the_same(call, converted, expected):
    found = call("generate", "--prompt", PROMPT, *GREEDILY, model=converted)
    assert found[:2] == (0, expected.text)


def test_convert_shows_its_progress_and_refuses_to_overwrite(call, converted, tmp_path):
    status, out, err = call("convert", "--out", str(tmp_path / "again"), machine=False)
    assert (status, out) == (0, "")
    assert re.search(r"^convert: [\d.]+ MB in [\d.]+ s, [\d.]+ GB/s$", err, re.M)
    assert f"qwen-jax chat --model {tmp_path / 'again'}" in err
    status, _, err = call("convert", "--out", str(converted), machine=False)
    assert status == 2
    assert "exists and is a finished conversion" in err


def test_info_reads_the_same_of_files_and_of_their_conversion(call, converted):
    weights = (tiny_llm.directory() / "model.safetensors").stat().st_size
    reports = []
    for model in (tiny_llm.directory(), converted):
        status, out, err = call("info", "--json", model=model)
        assert (status, err) == (0, "")
        reports.append(json.loads(out))
    of_files, of_conversion = reports
    size = of_files["bytes"]["total"]
    assert of_files["bytes"] == {"float32": size, "total": size, "from": "safetensors headers"}
    assert 0 < weights - size < 8192  # the header
    assert of_conversion["bytes"] == {"float32": size, "total": size, "from": "manifest"}
    attention = 64 * (128 + 64 + 64) + 128 * 64 + 2 * 32
    each = attention + 64 * 8 + 3 * 64  # with the router and norms
    expert, vocabulary = 3 * 64 * 32, 320 * 64
    assert of_files["parameters"] == {
        "total": each + 8 * expert + 2 * vocabulary,
        "active": each + 2 * expert + vocabulary,
    }
    assert size == 4 * of_files["parameters"]["total"]
    differ = {"model", "form", "bytes", "machine"}
    assert {k: v for k, v in of_files.items() if k not in differ} == {
        k: v for k, v in of_conversion.items() if k not in differ
    }


def test_info_knows_the_text_side(call):
    _, out, _ = call("info", "--json")
    report = json.loads(out)
    assert report["tokenizer"] == {"size": 313, "special": 14}
    assert (report["chat_template"], report["tool_format"]) == (True, "hermes")
    assert report["generation_config"]["top_k"] == 20
    _, out, _ = call("info", "--json", model=tiny_llm.directory(tokenizer=False))
    report = json.loads(out)
    assert (report["tokenizer"], report["chat_template"], report["tool_format"]) == (
        None,
        False,
        None,
    )


def test_info_needs_no_weights(call, tmp_path):
    (tmp_path / "config.json").write_text((tiny_llm.directory() / "config.json").read_text())
    _, out, _ = call("info", model=tmp_path)
    assert "(config.json)" in out.splitlines()[0]
    _, out, _ = call("info", "--override=num_hidden_layers=3", "--json", model=tmp_path)
    assert json.loads(out)["layers"] == 3


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-30B-A3B-FP8", "Qwen3-VL-8B-Instruct"])
def test_info_counts_what_is_published(call, name):
    _, out, _ = call("info", "--json", model=name)
    report = json.loads(out)
    assert (report["form"], report["parameters"]["total"]) == ("preset", TOTALS[name][0])
    assert report["vision"] == ({"depth": 27, "hidden_size": 1152} if "VL" in name else None)
    if name.endswith("FP8"):
        assert report["bytes"]["total"] == FP8_BYTES
        assert report["quantization"]["block"] == [128, 128]
        assert report["machine"]["fits"] is False
        assert "such devices hold them with mesh=" in report["machine"]["problem"]


def test_info_counts_equal_the_published_tensors(call, shared_data):
    for path in sorted((shared_data / "tensor_specs").glob("*.json")):
        _, out, _ = call("info", "--json", model=path.stem)
        report, tensors = json.loads(out), json.loads(path.read_text())
        if report["tied_embeddings"]:
            tensors.pop("lm_head.weight", None)
        count = sum(math.prod(shape) for _, shape in tensors.values())
        assert report["parameters"]["total"] == count, path.stem
        assert report["bytes"]["total"] == 2 * count


# ---- bench ---------------------------------------------------------------------------------------


def test_bench_sets_rates_beside_their_bounds(call, monkeypatch):
    monkeypatch.setattr("qwen_jax.roofline.measure", lambda dtype: Machine(1e10, 1e11))
    sizes = ("--batch=4", "--prompt-len=10", "--new-tokens=5", "--repeats=2")
    status, out, _ = call("bench", *sizes, "--max-model-len=256", "--json")
    report = json.loads(out)
    assert status == 0
    assert (report["batch"], report["prompt_len"], report["new_tokens"]) == (4, 10, 5)
    assert report["compile_seconds"] >= 0
    for name, tokens in (("prefill", 40), ("decode", 4)):
        part = report[name]
        assert part["tokens_per_s"] == pytest.approx(tokens / part["seconds"])
        least = tokens / part["bound_tokens_per_s"]
        assert least == pytest.approx(max(part["gb"] / 10, part["gflop"] / 100))
        assert part["share_of_bound"] == pytest.approx(least / part["seconds"])
        assert 0 < part["share_of_bound"] < 1
    _, out, _ = call("bench", *sizes, "--max-model-len=256")
    assert re.search(r"^decode .* bandwidth$", out, re.M)
