"""`qwen-jax serve`: its options, and a whole life of the process."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import httpx
import pytest
from fake_llm import FakeLLM

from qwen_jax import cli
from qwen_jax.commands import serve
from qwen_jax.commands.parser import Parser

HERE = pathlib.Path(__file__).parent


def parse(*argv):
    parser = Parser("qwen-jax serve", "", "")
    serve.add_options(parser)
    return parser.parse_args(["--model", "M", *argv])


def settings(*argv):
    return serve._settings(parse(*argv), "M")


def test_options_become_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.delenv("QWEN_JAX_API_KEY", raising=False)
    found = settings()
    assert (found.model_names, found.api_keys) == (("M",), ())
    assert found.state == pathlib.Path("/state/qwen_jax/server")
    found = settings(
        "--served-model-name", "a", "--served-model-name", "b", "--api-key", "k", "--api-key", "l",
        "--allowed-media-domains", "x.org", "--allowed-local-media-path", str(tmp_path),
        "--max-images", "3", "--max-videos", "1", "--max-requests", "9", "--max-body-mb", "2",
        "--max-upload-mb", "5", "--request-timeout", "7", "--body-timeout", "8",
        "--send-timeout", "9", "--shutdown-timeout", "10", "--state-dir", "off",
    )  # fmt: skip
    assert (found.model_names, found.api_keys, found.state) == (("a", "b"), ("k", "l"), None)
    assert (found.media_hosts, found.media_folder) == (("x.org",), tmp_path)
    assert found.media_limits == {"image": 3, "video": 1}
    assert (found.max_requests, found.max_body, found.max_upload) == (9, 2 * 2**20, 5 * 2**20)
    times = (found.request_timeout, found.body_timeout, found.send_timeout, found.shutdown_timeout)
    assert times == (7, 8, 9, 10)


def test_a_key_may_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("QWEN_JAX_API_KEY", "secret")
    assert settings().api_keys == ("secret",)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--model", "M", "--allowed-local-media-path", "/nowhere"], "is no directory"),
        (["--model", "M", "--max-requests", "0"], "max_requests=0 is not positive"),
        (["--model", "M", "--port", "99999"], "not in 0 .. 65535"),
        (["--model", "M", "--prot", "1"], "did you mean --port"),
    ],
)
def test_wrong_options_are_one_line(argv, said, capsys):
    assert cli.main(["serve", *argv]) == 2
    assert said in capsys.readouterr().err


def test_without_the_extra_it_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--model", "M"]) == 2
    assert "qwen-jax[server]" in capsys.readouterr().err


def test_an_open_address_without_a_key_is_warned_of(monkeypatch, capsys):
    monkeypatch.delenv("QWEN_JAX_API_KEY", raising=False)
    serve._check_address(parse("--host", "0.0.0.0"))
    assert "open to others" in capsys.readouterr().err
    serve._check_address(parse("--host", "0.0.0.0", "--api-key", "k"))
    serve._check_address(parse())
    assert capsys.readouterr().err == ""


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--model", "/nowhere", "--port", str(port)]) == 2
    said = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be had: Address already in use" in said
    assert "/nowhere" not in said


def test_damaged_state_is_told_before_a_model_is_loaded(process_as_before, tmp_path, capsys):
    damaged = tmp_path / "batches" / f"batch_{'0' * 32}.json"
    damaged.parent.mkdir()
    damaged.write_text("{")
    command = ["serve", "--model", "/nowhere", "--port", "0", "--state-dir", str(tmp_path)]
    command.append("--compilation-cache=off")
    assert cli.main(command) == 2
    said = capsys.readouterr().err
    assert f"{damaged} is damaged" in said
    assert "/nowhere" not in said
    damaged.unlink()
    assert cli.main(command) != 0  # it was let go of: the next thing that is wrong is told
    assert "/nowhere" in capsys.readouterr().err


def test_compiling_is_told_of_where_there_is_no_bar(monkeypatch, capsys):
    monkeypatch.setattr(serve, "_SAY_EVERY", -1.0)
    serve._warm_up(parse(), FakeLLM())
    assert "compile: 1 of 1 programs" in capsys.readouterr().err


PROGRAM = f"""
import sys
sys.path.insert(0, {str(HERE)!r})
from fake_llm import FakeLLM
from test_cli_serve import parse
from qwen_jax.commands import serve
args = parse("--port", "0", "--state-dir", "off", "--no-access-log")
llm = FakeLLM(lambda prompt, i: "x" * 50, pause=0.01)
serve.serve(args, llm, serve._settings(args, "M"), serve.bind(args))
assert llm.engine.closed and llm.engine.warm
print("ended")
"""


def test_a_signal_ends_it_cleanly_and_requests_are_finished():
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            said = []
            while not said or "startup complete" not in said[-1]:
                said.append(process.stderr.readline())
                assert said[-1], said
            url = next(text for text in said if "serving M on" in text).split()[3]
            body = {"messages": [{"role": "user", "content": "hi"}], "stream": True}
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                rest = list(lines)
            assert rest[-2] == "data: [DONE]"
            assert process.wait(20) == 0
            assert process.stdout.read() == "ended\n"
        finally:
            process.kill()
