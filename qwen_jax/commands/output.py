"""Results on stdout: text as it comes, or one JSON object per result.

Knows stdout and the shape of results; knows no model.
"""

import dataclasses
import json
import sys
from typing import Any

from qwen_jax.results import RequestOutput

_muted = False


def mute() -> None:
    """From now on nothing is written: another process of the job does that."""
    global _muted
    _muted = True


def write(text: str) -> None:
    """Text to stdout at once, exactly as it is."""
    if not _muted:
        sys.stdout.write(text)
        sys.stdout.flush()


def end_line() -> None:
    """Ends the last line on a terminal; what goes to a file or a program is the text alone."""
    if sys.stdout.isatty():
        write("\n")


def write_json(value: Any) -> None:
    """One line of JSON."""
    write(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n")


def write_results(results: list[RequestOutput]) -> None:
    """One JSON object per result."""
    for result in results:
        write_json(dataclasses.asdict(result))


def write_texts(results: list[RequestOutput]) -> None:
    """Texts of several completions; with more than one each has a title on stderr."""
    titles = len(results) > 1 or any(len(r.outputs) > 1 for r in results)
    for i, result in enumerate(results):
        for output in result.outputs:
            if titles and not _muted:
                print(f"==> prompt {i}, completion {output.index}", file=sys.stderr, flush=True)
            write(output.text if output.content is None else output.content)
            if titles:
                write("\n")
    if not titles:
        end_line()


def size(nbytes: float) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.2f} MB"
