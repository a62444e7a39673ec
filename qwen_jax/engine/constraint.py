"""What the engine asks of structured output: which tokens may come next.

Knows tokens and bit masks; knows no grammar. A `Constraint` belongs to one sequence and is called
on the engine's thread, in this order for every sampled token:

    forced()    tokens that must come next: appended without sampling, then accepted
    mask(out)   while the device computes the logits
    accept([t]) the token that was sampled; not one that ends the text
    finished    True ends the text, with finish reason "stop"
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np


class Constraint(Protocol):
    """What one sequence may say."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes tokens of the sequence, sampled or forced."""
        ...

    def mask(self, out: np.ndarray) -> None:
        """Fills ``out``, uint32 [ceil(V/32)]: bit i % 32 of word i // 32 set: token i may come."""
        ...

    def forced(self) -> list[int]:
        """The tokens that must come next, maybe none. They are not accepted yet."""
        ...

    @property
    def finished(self) -> bool:
        """Whether nothing may follow."""
        ...


Factory = Callable[[], Constraint]
