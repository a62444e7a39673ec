"""Which part of a batch this job does. Knows numbers and names of files; knows no line."""

import dataclasses
import pathlib
import re

_WRITTEN = re.compile(r"(\d{1,9})/(\d{1,9})")


@dataclasses.dataclass(frozen=True)
class Shard:
    """Every ``count``-th line, from line ``index`` on (from 0): the shards 0 to count - 1 of a
    batch have each of its lines once.

    Raises:
        ValueError: ``index`` is not in 0 .. count - 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(
                f"shard {self} does not exist: of {self.count} there are 0/{self.count} to "
                f"{self.count - 1}/{self.count}"
            )

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """Reads "i/n"."""
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"shard {text!r} is not I/N, for example 0/4")
        return cls(int(found[1]), int(found[2]))

    def split(self, index: int, count: int) -> "Shard":
        """A shard of this shard."""
        inner = Shard(index, count)
        return Shard(self.index + inner.index * self.count, self.count * inner.count)

    def path(self, whole: pathlib.Path) -> pathlib.Path:
        """The shard's own file: out-00000-of-00004.jsonl where the batch's is out.jsonl."""
        if self.count == 1:
            return whole
        return whole.with_stem(f"{whole.stem}-{self.index:05}-of-{self.count:05}")
