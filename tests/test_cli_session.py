"""What a command sets up and writes: kept programs, progress, results, the footer."""

import argparse
import io
import json
import re
import time

import jax
import pytest

from qwen_jax.commands import session
from qwen_jax.commands.output import write_results
from qwen_jax.engine import compile_clock
from qwen_jax.engine.totals import Totals
from qwen_jax.results import CompletionOutput, Logprob, RequestOutput
from qwen_jax.weights.checkpoint import Transfer


def arguments(cache=None, *, quiet=False):
    return argparse.Namespace(compilation_cache=cache, quiet=quiet)


@pytest.fixture
def jax_settings(monkeypatch, tmp_path):
    """Settings of JAX as they are without a command; put back afterwards."""
    names = (
        "jax_compilation_cache_dir",
        "jax_enable_compilation_cache",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: jax.config.values[name] for name in names}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    yield lambda name: jax.config.values[name]
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache(jax_settings, tmp_path, monkeypatch):
    assert session.keep_programs(arguments()) == tmp_path / ".cache/qwen_jax/programs"
    assert jax_settings("jax_compilation_cache_dir") == str(tmp_path / ".cache/qwen_jax/programs")
    assert (tmp_path / ".cache/qwen_jax/programs").is_dir()
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert session.keep_programs(arguments()) == tmp_path / "xdg/qwen_jax/programs"


def test_an_option_says_where_or_nowhere(jax_settings, tmp_path):
    assert session.keep_programs(arguments(str(tmp_path / "there"))) == tmp_path / "there"
    assert jax_settings("jax_compilation_cache_dir") == str(tmp_path / "there")
    assert session.keep_programs(arguments("off")) is None
    assert jax_settings("jax_enable_compilation_cache") is False


def test_the_users_own_setting_of_jax_stays(jax_settings, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    assert session.keep_programs(arguments()) == tmp_path / "own"


def test_a_cache_that_cannot_be_written_is_an_error_only_if_it_was_asked_for(
    jax_settings, tmp_path, capsys
):
    (tmp_path / ".cache").write_text("in the way")
    assert session.keep_programs(arguments()) is None
    assert "compiled programs are not kept" in capsys.readouterr().err
    assert jax_settings("jax_compilation_cache_dir") is None
    with pytest.raises(ValueError, match=r"--compilation-cache .*: Not a directory"):
        session.keep_programs(arguments(str(tmp_path / ".cache" / "x")))


@pytest.mark.parametrize(
    ("skipped", "line"),
    [
        (0, "convert: 4.00 GB in 2.0 s, 2.00 GB/s\n"),
        (10**9, "convert: 4.00 GB in 2.0 s, 1.50 GB/s; 1.00 GB of it an earlier run had done\n"),
    ],
)
def test_a_transfer_ends_with_a_line(capsys, skipped, line):
    with session.Bar("convert", quiet=False) as bar:
        bar.show(Transfer(2 * 10**9, 4 * 10**9, skipped, 1.0))
        bar.show(Transfer(4 * 10**9, 4 * 10**9, skipped, 2.0))
    assert capsys.readouterr() == ("", line)


def test_a_transfer_that_failed_or_is_quiet_says_nothing(capsys):
    with session.Bar("load", quiet=True) as bar:
        bar.show(Transfer(1, 1, 0, 1.0))
    bar = session.Bar("load", quiet=False)
    bar.show(Transfer(1, 2, 0, 1.0))
    bar.__exit__(ValueError, ValueError("x"), None)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_sees_a_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with session.Bar("load", quiet=False) as bar:
        bar.show(Transfer(2 * 10**9, 4 * 10**9, 10**9, 1.0))
        bar._bar.refresh()
        shown = screen.getvalue()
    assert "load:  50%" in shown
    assert "2.00G/4.00G" in shown


def test_compiling_is_said_once_and_never_inside_a_text(capsys, monkeypatch):
    monkeypatch.setattr(compile_clock, "_LARGE", 0.0)
    monkeypatch.setattr(session, "_WORTH_SAYING", 0.0)

    def compile_one(n):
        jax.jit(lambda x: x * n)(1.0)

    with session.Compiling(arguments()):
        assert capsys.readouterr().err == ""
        compile_one(2)
        compile_one(3)
        assert capsys.readouterr().err == "compiling, for the first text of its shape\n"
    line = r"programs: 2 compiled, 0 kept from an earlier run, \d+\.\d s\n"
    assert re.fullmatch(line, capsys.readouterr().err)
    with session.Compiling(arguments()) as compiling:
        compiling.text_begins()
        compile_one(4)
        assert capsys.readouterr().err == ""
    assert capsys.readouterr().err.startswith("programs: 1 compiled")
    compile_one(5)
    assert capsys.readouterr().err == ""


def test_a_clock_counts_nested_tracing_once():
    clock = compile_clock.CompileClock()

    @jax.jit
    def inner(x):
        time.sleep(0.05)
        return x + 1

    begun = time.perf_counter()
    jax.jit(lambda x: inner(x) + inner(2 * x))(1.0)
    assert 0.05 <= clock.seconds <= time.perf_counter() - begun


def test_logprobs_are_json_by_token_id(capsys):
    entry = {7: Logprob(-0.5, 1, "é")}
    output = CompletionOutput(0, "é", [7], logprobs=[entry])
    write_results([RequestOutput("0", None, [1], [None, entry], [output])])
    written = capsys.readouterr().out
    assert '"decoded_token": "é"' in written
    found = json.loads(written)
    expected = {"7": {"logprob": -0.5, "rank": 1, "decoded_token": "é"}}
    assert found["outputs"][0]["logprobs"] == [expected]
    assert found["prompt_logprobs"] == [None, expected]


def test_rates_leave_the_first_tokens_to_prefill(capsys, monkeypatch):
    monkeypatch.setattr(session, "peak_memory", lambda: 1_500_000_000)
    totals = Totals(
        prompt_tokens=10, generated_tokens=9, decode_tokens=8, prefill_time=0.5, decode_time=2.0
    )
    session.footer(arguments(), totals)
    session.footer(arguments(), Totals(prompt_tokens=4, generated_tokens=1, prefill_time=2.0))
    session.footer(arguments(quiet=True), totals)
    session.footer(arguments(), Totals(compile_time=1.0))  # stopped before the first token
    assert capsys.readouterr().err == (
        "Prompt: 10 tokens, 20.000 tokens-per-sec / Generation: 9 tokens, 4.000 tokens-per-sec / "
        "Peak memory: 1.500 GB\n"
        "Prompt: 4 tokens, 2.000 tokens-per-sec / Generation: 1 tokens, 0.000 tokens-per-sec / "
        "Peak memory: 1.500 GB\n"
    )


def test_peak_memory_is_that_of_the_process_on_a_cpu():
    assert 10**7 < session.peak_memory() < 10**12
