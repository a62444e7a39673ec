"""A command that runs as one job of several processes: it meets the others, and ends with them.

Knows options, the environment of a cluster, stdout and exit codes; knows no model. Process 0 writes
results, log and progress; the others write only what ends them.
"""

import argparse
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from qwen_jax.commands import output

if TYPE_CHECKING:
    from qwen_jax.watch import Watch

# Variables in which a cluster says how many processes there are; the last one lists their hosts.
_COUNTS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_HOSTS = "TPU_WORKER_HOSTNAMES"
_OWN = ("process_id", "debug", "quiet", "cache_dir", "compilation_cache")  # may differ

_watch: "Watch | None" = None


def join(args: argparse.Namespace) -> None:
    """Meets the other processes where the options, or a cluster around this one, say so.

    Raises:
        ValueError: options that do not go together, or that another process does not have.
    """
    three = (args.coordinator, args.num_processes, args.process_id)
    if None in three and any(x is not None for x in three) and not args.distributed:
        raise ValueError(
            "--coordinator, --num-processes and --process-id go together: with --distributed JAX "
            "looks for those that are not given"
        )
    if not args.distributed and three[0] is None and not _in_a_step(os.environ):
        return
    from qwen_jax import distributed
    from qwen_jax.watch import LastWords, Watch

    words = LastWords()
    where = args.coordinator or "the cluster's first host"
    if not args.quiet:
        print(f"waiting for all processes at {where}", file=sys.stderr, flush=True)
    words.tell(f"the processes of the job have not met at {where}: did all of them start?")
    distributed.start(*three)
    words.tell("")
    if distributed.count() == 1:
        return
    name = f"process {distributed.index()} of {distributed.count()}"
    words.tell(f"{name} ended without a word: it was killed, or has lost process 0 at {where}")
    global _watch
    _watch = Watch(name, words)
    _watch.start()
    if distributed.index() > 0:
        args.quiet = True
        output.mute()
    _keep_stdout_to_ourselves()
    distributed.check_equal("options", {k: str(v) for k, v in vars(args).items() if k not in _OWN})


def _keep_stdout_to_ourselves() -> None:
    """What libraries write to stdout goes to stderr: Gloo, between CPUs, greets there."""
    sys.stdout.flush()
    own = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = open(own, "w", encoding=sys.stdout.encoding)  # noqa: SIM115 (to the end)


def leave(status: int, why: str) -> None:
    """Ends this process's part in the job, if it is in one.

    Args:
        status: the exit status. Where it is not 0 the others end too, and this function does not
            return: what they have left undone would be waited for.
        why: what has gone wrong.
    """
    if _watch is None:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0:
        _watch.done()
        return
    _watch.failed(why)
    os._exit(status)


def wait_for_news() -> bool:
    """After an error that may come from the loss of another process; whether there are others."""
    if _watch is not None:
        _watch.wait_for_news()
    return _watch is not None


def from_first(read: Callable[[], str]) -> str:
    """What process 0 reads, in every process."""
    if _watch is None:
        return read()
    from qwen_jax import distributed

    return distributed.from_first("texts", read)


def only_first(work: Callable[[], None]) -> None:
    """Has process 0 do something, with the others waiting until it is done."""
    if _watch is None:
        work()
        return
    import jax

    from qwen_jax import distributed

    jax.devices()  # which all processes must do, for any of them to have devices
    if distributed.index() == 0:
        work()
    distributed.wait_for_all("work of the first")


def is_first() -> bool:
    """Whether this is process 0, or the only one."""
    if _watch is None:
        return True
    from qwen_jax import distributed

    return distributed.index() == 0


def end_together(status: int) -> int:
    """For an exit status that every process has: it ends the job in good order, whatever it is."""
    global _watch
    if _watch is not None:
        _watch.done()
        _watch = None
    return status


def _in_a_step(environment: "os._Environ[str]") -> bool:
    """Whether a cluster has started several processes as one job."""
    counts = [environment.get(name, "1") for name in _COUNTS]
    hosts = environment.get(_HOSTS, "").split(",")
    return len(hosts) > 1 or any(count.isdigit() and int(count) > 1 for count in counts)
