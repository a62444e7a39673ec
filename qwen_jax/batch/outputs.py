"""The files that one shard of a batch writes: the output, the errors, and what they belong to.

Knows names, the manifest and which lines are done; knows no model. A line is done when its answer
is in the output or what is wrong with it is in the error file, and in no other way: whatever else a
crash leaves undone is done again.
"""

import contextlib
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from qwen_jax import durable
from qwen_jax.batch.inputs import Inputs
from qwen_jax.batch.shard import Shard
from qwen_jax.openai.batch_lines import Batch
from qwen_jax.openai.batch_results import read_results


@dataclasses.dataclass(frozen=True)
class Done:
    """What earlier runs have done.

    Attributes:
        lines: [lines], bool.
        completed, failed: how many.
    """

    lines: np.ndarray
    completed: int
    failed: int


class Outputs:
    """The files of a shard.

    Args:
        whole: the output's name, where there is one shard.
        errors: that of the error file; default: out.errors.jsonl for out.jsonl.
        shard: which part this is.
    """

    def __init__(self, whole: pathlib.Path, errors: pathlib.Path | None, shard: Shard):
        self.output = shard.path(whole)
        self.errors = shard.path(errors or whole.with_stem(f"{whole.stem}.errors"))
        self.manifest = self.output.with_name(f"{self.output.name}.manifest.json")
        self._shard = shard
        self._held = contextlib.ExitStack()

    def check(self, *, resume: bool) -> None:
        """Raises FileExistsError where there are answers that are not to be gone on with."""
        if self.manifest.exists():
            if not resume:
                raise FileExistsError(
                    f"{self.output} has been begun: --resume (resume=True) goes on with it, or "
                    "choose another output"
                )
            return
        for path in (self.output, self.errors):
            if path.exists() and path.stat().st_size:
                raise FileExistsError(
                    f"{path} exists and is not of a batch (there is no {self.manifest.name}): "
                    "choose another output"
                )

    def begin(self, inputs: Inputs, options: Mapping[str, Any], *, resume: bool) -> Batch:
        """Checks that the files are those of this batch, or begins them; `close` must follow.

        Args:
            inputs: the lines.
            options: all else that the answers depend on, with a ``seed``.
            resume: whether there may be answers.

        Raises:
            FileExistsError: there are answers, and they are not to be gone on with.
            ValueError: they are those of another batch, or another process has them.
        """
        self.check(resume=resume)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._held.callback(durable.lock_file(self.output).close)
        about = {"input": inputs.about(), **options}
        known = self._read_manifest()
        if known is None:
            known = {"created": int(time.time()), "shard": str(self._shard), **about}
            durable.save_json(self.manifest, known)
        else:
            _check_same(self.manifest, known, {"shard": str(self._shard), **about})
        name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return Batch(name, options["seed"], known["created"])

    def done(self, inputs: Inputs) -> Done:
        """The lines that are done. What a crash left torn at the end of the files is cut off.

        Raises:
            ValueError: a line of the files is none of this batch.
        """
        lines = np.zeros(len(inputs), bool)
        answers = (line["custom_id"] for line in read_results(self.output))
        completed = self._mark(lines, inputs.find(answers), self.output)
        problems = (inputs.at(line["file"], line["line"]) for line in read_results(self.errors))
        return Done(lines, completed, self._mark(lines, problems, self.errors))

    def close(self) -> None:
        """Lets another process have the files."""
        self._held.close()

    def forget_errors(self) -> None:
        """Has the lines that failed done again."""
        durable.save(self.errors, b"")

    def _mark(self, lines: np.ndarray, numbers: Iterator[int], path: pathlib.Path) -> int:
        count = 0
        try:
            for k in numbers:
                count += 1
                if k % self._shard.count != self._shard.index:
                    raise ValueError(f"{path}: line {count:,} is of another shard than this one")
                if lines[k]:
                    raise ValueError(f"{path}: line {count:,} answers what another line answers")
                lines[k] = True
        except KeyError as error:
            raise ValueError(
                f"{path}: line {count + 1:,} answers {error}, which the input does not ask for"
            ) from None
        return count

    def _read_manifest(self) -> dict[str, Any] | None:
        if not self.manifest.exists():
            return None
        return durable.load_json(
            self.manifest,
            ("created", "shard", "input"),
            f"put it back as it was, or choose another output; the answers in {self.output} are "
            "left as they are",
        )


def _check_same(path: pathlib.Path, known: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the first difference."""
    for key in {**about, **known}:
        was, now = known.get(key), about.get(key)
        if key != "created" and was != now:
            was, now = _difference(was, now)
            raise ValueError(
                f"{path.parent / path.name} was begun with another {key} ({was}, now {now}): give "
                "the same again, or choose another output"
            )


def _difference(was: Any, now: Any) -> tuple[Any, Any]:
    """Of two lists only what is not in both."""
    if isinstance(was, list) and isinstance(now, list):
        return [x for x in was if x not in now], [x for x in now if x not in was]
    return was, now
