"""One job of several processes: how they meet, and how they agree on what the host decides.

Knows process numbers and short texts; knows no array and no model. All processes run the same
program, as JAX wants it, so whatever steers it must be the same everywhere: what only one process
can know (stdin, free memory, a measured time) goes through here. In a process of its own every
function here answers at once.

    start         the processes meet
    from_first    a text that process 0 knows, told to all
    gather        a text of each process, told to all
"""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax._src import distributed as _state  # JAX's own place for small values has no public name

_PATIENCE_MS = 24 * 3600 * 1000  # for an answer: that a process is lost is not found out here
_PREFIX = "qwen_jax"

_uses: dict[str, Any] = {}


def start(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Meets the other processes; before anything else asks JAX for devices.

    Args:
        coordinator: HOST:PORT at which process 0 can be reached by all; None, like the following
            two: as JAX finds out from a TPU pod slice, Slurm, Kubernetes or Open MPI.
        num_processes: how many there are.
        process_id: which of them this is, from 0.

    Raises:
        ValueError: a number out of range, or JAX finds no such job.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdigit():
        raise ValueError(f"coordinator {coordinator!r} is not HOST:PORT, e.g. 10.0.0.2:1234")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process {process_id} is not in 0 .. {num_processes - 1}")
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    except ValueError as error:
        raise ValueError(
            f"JAX finds no job of several processes here ({error}): say which with --coordinator "
            "HOST:PORT --num-processes N --process-id I"
        ) from error


def index() -> int:
    """Which process this is."""
    return _state.global_state.process_id


def count() -> int:
    """How many processes there are."""
    return _state.global_state.num_processes


def check_met() -> None:
    """For what needs the others' devices, which JAX may see without their processes' having met.

    Raises:
        ValueError: so it is.
    """
    if jax.process_count() != count():
        raise ValueError(
            f"{jax.process_count()} processes share these devices and have not met: call "
            "jax.distributed.initialize() before anything else, or pass --distributed"
        )


def client() -> Any:
    """JAX's client for small values under names; None in a process of its own."""
    return _state.global_state.client


def key(name: str) -> str:
    """The full name of a value of ours."""
    return f"{_PREFIX}/{name}"


def gather(name: str, text: str) -> list[str]:
    """What every process has said under ``name``, in the order of their numbers.

    All processes call it, and equally often for each name.
    """
    if count() == 1:
        return [text]
    place = key(f"{name}/{_next_use(name)}")
    client().key_value_set(f"{place}/{index()}", text)
    return [
        client().blocking_key_value_get(f"{place}/{process}", _PATIENCE_MS)
        for process in range(count())
    ]


def from_first(name: str, make: Callable[[], str]) -> str:
    """What ``make`` returns in process 0, the only one that calls it.

    An error in process 0 ends the job, so that nobody waits for the text.
    """
    if count() == 1:
        return make()
    place = key(f"{name}/{_next_use(name)}")
    if index() == 0:
        text = make()
        client().key_value_set(place, text)
        return text
    return client().blocking_key_value_get(place, _PATIENCE_MS)


def wait_for_all(name: str) -> None:
    """Returns when every process has come here."""
    gather(name, "")


def check_equal(name: str, values: Mapping[str, str]) -> None:
    """Holds what must be the same in all processes against what process 0 has.

    Raises:
        ValueError: a value of this process is another one.
    """
    mine = [f"{key}={value}" for key, value in sorted(values.items())]
    others = from_first(name, lambda: "\n".join(mine)).split("\n")
    if mine != others:
        own = next((x for x in mine if x not in others), "nothing more")
        theirs = next((x for x in others if x not in mine), "nothing more")
        raise ValueError(
            f"process {index()} was started with {own}, process 0 with {theirs}: start all "
            "processes with the same options"
        )


def _next_use(name: str) -> int:
    """How often a name was used before: each use is a place of its own."""
    return next(_uses.setdefault(name, itertools.count()))
