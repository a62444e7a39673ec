"""The program `qwen-jax`: which commands there are, and what a failure looks like.

Knows the commands' names. A command's module is imported when it is called, and JAX later still,
when its arguments are known to be right: `--help` and a wrong option answer at once.
"""

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from qwen_jax.commands import options, processes
from qwen_jax.commands.parser import Parser, unknown_command

# A module each, in `commands/`; what it is for stands here too, so that --help imports none.
COMMANDS = {
    "generate": "complete a prompt",
    "chat": "talk to a model, or ask one question with --prompt",
    "fill": "fill in the middle of code",
    "batch": "answer files of requests, and go on after whatever ends it",
    "serve": "an OpenAI-compatible server, with a page to try the model",
    "convert": "Hugging Face safetensors -> an orbax checkpoint",
    "info": "what a checkpoint is: parameters, bytes, context, tokenizer",
    "plan": "does it fit on a machine that is not here, and what limits it there",
    "bench": "tokens per second, beside what the machine's memory allows",
}

_ABOUT = "Qwen3 and Qwen3-VL in JAX, on TPU, GPU and CPU."
_EXAMPLE = 'qwen-jax chat --model Qwen/Qwen3-0.6B --prompt "What is a monad?"'
_INTERRUPTED, _BROKEN_PIPE = 130, 141  # 128 and the number of the signal, as a shell reports it


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 2 for what the user can put right."""
    argv = list(sys.argv[1:] if argv is None else argv)
    status, why = _status(argv)
    processes.leave(status, why)
    return status


def _status(argv: list[str]) -> tuple[int, str]:
    """Runs a command; its exit status, and the reason where that is not 0."""
    try:
        status = _run(argv)
        sys.stdout.flush()
        return status, "interrupted"
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and must not fail at that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE, "nobody reads its output"
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED, "interrupted"
    except (ValueError, OSError, ModuleNotFoundError) as error:  # the last: an extra is missing
        if "--debug" in argv:
            traceback.print_exc()
        print(f"qwen-jax: error: {_one_line(error)}", file=sys.stderr)
        return 2, _one_line(error)
    except Exception as error:
        if not processes.wait_for_news():
            raise
        traceback.print_exc()
        return 1, repr(error)


def _one_line(error: Exception) -> str:
    """What the operating system says of a file begins with the file, not with a number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(_help())
        return 0 if argv else 2
    if name in ("-V", "--version"):
        print(f"qwen-jax {_version()}")
        return 0
    if name not in COMMANDS:
        raise unknown_command(name, COMMANDS)
    command = importlib.import_module(f"qwen_jax.commands.{name}")
    parser = Parser(f"qwen-jax {name}", COMMANDS[name], command.EXAMPLE)
    command.add_options(parser)
    options.add_processes(parser)
    args = parser.parse_args(argv[1:])
    processes.join(args)
    return command.run(args)


def _version() -> str:
    try:
        return importlib.metadata.version("qwen-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its source tree)"


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qwen-jax COMMAND [OPTIONS]      qwen-jax COMMAND --help shows the options",
            "",
            _ABOUT,
            "",
            "commands:",
            *lines,
            "",
            "example:",
            f"  {_EXAMPLE}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
