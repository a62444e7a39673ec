"""Jobs of two real processes with four virtual devices each, for tests."""

import contextlib
import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
CLI = ("-m", "qwen_jax.cli")
LOST_WITHIN = 30  # seconds, until a process ends that has lost another
# XLA ends a process of a CPU that waits 40 s for another one, which may still compile on a busy
# machine.
XLA_FLAGS = (
    "--xla_backend_optimization_level=0 --xla_cpu_collective_timeout_seconds=600 "
    "--xla_cpu_collective_call_terminate_timeout_seconds=600"
)


@contextlib.contextmanager
def job(*command, stdin=("", ""), each=((), ())):
    """Starts ``command`` as two processes of a job; yields them, and kills what is left."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "4",
        "XLA_FLAGS": XLA_FLAGS,
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
    }
    started = []
    for process, own in enumerate(each):
        who = (f"--coordinator=localhost:{port}", "--num-processes=2", f"--process-id={process}")
        one = subprocess.Popen(
            [sys.executable, *command, *own, *who],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(one)
    try:
        for one, text in zip(started, stdin, strict=True):
            one.stdin.write(text)
            one.stdin.close()
            one.stdin = None
        yield started
    finally:
        for one in started:
            one.kill()
            one.communicate()


def results(*command, **how):
    """Runs a job to its end: status, stdout and stderr of each process."""
    with job(*command, **how) as started:
        texts = [one.communicate(timeout=280) for one in started]
        return [(one.returncode, *text) for one, text in zip(started, texts, strict=True)]
