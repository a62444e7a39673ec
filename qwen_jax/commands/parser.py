"""An argument parser whose errors are one line, with a did-you-mean. Knows no command."""

import argparse
import difflib
from collections.abc import Collection, Sequence
from typing import Any, NoReturn


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the examples as they are written; wide enough for most options to need one line."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=100)


class Parser(argparse.ArgumentParser):
    """Raises ValueError where argparse would print its usage and exit."""

    def __init__(self, prog: str, description: str, example: str):
        super().__init__(
            prog=prog,
            usage=f"{prog} [OPTIONS]",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=Formatter,
            allow_abbrev=False,  # an option added later would change what an abbreviation means
        )

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> Any:  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            options = [text for text in unknown if text.startswith("-")]
            name = (options or unknown)[0].partition("=")[0]
            kind = "option" if options else "argument"
            self.error(f"unknown {kind} {name!r}{_near(name, known)}")
        return found

    def error(self, message: str) -> NoReturn:
        if "expected one argument" in message:
            message += " (a value that begins with '-' is written --option=-value)"
        raise ValueError(f"{self.prog.split()[-1]}: {message}")


def _near(name: str, known: Collection[str]) -> str:
    # What is typed may be the beginning of a name: --temp, --max-tok.
    near = [flag for flag in known if flag.startswith(name)]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else " (see --help)"


def unknown_command(name: str, known: Collection[str]) -> ValueError:
    """The error for a command that there is not."""
    return ValueError(f"unknown command {name!r}{_near(name, known)}")
