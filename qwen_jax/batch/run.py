"""A batch from files to files, with a model: what `qj.run_batch` and `qwen-jax batch` call."""

import asyncio
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from qwen_jax.batch.inputs import Inputs
from qwen_jax.batch.job import Job, MakeAnswer
from qwen_jax.batch.outputs import Outputs
from qwen_jax.batch.progress import Meter, Summary
from qwen_jax.batch.shard import Shard
from qwen_jax.engine.led import led
from qwen_jax.openai.answerer import Answerer
from qwen_jax.openai.batch_lines import Answer
from qwen_jax.openai.fetch import Fetcher
from qwen_jax.openai.kinds import answer
from qwen_jax.openai.media import MediaSource

Path = str | os.PathLike
_GRACE = 30.0
_COMPILE_TIMEOUT = 60.0  # seconds for a schema: nobody waits for it
_PER_ROW = 2  # requests in flight for each row of the engine


class Interrupted(KeyboardInterrupt):
    """A batch was stopped by ctrl-C or SIGTERM; ``summary`` says how far it was."""

    def __init__(self, summary: Summary):
        super().__init__()
        self.summary = summary


def only_data_urls() -> MediaSource:
    """Pictures and videos that are in the lines themselves, and no others."""
    return MediaSource(Fetcher((), most=0, timeout=1.0), None, {"image": 32, "video": 2})


def run_batch(
    llm: Any,
    inputs: Path | Sequence[Path],
    output: Path,
    *,
    resume: bool = False,
    retry_errors: bool = False,
    shard: str | Shard = "0/1",
    errors: Path | None = None,
    model_names: Sequence[str] = (),
    seed: int = 0,
    in_flight: int | None = None,
    media: MediaSource | None = None,
    grace: float = _GRACE,
    progress: Callable[[Summary], None] | None = None,
    on_stop: Callable[[], None] | None = None,
) -> Summary:
    """Answers the lines of OpenAI batch files; an answer that is written is never made again.

    Args:
        llm: an `LLM`. Of several processes that each have one, each does a part of the shard. If
            they have one together all call this: process 0 reads and writes, all get the result.
        inputs: paths of .jsonl, .jsonl.gz and .parquet files, directories of them, or patterns. A
            line holds ``custom_id``, ``method``, ``url`` and ``body``.
        output: the file for the answers; what is wrong with lines goes to one beside it. Of
            several shards each has a file of its own, out-00000-of-00004.jsonl.
        resume: go on with an output that is there, or begin it; False: it must not be there.
        retry_errors: do the lines again that have failed.
        shard: "i/n": every n-th line from line i on.
        errors: the error file; default: out.errors.jsonl for out.jsonl.
        model_names: what ``model`` in a line may be; default: what the LLM was made from.
        seed: of the lines that bring none.
        in_flight: requests in the engine at once; default: two for each of its rows.
        media: where pictures may come from; default: data: URLs only.
        grace: seconds for what runs when ctrl-C or SIGTERM stops the batch; a second one drops it.
        progress: is called every second.
        on_stop: is called when a stop is heard.

    Returns:
        how many lines there were, and what became of them.

    Raises:
        ValueError: the input cannot be read, or the output is that of another batch.
        FileExistsError: there is an output, and ``resume`` is False.
        Interrupted: it was stopped; everything that was finished is written.
        RuntimeError: the engine has stopped.
    """
    names = tuple(model_names) or (llm.name,)
    part = _own_part(shard if isinstance(shard, Shard) else Shard.parse(shard), llm)
    paths = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    outputs = Outputs(pathlib.Path(output), None if errors is None else pathlib.Path(errors), part)

    def work() -> str:
        lines = Inputs(paths, but_not=(outputs.output, outputs.errors))
        options = {**describe(llm), "model_names": list(names), "seed": seed}
        batch = outputs.begin(lines, options, resume=resume)
        if retry_errors:
            outputs.forget_errors()
        done = outputs.done(lines)
        meter = Meter(
            llm.engine.stats,
            total=lines.count(part),
            completed=done.completed,
            failed=done.failed,
        )
        job = Job(
            lines.items(part, done.lines),
            lines,
            outputs,
            batch,
            meter,
            in_flight=in_flight or _PER_ROW * llm.engine.max_rows,
        )
        make_answer = functools.partial(_answering, llm, names, media or only_data_urls())
        with _Stops(job, grace, on_stop) as stops:
            _run(job, make_answer, lambda: progress and progress(meter.summary()))
        return json.dumps([stops.came, dataclasses.asdict(meter.summary())])

    with contextlib.closing(outputs):
        stopped, counts = json.loads(led(llm.engine, llm.forms.compiled, work))
    if stopped:
        raise Interrupted(Summary(**counts))
    return Summary(**counts)


def describe(llm: Any) -> dict[str, Any]:
    """What the answers of a model depend on, for a manifest: another one gives other answers."""
    leaves = jax.tree_util.tree_leaves_with_path(llm.params)
    weights = [(jax.tree_util.keystr(path), str(x.dtype), x.shape) for path, x in leaves]
    template = "" if llm.template is None else llm.template.source
    return {
        "model": llm.name,
        "config": _digest(repr(llm.config)),
        "weights": _digest(repr(weights)),
        "template": _digest(template),
        "sampling": repr(llm.get_default_sampling_params()),
        "media": repr(llm.inputs.media_options),
        "dtype": llm.runtime.dtype,
        "kv_cache_dtype": llm.runtime.kv_dtype,
        "max_model_len": llm.max_model_len,
    }


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _own_part(shard: Shard, llm: Any) -> Shard:
    """Of several processes that each have a model, each does a part."""
    if llm.engine.shared:
        return shard
    return shard.split(jax.process_index(), jax.process_count())


@contextlib.contextmanager
def _answering(llm: Any, names: Sequence[str], media: MediaSource) -> Iterator[Answer]:
    answerer = Answerer(
        llm,
        names,
        media=media,
        meter=None,
        request_timeout=None,
        compile_timeout=_COMPILE_TIMEOUT,
    )
    try:
        yield functools.partial(answer, answerer)
    finally:
        answerer.shut()


class _Stops:
    """What ctrl-C and SIGTERM do to a job, while the context is open: the first one stops it, the
    next one drops what runs. On other threads than the main one there are no signals."""

    def __init__(self, job: Job, grace: float, heard: Callable[[], None] | None):
        self._job, self._grace, self._heard = job, grace, heard
        self._before: dict[int, Any] = {}
        self.came = False

    def __enter__(self) -> "_Stops":
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGINT, signal.SIGTERM):
                self._before[kind] = signal.signal(kind, self._stop)
        return self

    def __exit__(self, *error: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _stop(self, *about: Any) -> None:
        self._job.stop(0.0 if self.came else self._grace)
        if self._heard is not None and not self.came:
            self._heard()
        self.came = True


def _run(
    job: Job,
    make_answer: MakeAnswer,
    tell: Callable[[], None],
) -> None:
    """Runs a job on a thread: an event loop may be running on this one, as in a notebook."""
    failures: list[BaseException] = []
    over = threading.Event()

    def work() -> None:
        try:
            asyncio.run(job.run(make_answer))
        except BaseException as error:
            failures.append(error)
        over.set()

    thread = threading.Thread(target=work, name="qwen-jax batch")
    thread.start()
    while not over.wait(1.0):
        tell()
    thread.join()
    tell()
    if failures:
        raise failures[0]
