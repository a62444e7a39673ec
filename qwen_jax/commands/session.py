"""A model for a command: settings of the process, loading with progress, what is said on stderr.

Knows JAX's settings and stderr; knows no prompt. Nothing here writes to stdout.
"""

import argparse
import logging
import os
import pathlib
import resource
import sys
from typing import TYPE_CHECKING, Any

from qwen_jax import demo
from qwen_jax.commands.options import llm_options
from qwen_jax.commands.output import size

if TYPE_CHECKING:
    from qwen_jax.engine.totals import Totals
    from qwen_jax.llm import LLM
    from qwen_jax.weights.checkpoint import Transfer

_LOGGER = "qwen_jax"
_MIN_COMPILE_SECONDS = 0.1  # programs that took less are compiled again rather than kept
_WORTH_SAYING = 0.5  # seconds of compiling


def say(args: argparse.Namespace, text: str) -> None:
    """A line on stderr, unless --quiet."""
    if not args.quiet:
        print(text, file=sys.stderr, flush=True)


def open_llm(args: argparse.Namespace) -> "LLM":
    """The model that the options ask for, loaded; the plan and the progress go to stderr."""
    options = llm_options(args)
    prepare(args)
    if args.model == demo.DEMO:
        say(args, demo.NOTE)
    from qwen_jax.llm import LLM

    with Bar("load", quiet=args.quiet) as bar:
        return LLM(**options, progress=bar.show)


def prepare(args: argparse.Namespace) -> None:
    """Settings of the process, before JAX is imported: log, memory, compiled programs."""
    show_log(args)
    # Of a GPU's memory JAX takes three quarters unless told; hbm_utilization is a share of this.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.98")
    keep_programs(args)


def show_log(args: argparse.Namespace) -> None:
    """The library's choices on stderr, one line each."""
    log = logging.getLogger(_LOGGER)
    if not any(isinstance(handler, _Stderr) for handler in log.handlers):
        log.addHandler(_Stderr())
    log.setLevel(logging.WARNING if args.quiet else logging.INFO)


class _Stderr(logging.Handler):
    """Writes to whatever sys.stderr is at the time, so that a progress bar is not torn apart."""

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        print(text, file=sys.stderr, flush=True)


def keep_programs(args: argparse.Namespace) -> pathlib.Path | None:
    """Turns JAX's persistent compilation cache on; returns its directory, None for none.

    Raises:
        ValueError: the directory of --compilation-cache cannot be written.
    """
    import jax

    wanted = args.compilation_cache
    if wanted == "off":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    own = jax.config.values["jax_compilation_cache_dir"]
    if wanted is None and own:  # the user's setting of JAX
        return pathlib.Path(own)
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = pathlib.Path(wanted or f"{home}/qwen_jax/programs").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        problem = None if os.access(path, os.W_OK) else "not writable"
    except OSError as error:
        problem = error.strerror
    if problem and wanted:
        raise ValueError(f"--compilation-cache {path}: {problem}")
    if problem:
        say(args, f"compiled programs are not kept: {path}: {problem} (--compilation-cache DIR)")
        return None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_COMPILE_SECONDS)
    return path


class Bar:
    """Progress of bytes: a bar on a terminal, else one line at the end."""

    def __init__(self, what: str, *, quiet: bool):
        self._what, self._quiet = what, quiet
        self._bar: Any = None
        self._last: Transfer | None = None

    def __enter__(self) -> "Bar":
        return self

    def show(self, transfer: "Transfer") -> None:
        """Takes the state of a transfer."""
        if self._bar is None and not self._quiet and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=transfer.total,
                initial=transfer.skipped,
                desc=self._what,
                unit="B",
                unit_scale=True,
                leave=False,
            )
        self._last = transfer
        if self._bar is not None:
            self._bar.update(transfer.done - self._bar.n)

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._last is not None and error[0] is None and not self._quiet:
            print(f"{self._what}: {_summary(self._last)}", file=sys.stderr, flush=True)


def _summary(last: "Transfer") -> str:
    text = f"{size(last.done)} in {last.seconds:.1f} s, {last.rate / 1e9:.2f} GB/s"
    if last.skipped:
        text += f"; {size(last.skipped)} of it an earlier run had done"
    return text


class Compiling:
    """Says when programs are compiled, and afterwards how long that took, if it took long."""

    def __init__(self, args: argparse.Namespace):
        from qwen_jax.engine.compile_clock import compile_clock

        self._args, self._clock = args, compile_clock()
        self._before = (0, 0, 0.0)

    def __enter__(self) -> "Compiling":
        self._before = self._now()
        self._clock.on_large = lambda: say(self._args, "compiling, for the first text of its shape")
        return self

    def text_begins(self) -> None:
        """From here on a notice would stand in the middle of a text."""
        self._clock.on_large = None

    def __exit__(self, *error: object) -> None:
        self._clock.on_large = None
        pairs = zip(self._now(), self._before, strict=True)
        programs, cached, seconds = (now - before for now, before in pairs)
        if seconds >= _WORTH_SAYING and error[0] is None:
            say(
                self._args,
                f"programs: {programs - cached} compiled, {cached} kept from an earlier run, "
                f"{seconds:.1f} s",
            )

    def _now(self) -> tuple[int, int, float]:
        return self._clock.programs, self._clock.cached, self._clock.seconds


def footer(args: argparse.Namespace, totals: "Totals") -> None:
    """The last line: tokens, rates without compiling, memory; nothing where no token came."""
    if not totals.generated_tokens:
        return
    prompt = totals.prompt_tokens / max(totals.prefill_time, 1e-9)
    # The first token of each text comes with its prompt, so the others make the rate.
    generated = totals.decode_tokens / totals.decode_time if totals.decode_tokens else 0.0
    say(
        args,
        f"Prompt: {totals.prompt_tokens} tokens, {prompt:.3f} tokens-per-sec / "
        f"Generation: {totals.generated_tokens} tokens, {generated:.3f} tokens-per-sec / "
        f"Peak memory: {peak_memory() / 1e9:.3f} GB",
    )


def peak_memory() -> int:
    """Most bytes that were in use: of an accelerator's memory (the fullest one), else of ours."""
    import jax

    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
