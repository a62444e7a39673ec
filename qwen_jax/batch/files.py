"""Which files a batch reads. Knows names; looks into no file."""

import glob
import os
import pathlib
from collections.abc import Collection, Sequence

KINDS = (".jsonl", ".jsonl.gz", ".parquet")


def find_files(
    given: Sequence[str | os.PathLike], *, but_not: Collection[pathlib.Path] = ()
) -> list[pathlib.Path]:
    """The files that are meant, each once; of a directory or a pattern in the order of their names.

    Args:
        given: files, directories and patterns.
        but_not: files that are written, and so must not be among those that are read.

    Raises:
        ValueError: something names no file of a known kind, or a file that is written.
    """
    found: dict[pathlib.Path, None] = {}
    for each in given:
        path = pathlib.Path(each)
        if path.is_dir():
            _check_apart(path, but_not)
            inside = sorted(p for p in path.iterdir() if _is_known(p) and p.is_file())
        elif path.is_file():
            inside = [path]
        else:
            inside = sorted(pathlib.Path(name) for name in glob.glob(str(each), recursive=True))
        if not inside or not all(_is_known(p) for p in inside):
            known = ", ".join(KINDS)
            wrong = next((p for p in inside if not _is_known(p)), path)
            raise ValueError(f"{wrong}: no such file of lines ({known}), nor a directory of them")
        found |= dict.fromkeys(p.resolve() for p in inside)
    for path in but_not:
        if path.resolve() in found:
            raise ValueError(f"{path} is among the files to be read: choose another output")
    return list(found)


def _check_apart(folder: pathlib.Path, written: Collection[pathlib.Path]) -> None:
    for path in written:
        if path.resolve().parent == folder.resolve():
            raise ValueError(
                f"{path} would be among the files to be read the next time: choose an output "
                f"outside of {folder}, or give a pattern of names"
            )


def _is_known(path: pathlib.Path) -> bool:
    return path.name.endswith(KINDS)


def short_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Names without the directory that all are in, which may move before a batch is resumed."""
    folder = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(folder).as_posix() for path in paths]
