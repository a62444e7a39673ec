"""The training run: it learns, resumes as if it had not stopped, and writes what loading reads."""

import itertools
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tiny
from demo import files, run, tokenizer, training, weights
from demo.schedule import AGAIN, CONSTANT, WARM, Schedule

from qwen_jax.model.cache import KVCache
from qwen_jax.model.text import Decoded
from qwen_jax.weights import checkpoint

STEPS = 4


def begin(directory):
    return run.begin(directory, seed=1, lines=1, schedule=Schedule.of_steps(STEPS))


@pytest.fixture(scope="module", autouse=True)
def _a_small_model_compiles_sooner():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "READ", 1000)
        patch.setitem(files._TEXT, "num_hidden_layers", 1)
        patch.setitem(files._VISION, "depth", 1)
        patch.setitem(files._VISION, "deepstack_visual_indexes", [0])
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from its first step to its last."""
    running = begin(tmp_path_factory.mktemp("whole"))
    lines = list(run.train(running, log_every=1, questions=1))
    assert len(lines) == running.step + 1 == STEPS + 1  # the quiz is the last
    return running


def test_a_resumed_run_ends_as_one_that_never_stopped(whole, tmp_path):
    stopped = begin(tmp_path / "run")
    for _ in itertools.islice(run.train(stopped, log_every=1, questions=0), STEPS // 2):
        pass
    run.save(stopped)
    assert stopped.step == STEPS // 2
    resumed = run.resume(tmp_path / "run")
    for _ in run.train(resumed, questions=0):
        pass
    jax.tree.map(np.testing.assert_array_equal, resumed.state, whole.state)
    with pytest.raises(ValueError, match="holds a run already"):
        begin(tmp_path / "run")


def test_a_batch_is_learned(whole):
    batch = next(run.batches(whole))
    step = training.make_step(whole.config, whole.machine)
    state, losses = jax.tree.map(jnp.copy, whole.state), []
    for _ in range(5):
        state, loss = step(state, batch, jnp.float32(3e-3))
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]


def test_every_weight_gets_a_gradient(whole):
    first = whole.state.moments[1].mu  # Adam's mean of the gradients
    for path, leaf in jax.tree.leaves_with_path(first):
        assert float(jnp.abs(leaf).max()) > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("experts", "shares", "wanted"),
    [
        ([[0, 1], [2, 3]], [0.25, 0.25, 0.25, 0.25], 1.0),
        ([[0, 1], [0, 1]], [0.5, 0.5, 0.0, 0.0], 2.0),
        ([[0, 1], [0, 2]], [0.4, 0.3, 0.2, 0.1], 4 * (0.5 * 0.4 + 0.25 * 0.3 + 0.25 * 0.2)),
    ],
)
def test_idle_experts_cost(experts, shares, wanted):
    even = jnp.full((2, 4), 0.25)
    out = Decoded(
        x_TD=jnp.zeros((2, 1)),
        cache=KVCache((), ()),
        experts=(jnp.array(experts), jnp.array([[0, 1], [2, 3]])),
        shares=(jnp.array([shares, shares]), even),
    )
    assert float(training.imbalance(out)) == pytest.approx((wanted + 1) / 2)


def test_what_the_tower_leaves_untold_costs(whole):
    batch = next(run.batches(whole))
    shown = np.full_like(batch.shown, -1)
    shown[:2] = [[3, 5], [4, -1]]
    batch = batch.replace(shown=shown)
    logits = jnp.zeros((len(shown), 8)).at[1, 4].set(9.0)
    wanted = (2 * np.log(8) + np.log(np.exp(9) + 7) - 9) / 3
    assert float(training.untold(logits, batch)) == pytest.approx(wanted, rel=1e-5)
    nothing = batch.replace(shown=np.full_like(shown, -1))
    assert float(training.untold(logits, nothing)) == 0.0


def test_the_checkpoint_holds_the_weights_in_bfloat16(whole):
    loaded = checkpoint.load(whole.out, runtime=whole.machine)
    assert loaded.config == whole.config

    def same(trained, read):
        rounded = np.asarray(trained).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(rounded.astype(np.float32), np.asarray(read))

    jax.tree.map(same, whole.state.params, loaded.params)


def test_the_writer_makes_the_bytes_that_another_one_makes(tmp_path):
    wide = np.arange(6, dtype=np.float32).reshape(2, 3)
    for length in range(1, 9):  # of a name: every padding of the header
        tensors = {"b" * length: wide, "a": wide.T.astype(ml_dtypes.bfloat16)}
        weights.save(tmp_path / "ours", tensors)
        tiny.save_safetensors(tmp_path / "theirs", tensors)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_a_run_by_minutes_ends_when_they_are_over():
    schedule, seconds, step = Schedule(minutes=10), 0.0, 0
    while not schedule.is_over(step):
        step, seconds = step + 1, seconds + 0.5
        schedule = schedule.after(step, seconds, 2.0)
    assert seconds == pytest.approx(600, abs=1)
    assert schedule.falls == pytest.approx(1200 * CONSTANT, abs=2)
    assert schedule.rate(schedule.falls) == 1.0
    assert schedule.rate(schedule.ends - 1) == pytest.approx(0.02, abs=1e-3)
    assert Schedule.of_steps(1200).rate(WARM // 2 - 1) == 0.5
    assert Schedule(minutes=10).prolonged(300.0, 20).minutes == 25
    with pytest.raises(ValueError, match="ends at step"):
        schedule.prolonged(seconds, 20)
    again = schedule.again(100)
    assert (again.falls, again.ends) == (step, step + 100)
    assert again.rate(step) == pytest.approx(AGAIN)
    assert again.rate(step + 50) == pytest.approx(AGAIN * 0.51)
    assert not again.is_over(step + 99)
    assert again.is_over(step + 100)
    with pytest.raises(ValueError, match="is not over"):
        Schedule(minutes=10).again(100)
    assert json.loads(json.dumps(vars(schedule))) == vars(schedule)
