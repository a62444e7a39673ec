"""A training run in a directory: batches made ahead, a log line now and then, a state to resume.

out/            the checkpoint in Hugging Face's form, as of the last save
out/training/   state.safetensors and run.json, to go on from; log.txt
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from demo import files, lessons, packing, tokenizer, training, weights
from demo.encode import Encoder
from demo.kernels import TEXT_LINE
from demo.quiz import Quiz
from demo.schedule import Schedule
from qwen_jax.runtime import Runtime
from qwen_jax.weights.config import ModelConfig
from qwen_jax.weights.hf_config import from_hf
from qwen_jax.weights.safetensors import SafetensorsFile

AHEAD = 4  # batches


@dataclasses.dataclass
class Run:
    """Everything a run needs; made by `begin` or `resume`."""

    out: pathlib.Path
    seed: int
    shape: packing.Shape
    config: ModelConfig
    machine: Runtime
    encoder: Encoder
    state: training.State
    schedule: Schedule
    only: tuple[str, ...] = ()  # lessons; none: all
    seconds: float = 0.0

    @property
    def step(self) -> int:
        """Steps done."""
        return int(self.state.step)


def begin(
    out: pathlib.Path,
    *,
    seed: int,
    lines: int,
    schedule: Schedule,
    only: tuple[str, ...] = (),
) -> Run:
    """Trains the tokenizer, writes everything but weights, and draws random ones.

    Raises:
        ValueError: there is a run in ``out`` already.
    """
    if (out / "training" / "run.json").exists():
        raise ValueError(f"{out} holds a run already: resume it, or choose another directory")
    files.write(tokenizer.train(seed), out)
    (out / "training").mkdir(exist_ok=True)
    return _ready(out, seed, packing.Shape.of(lines), schedule, only)


def resume(out: pathlib.Path) -> Run:
    """The run in ``out`` as it was last saved."""
    saved = json.loads((out / "training" / "run.json").read_text())
    shape, schedule = packing.Shape(**saved["shape"]), Schedule(**saved["schedule"])
    run = _ready(out, saved["seed"], shape, schedule, tuple(saved["only"]))
    held = SafetensorsFile(out / "training" / f"state-{saved['step']}.safetensors")
    leaves, tree = jax.tree.flatten_with_path(run.state)
    loaded = [jnp.asarray(held.tensor(jax.tree_util.keystr(path))) for path, _ in leaves]
    run.state, run.seconds = tree.unflatten(loaded), saved["seconds"]
    return run


def _ready(out: pathlib.Path, seed: int, shape, schedule, only) -> Run:
    config = from_hf(json.loads((out / "config.json").read_text()))
    machine = training.runtime()
    state = training.start(config, machine, seed)
    encoder = Encoder(out, config)
    return Run(out, seed, shape, config, machine, encoder, state, schedule, only)


def save(run: Run) -> None:
    """The state first, then what names it, then the checkpoint to use; each all or nothing."""
    directory, step = run.out / "training", run.step
    leaves, _ = jax.tree.flatten_with_path(run.state)
    tensors = {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}
    weights.save(directory / f"state-{step}.safetensors", tensors)
    saved = {
        "seed": run.seed,
        "step": step,
        "seconds": run.seconds,
        "shape": dataclasses.asdict(run.shape),
        "schedule": dataclasses.asdict(run.schedule),
        "only": run.only,
    }
    beside = directory / "run.json.part"
    beside.write_text(json.dumps(saved, indent=2) + "\n")
    beside.replace(directory / "run.json")
    for old in directory.glob("state-*.safetensors"):
        if old.name != f"state-{step}.safetensors":
            old.unlink()
    tensors = weights.to_tensors(run.state.params, run.config)
    weights.save(run.out / "model.safetensors", tensors)


def batches(run: Run) -> Iterator[packing.Batch]:
    """The batches from the run's step on, made in a thread while steps run."""
    with ThreadPoolExecutor(1) as pool:

        def make(step: int) -> Any:
            mixture = lessons.mixture_at(step, run.only)
            given = {"seed": run.seed, "step": step, "mixture": mixture}
            return pool.submit(packing.make, run.encoder, run.shape, **given)

        step = run.step
        waiting = [make(step + i) for i in range(AHEAD)]
        while True:
            yield waiting.pop(0).result()
            step += 1
            waiting.append(make(step + AHEAD - 1))


def train(
    run: Run,
    *,
    stop: Callable[[], bool] = lambda: False,
    log_every: int = 100,
    save_every: float = 300.0,
    questions: int = 64,
) -> Iterator[str]:
    """Runs to the end; yields lines for the log. The state is saved as time passes, and at the end.

    Args:
        run: changed as it goes.
        stop: asked after every step; True ends the training here, to be resumed.
        log_every: steps between two lines.
        save_every: seconds between two saves, each with a quiz.
        questions: of each subject, in the quiz; 0: no quiz.
    """
    step_fn = training.make_step(run.config, run.machine)
    quiz = Quiz(run.encoder, run.shape, count=questions) if questions else None
    losses: list[float] = []
    clock = _Clock(run)
    for batch in batches(run):
        if run.schedule.is_over(run.step) or stop():
            break
        rate = training.PEAK_RATE * run.schedule.rate(run.step)
        run.state, loss = step_fn(run.state, batch, jnp.float32(rate))
        losses.append(float(loss))
        speed = clock.tick()
        run.schedule = run.schedule.after(run.step, run.seconds, speed)
        if run.step % log_every == 0:
            yield _line(run, float(np.mean(losses[-log_every:])), rate, speed)
        if clock.since_save() > save_every:
            save(run)
            if quiz is not None:
                yield _scores(run, quiz)
            clock.saved()
    save(run)
    if quiz is not None:
        yield _scores(run, quiz)


class _Clock:
    """Seconds of a run, the compilation before the first step not counted."""

    def __init__(self, run: Run):
        self._run, self._before, self._first = run, run.seconds, run.step
        self._began: float | None = None
        self._saved = time.monotonic()

    def tick(self) -> float:
        """Counts a step; steps per second since the run was begun or resumed."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, self._run.step
            return 1.0
        self._run.seconds = self._before + now - self._began
        return (self._run.step - self._first) / (now - self._began)

    def since_save(self) -> float:
        """Seconds."""
        return time.monotonic() - self._saved

    def saved(self) -> None:
        """Starts to count anew."""
        self._saved = time.monotonic()


def _scores(run: Run, quiz: Quiz) -> str:
    shares = quiz.shares(run.state.params, run.config, run.machine)
    least, most = quiz.busiest(run.state.params, run.config, run.machine)
    told = "  ".join(f"{subject} {share:.0%}" for subject, share in shares.items())
    return (
        f"quiz {run.step:6d}  {told}  (experts get {least:.0%} to {most:.0%} of a layer's tokens)"
    )


def _line(run: Run, loss: float, rate: float, speed: float) -> str:
    left = run.schedule.seconds_left(run.step, run.seconds, speed)
    return (
        f"step {run.step:6d}  loss {loss:.4f}  rate {rate:.2e}  "
        f"{speed * run.shape.lines * TEXT_LINE:,.0f} tok/s  "
        f"{run.seconds / 60:.1f} min done, {left / 60:.1f} min left"
    )
