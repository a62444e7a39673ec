"""`qwen-jax`: its options and its errors, none of which needs a model."""

import argparse
import dataclasses
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from qwen_jax import cli, expert_dispatch, runtime, sharding
from qwen_jax.commands import options, output
from qwen_jax.requests import SamplingParams
from qwen_jax.weights import location, quant

ROOT = pathlib.Path(__file__).parents[1]


def fails(capsys, *argv: str) -> str:
    """The one line that a call which must fail prints."""
    assert cli.main(argv) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("qwen-jax: error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("qwen-jax: error: ").rstrip("\n")


def parser(name: str) -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(allow_abbrev=False)
    importlib.import_module(f"qwen_jax.commands.{name}").add_options(found)
    return found


# ---- before JAX is imported ----------------------------------------------------------------------

_PROBE = """
import json, sys
from qwen_jax.cli import main
found = []
for argv in json.loads(sys.argv[1]):
    try:
        found.append(main(argv))
    except SystemExit as error:
        found.append(error.code)
print(json.dumps(found), file=sys.stderr)
print([name for name in ("jax", "numpy", "orbax", "jinja2") if name in sys.modules])
"""


def test_help_and_wrong_options_answer_without_jax(tmp_path):
    commands = [[name, "--help"] for name in cli.COMMANDS]
    wrong = [
        ["generate", "--prompt", "x", "--temprature", "1"],
        ["generate", "--prompt", "x", "--top-p", "1.5"],
        ["batch", "-i", "x", "-o", "y"],
        ["chat", "--dtype", "float64"],
        ["fill", "--model", "m"],
        ["convert", "--model", "m"],
        ["bench", "--batch", "0"],
        ["info"],
        ["nothing"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps([["--help"], ["--version"], *commands, *wrong])],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
    codes = json.loads(done.stderr.splitlines()[-1])
    assert codes == [0, 0, *([0] * len(commands)), *([2] * len(wrong))]
    for name, about in cli.COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", done.stdout, re.M)
        assert f"usage: qwen-jax {name} [OPTIONS]" in done.stdout


def test_a_closed_pipe_ends_quietly():
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "qwen_jax.cli", "--help"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            timeout=60,
            check=False,
        )
    assert (done.returncode, done.stderr) == (141, "")


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["genrate"], "unknown command 'genrate'; did you mean generate?"),
        (["xyz"], "unknown command 'xyz' (see --help)"),
        (["generate", "--temp", "1"], "did you mean --temperature?"),
        (["generate", "--max-new-tokens=5"], "unknown option '--max-new-tokens'; did you mean"),
        (["chat", "hello"], "chat: unknown argument 'hello' (see --help)"),
        (["generate", "--prompt", "-x"], "a value that begins with '-' is written --option=-value"),
        (["generate", "--max-tokens", "many"], "argument --max-tokens: invalid int value: 'many'"),
        (["generate", "--prompt", "x", "--max-tokens", "0"], "max_tokens=0 is not in 1"),
        (["generate", "--model", "m"], "--prompt is missing"),
        (["bench"], "--model with a directory or a hub id, for example"),
        (["generate", "--logit-bias", "5"], "'5' is not ID=NUMBER"),
        (["generate", "--stop-token-ids", "1,b"], "'1,b' is not a list of integers"),
        (["bench", "--override", "layers"], "'layers' is not KEY=VALUE"),
        (["bench", "--kernels", "a="], "'a=' is not OP=NAME"),
        (["bench", "--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["chat", "--json"], "--json and --n need --prompt"),
        (["chat", "--chat-template-kwargs", "[1]"], "is not a JSON object"),
        (["chat", "--chat-template-kwargs", "{"], "not JSON"),
        (["chat", "--tools", "nosuch.json"], "nosuch.json: No such file or directory"),
        (["fill", "--model", "m"], "give --file (with a <FILL> mark)"),
        (["fill", "--file", "a", "--prefix-file", "b"], "not both"),
        (["fill", "--prefix-file", "-", "--suffix-file", "-"], "only one of"),
        (["fill", "--file", "nosuch.py"], "nosuch.py: No such file or directory"),
        (["convert"], "a model is needed: --model with a directory or a hub id"),
        (["convert", "--model", "m"], "--out is missing"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, argv, message):
    assert message in fails(capsys, *argv)


def test_code_needs_one_mark(capsys, tmp_path):
    for text in ("def f():", "<FILL> or <FILL>"):
        (tmp_path / "a.py").write_text(text)
        assert "needs exactly one" in fails(capsys, "fill", "--file", str(tmp_path / "a.py"))


def test_text_must_be_utf8(capsys, tmp_path):
    (tmp_path / "a.py").write_bytes(b"a\xff<FILL>")
    assert "not UTF-8 text (byte 1)" in fails(capsys, "fill", "--file", str(tmp_path / "a.py"))


def test_a_repository_needs_the_path_in_it(capsys, tmp_path):
    (tmp_path / "a.py").write_text("<FILL>")
    found = fails(capsys, "fill", "--file", str(tmp_path / "a.py"), "--repo", "r")
    assert "--repo needs --path" in found


def test_debug_shows_where_an_error_comes_from(capsys):
    assert cli.main(["convert", "--out", "x", "--debug"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("Traceback")
    assert said.splitlines()[-1].startswith("qwen-jax: error: a model is needed")


def test_an_error_of_ours_is_not_hidden(monkeypatch):
    def run(args):
        raise TypeError("a bug")

    monkeypatch.setattr("qwen_jax.commands.info.run", run)
    with pytest.raises(TypeError):
        cli.main(["info"])


def test_ctrl_c_ends_with_130(capsys, monkeypatch):
    def run(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("qwen_jax.commands.info.run", run)
    assert cli.main(["info"]) == 130
    assert "Traceback" not in capsys.readouterr().err


# ---- what options mean ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["generate", "chat", "fill"])
def test_every_sampling_parameter_has_its_option(name):
    given = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "seed": 3,
        "max_tokens": 9,
        "min_tokens": 1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logprobs": 2,
        "prompt_logprobs": 0,
    }
    argv = [f"--{option.replace('_', '-')}={value}" for option, value in given.items()]
    argv += ["--stop=a", "--stop=b", "--stop-token-ids=1,2", "--allowed-token-ids=3"]
    argv += ["--logit-bias=4=-1.5", "--logit-bias=5=2", "--ignore-eos"]
    argv += ["--no-skip-special-tokens", "--include-stop-str-in-output"]
    found = SamplingParams(**options.sampling_options(parser(name).parse_args(argv)))
    assert found == SamplingParams(
        **given,
        stop=["a", "b"],
        stop_token_ids=[1, 2],
        allowed_token_ids=[3],
        logit_bias={4: -1.5, 5: 2.0},
        ignore_eos=True,
        skip_special_tokens=False,
        include_stop_str_in_output=True,
    )
    changed = {f.name for f in dataclasses.fields(found)} - {"structured_outputs"}
    default = SamplingParams()
    assert all(getattr(found, option) != getattr(default, option) for option in changed)


def test_what_is_not_given_is_not_set():
    assert options.sampling_options(parser("generate").parse_args([])) == {}


def test_every_argument_of_the_llm_has_its_option():
    import inspect

    from qwen_jax.llm import LLM

    argv = (
        "--model m --mesh expert=2 --strategy ep --dtype float32 --quantization int8 "
        "--kv-cache-dtype fp8 --max-model-len 99 --max-num-seqs 3 --max-num-batched-tokens 77 "
        "--hbm-utilization 0.5 --load-format dummy --kernels ragged_dot=xla --page-size 32 "
        "--dispatch reduce-scatter --seed 4 --revision r --cache-dir d "
        "--config-override a=1 --config-override b=x "
        '--mm-processor-kwargs {"fps":1}'
    )
    found = options.llm_options(parser("generate").parse_args(argv.split()))
    assert found == {
        "model": "m",
        "mesh": "expert=2",
        "strategy": "ep",
        "dtype": "float32",
        "quantization": "int8",
        "kv_cache_dtype": "fp8",
        "max_model_len": 99,
        "max_num_seqs": 3,
        "max_num_batched_tokens": 77,
        "hbm_utilization": 0.5,
        "load_format": "dummy",
        "kernels": {"ragged_dot": "xla"},
        "page_size": 32,
        "dispatch": "reduce-scatter",
        "seed": 4,
        "revision": "r",
        "cache_dir": "d",
        "config_overrides": {"a": 1, "b": "x"},
        "mm_processor_kwargs": {"fps": 1},
    }
    parameters = inspect.signature(LLM).parameters
    only_in_python = {"progress", "video_form"}
    assert set(found) == set(parameters) - only_in_python
    plain = options.llm_options(parser("generate").parse_args(["--model", "m"]))
    assert all(plain[name] == parameters[name].default for name in found if name != "model")


def test_the_names_that_options_offer_are_the_librarys():
    assert options.DTYPES == runtime.ACTIVATION_DTYPES
    assert ("auto", *runtime.KV_DTYPES) == options.KV_DTYPES
    assert ("auto", *sharding.STRATEGIES) == options.STRATEGIES
    assert ("auto", *expert_dispatch.FORMS) == options.DISPATCHES
    assert options.LOAD_FORMATS == location.LOAD_FORMATS
    assert set(options.QUANTIZATIONS) == set(quant.FORMATS)


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=2", 2), ("a=true", True), ('a={"b": null}', {"b": None}), ("a=x=y", "x=y"), ("a=", "")],
)
def test_a_value_is_json_where_it_can_be(text, value):
    assert options.key_value(text) == ("a", value)


def test_a_dash_is_stdin_and_line_ends_are_kept(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.stdin", io.StringIO("from stdin"))
    assert options.read_text("-") == "from stdin"
    (tmp_path / "a").write_bytes(b"a\r\nb")
    assert options.read_text(str(tmp_path / "a")) == "a\r\nb"


@pytest.mark.parametrize(
    ("count", "text"), [(61_064_245_248, "61.06 GB"), (10**8, "0.10 GB"), (759_552, "0.76 MB")]
)
def test_sizes_for_people(count, text):
    assert output.size(count) == text
