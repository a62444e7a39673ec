"""Ends a job of several processes when one of them is lost, and says which.

Knows process numbers and stderr. JAX's own heartbeats end a job after 100 s, and at once where
process 0 is lost, which keeps the job together; its words do not say much. So there are two
watchers: a thread, which looks at the sign of life that each process gives every second, and a
child process without JAX, whose only work is to say what happened if this one ends without a word.
The thread counts looks and not seconds, so that a machine that was asleep has lost nobody. Who is
done goes on looking until all are: JAX leaves a job together, and would wait for a lost one.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

import jax

from qwen_jax import distributed

BEAT_SECONDS = 1.0
SILENT_BEATS = 15  # after so many a process is lost: its thread may be held up for some
_FAREWELL = 3 * BEAT_SECONDS  # in which the others read why a process ends
LOST = 1  # exit status
_DONE, _FAILED = "done ", "failed: "
_SIGN = "alive"
# Reads lines; the last one is what to say when the process that writes them is gone.
_LAST_WORDS = """
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
words = ""
for words in sys.stdin:
    pass
if words.strip():
    print(words.strip(), file=sys.stderr, flush=True)
"""


class LastWords:
    """A child that says the last line it was told, once this process has ended."""

    def __init__(self):
        command = [sys.executable, "-S", "-c", _LAST_WORDS]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True)

    def tell(self, words: str) -> None:
        """What to say from now on; nothing for an end that explains itself."""
        assert self._child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it was killed: nobody says anything then
            self._child.stdin.write(f"{words}\n")
            self._child.stdin.flush()


class Watch(threading.Thread):
    """Gives this process's sign of life, and ends the process when another one has none.

    Args:
        name: of this process, for what it says.
        last_words: says what this thread cannot.
    """

    def __init__(self, name: str, last_words: LastWords):
        super().__init__(name="qwen-jax watch", daemon=True)
        self._name, self._last_words = name, last_words
        self._client = distributed.client()
        self._ended = threading.Event()
        self._seen: dict[int, tuple[str, int]] = {}
        self._work = ""  # _DONE, once there is none left
        self._sign("0")

    def run(self) -> None:
        beat = 0
        while not self._ended.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._sign(f"{self._work}{beat}")
                signs = self._client.key_value_dir_get(distributed.key(_SIGN))
            except jax.errors.JaxRuntimeError:
                return  # process 0 does not answer: JAX ends this one, and the child says why
            if self._see({int(key.rpartition("/")[2]): sign for key, sign in signs}):
                self._last_words.tell("")
                return

    def done(self) -> None:
        """This process has nothing more to do; returns when all have said so."""
        self._work = _DONE
        self.join()

    def failed(self, why: str) -> None:
        """This process ends with an error, and the others must too."""
        self._ended.set()
        self.join()
        self._sign(_FAILED + why)
        self._last_words.tell("")
        time.sleep(_FAREWELL)

    def wait_for_news(self) -> None:
        """Gives the loss of another process time to be noticed: it may be why a step failed."""
        self.join((SILENT_BEATS + 2) * BEAT_SECONDS)

    def _sign(self, text: str) -> None:
        place = distributed.key(f"{_SIGN}/{distributed.index()}")
        self._client.key_value_set(place, text, allow_overwrite=True)

    def _see(self, signs: Mapping[int, str]) -> bool:
        """Whether all processes are done; gives up if one of them is lost or has failed."""
        if len(signs) == distributed.count() and all(x.startswith(_DONE) for x in signs.values()):
            return True
        for process, sign in signs.items():
            if process != distributed.index():
                self._look(process, sign)
        return False

    def _look(self, process: int, sign: str) -> None:
        if sign.startswith(_FAILED):
            self._give_up(f"process {process} has failed: {sign.removeprefix(_FAILED)}")
        before, silent = self._seen.get(process, ("", 0))
        silent = silent + 1 if sign == before else 0
        self._seen[process] = (sign, silent)
        if silent >= SILENT_BEATS:
            seconds = round(SILENT_BEATS * BEAT_SECONDS)
            self._give_up(f"process {process} was lost: no sign of it for {seconds} s")

    def _give_up(self, why: str) -> None:
        """Ends the process, whatever its other threads wait for."""
        self._last_words.tell("")
        print(f"{self._name} ends: {why}", file=sys.stderr, flush=True)
        if distributed.index() == 0:  # without it the others could say nothing
            time.sleep(2 * _FAREWELL)
        os._exit(LOST)
