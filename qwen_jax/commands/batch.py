"""`qwen-jax batch`: answers files of requests; goes on where it was after whatever ends it."""

import argparse
import pathlib
import sys
import time
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import media, options, processes

if TYPE_CHECKING:
    from qwen_jax.batch.progress import Summary
    from qwen_jax.openai.media import MediaSource

EXAMPLE = (
    "qwen-jax batch --model Qwen/Qwen3-0.6B -i in.jsonl -o out.jsonl --resume\n\n"
    "a line of in.jsonl (method and url as here, or /v1/completions):\n"
    '  {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions",\n'
    '   "body": {"messages": [{"role": "user", "content": "What is a monad?"}], '
    '"max_tokens": 200}}'
)

_LOGGED = 30.0  # seconds between two lines of progress where stderr is no terminal
_SOME_FAILED, _INTERRUPTED = 1, 130
_MIB = 2**20
_MAX_MEDIA, _FETCH_TIMEOUT = 64 * _MIB, 20.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    _add_files(parser)
    _add_requests(parser)
    media.add_media(parser)
    options.add_model(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("files")
    group.add_argument(
        "-i",
        "--input",
        metavar="PATH",
        nargs="+",
        action="extend",
        default=[],
        help="files (.jsonl, .jsonl.gz, .parquet), directories of them, or patterns",
    )
    group.add_argument("-o", "--output", metavar="FILE", help="answers, in the order they come")
    group.add_argument(
        "--errors", metavar="FILE", help="lines that fail (default: out.errors.jsonl)"
    )
    group.add_argument(
        "--resume",
        action="store_true",
        help="go on with an output, or begin it; without this it must not be there",
    )
    group.add_argument(
        "--retry-errors", action="store_true", help="with --resume: try failed lines again"
    )
    group.add_argument(
        "--shard",
        metavar="I/N",
        default="0/1",
        help="every N-th line from line I on, to a file of its own: out-00000-of-00004.jsonl",
    )


def _add_requests(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    group.add_argument(
        "--served-model-name",
        metavar="N",
        action="append",
        default=[],
        help="what lines call the model (default: --model); may be repeated",
    )
    group.add_argument(
        "--in-flight", metavar="N", type=int, help="at once (default: twice --max-num-seqs)"
    )
    group.add_argument(
        "--seed", metavar="S", type=int, default=0, help="of lines without, and of random weights"
    )
    group.add_argument(
        "--grace",
        metavar="S",
        type=float,
        default=30.0,
        help="seconds for what runs when ctrl-C or SIGTERM ends the batch",
    )


def run(args: argparse.Namespace) -> int:
    """Loads the model and answers the lines; 1 where some have failed, 130 where it was stopped."""
    options.llm_options(args)
    _check_extra()
    _check_options(args)
    source = None
    if processes.is_first():  # no other need have the files
        source = _media(args)
        _check_files(args)
    from qwen_jax.commands import session

    llm = session.open_llm(args)
    with session.Compiling(args):
        status = work(args, llm, source)
    session.footer(args, llm.totals)
    return processes.end_together(status)


def _media(args: argparse.Namespace) -> "MediaSource":
    from qwen_jax.openai.fetch import Fetcher
    from qwen_jax.openai.media import MediaSource

    fetcher = Fetcher(args.allowed_media_domains, most=_MAX_MEDIA, timeout=_FETCH_TIMEOUT)
    return MediaSource(fetcher, media.folder(args), media.limits(args))


def _check_extra() -> None:
    try:
        import pydantic  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"batch needs {error.name}: pip install 'qwen-jax[batch]'", name=error.name
        ) from None


def _check_options(args: argparse.Namespace) -> None:
    """What can be known before a large model is loaded."""
    if not args.input or not args.output:
        raise ValueError("batch: -i and -o are needed: batch --model M -i in.jsonl -o out.jsonl")
    if args.retry_errors and not args.resume:
        raise ValueError("batch: --retry-errors needs --resume")
    if args.in_flight is not None and args.in_flight < 1:
        raise ValueError(f"batch: --in-flight {args.in_flight} is not positive")


def _check_files(args: argparse.Namespace) -> None:
    """The same, of the files."""
    from qwen_jax.batch.files import find_files
    from qwen_jax.batch.outputs import Outputs
    from qwen_jax.batch.shard import Shard

    errors = None if args.errors is None else pathlib.Path(args.errors)
    outputs = Outputs(pathlib.Path(args.output), errors, Shard.parse(args.shard))
    find_files(args.input, but_not=(outputs.output, outputs.errors))
    outputs.check(resume=args.resume)


def work(args: argparse.Namespace, llm: Any, source: "MediaSource | None") -> int:
    """Answers the lines with a model that is loaded; returns the exit status."""
    from qwen_jax.batch.run import Interrupted, run_batch

    shown = _Shown(args)
    try:
        summary = run_batch(
            llm,
            args.input,
            args.output,
            resume=args.resume,
            retry_errors=args.retry_errors,
            shard=args.shard,
            errors=args.errors,
            model_names=args.served_model_name,
            seed=args.seed,
            in_flight=args.in_flight,
            media=source,
            grace=args.grace,
            progress=shown.show,
            on_stop=shown.stopping,
        )
    except Interrupted as stop:
        shown.end(stop.summary)
        shown.say(f"stopped with {stop.summary.left:,} lines left: --resume goes on with them")
        return _INTERRUPTED
    shown.end(summary)
    return _SOME_FAILED if summary.failed else 0


class _Shown:
    """Progress on stderr: a line that changes on a terminal, else one from time to time."""

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._last = time.monotonic()

    def show(self, summary: "Summary") -> None:
        """Takes what there is of the batch."""
        if self._args.quiet:
            return
        if sys.stderr.isatty():
            print(f"\r\x1b[K{summary}", end="", file=sys.stderr, flush=True)
        elif time.monotonic() - self._last >= _LOGGED:
            self._last = time.monotonic()
            print(summary, file=sys.stderr, flush=True)

    def stopping(self) -> None:
        """Ctrl-C was heard."""
        self.say(
            f"stopping: no new lines, {self._args.grace:g} s for those that run (ctrl-C again "
            "drops them)"
        )

    def end(self, summary: "Summary") -> None:
        """What has become of the lines, also where the progress is not shown."""
        text = f"{summary.completed:,} answered, {summary.failed:,} failed, {summary.left:,} left"
        if summary.resumed:
            text += f"; {summary.resumed:,} of them by earlier runs"
        self.say(f"{text}, of {summary.total:,} lines")

    def say(self, text: str) -> None:
        if not self._args.quiet:
            start = "\r\x1b[K" if sys.stderr.isatty() else ""
            print(f"{start}{text}", file=sys.stderr, flush=True)
