"""Every form of expert dispatch computes what a float64 loop over tokens computes, and sends what
is planned for it."""

import collections
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding

from qwen_jax import sharding
from qwen_jax.expert_dispatch import FORMS, chance, messages, resolve
from qwen_jax.model.moe import moe
from qwen_jax.planner.program_text import collectives_of
from qwen_jax.runtime import Runtime
from qwen_jax.sharding import STRATEGIES, Rules, make_mesh
from qwen_jax.weights import hf_config
from qwen_jax.weights.params import Moe

D, F, R, A = 32, 16, 16, 3
RUNNABLE = [form for form in FORMS if form != "ragged-all-to-all"]


@functools.cache
def config():
    text = tiny.VARIANTS["moe"]
    return hf_config.from_hf(
        {
            **text,
            "hidden_size": D,
            "moe_intermediate_size": F,
            "num_experts": R,
            "num_experts_per_tok": A,
        }
    ).text


def runtime(mesh: str, strategy: str | Rules, form: str, dtype: str = "float32") -> Runtime:
    return Runtime.make(mesh=mesh, strategy=strategy, dispatch=form, dtype=dtype)


def weights(bias: float = 0.0) -> dict[str, np.ndarray]:
    """Of float32; with ``bias`` the router's first columns are alike, so that tokens crowd."""
    rng = np.random.default_rng(0)
    router = rng.normal(size=(D, R)).astype(np.float32)
    router[0] = bias * (np.arange(R) < A)
    gate_up = rng.normal(size=(R, 2, D, F)).astype(np.float32) / np.sqrt(D)
    down = rng.normal(size=(R, F, D)).astype(np.float32) / np.sqrt(F)
    return {"router": router, "gate_up": gate_up, "down": down}


def stream(tokens: int) -> np.ndarray:
    x = np.random.default_rng(tokens).normal(size=(tokens, D)).astype(np.float32)
    x[:, 0] = 1.0  # the router's bias
    return x


def oracle(arrays: dict[str, np.ndarray], x: np.ndarray, real: int) -> np.ndarray:
    """Token by token, expert by expert, in float64."""
    router, gate_up, down = (arrays[k].astype(np.float64) for k in ("router", "gate_up", "down"))
    out = np.zeros(x.shape)
    for t in range(real):
        scores = np.exp(x[t].astype(np.float64) @ router)
        best = np.argsort(-scores)[:A]
        for expert in best:
            gate, up = (x[t] @ gate_up[expert, half] for half in (0, 1))
            hidden = gate / (1 + np.exp(-gate)) * up
            out[t] += scores[expert] / scores[best].sum() * (hidden @ down[expert])
    return out


def placed(arrays: dict[str, np.ndarray], machine: Runtime) -> Moe:
    """On their devices by the rules."""
    dims = {"router": "D R", "gate_up": "E P D F", "down": "E F D"}
    return Moe(
        **{
            name: jax.device_put(
                array,
                NamedSharding(machine.mesh, sharding.spec(dims[name], machine.mesh, machine.rules)),
            )
            for name, array in arrays.items()
        }
    )


def layer(moe_weights: Moe, x, is_token, machine: Runtime):
    return moe(moe_weights, x, is_token, config(), machine)[0]


def check(machine: Runtime, tokens: int, bias: float = 0.0) -> dict[tuple[str, int], int]:
    """Holds a layer against the oracle, the last tokens being padding; returns what it sends.

    The stream comes and goes as the rules of T have it.
    """
    rules = sharding.for_tokens(machine.rules, machine.mesh, tokens)
    place = NamedSharding(machine.mesh, sharding.spec("T D", machine.mesh, rules))
    arrays, x, real = weights(bias), stream(tokens), max(1, tokens - 2)
    given = (placed(arrays, machine), jax.device_put(x, place), jnp.arange(tokens) < real)
    lowered = jax.jit(layer, static_argnames="machine", out_shardings=place).lower(*given, machine)
    program = lowered.compile()
    np.testing.assert_allclose(program(*given), oracle(arrays, x, real), rtol=1e-5, atol=1e-5)
    return collectives_of(program.as_text())


def planned(machine: Runtime, form: str, tokens: int) -> dict[tuple[str, int], int]:
    sent = messages(
        form,
        mesh=machine.mesh,
        rules=machine.rules,
        tokens=tokens,
        width=D,
        dtype="float32",
        experts=R,
        active=A,
    )
    assert sent
    return collections.Counter((m.op, m.bytes) for m in sent)


CASES = [
    ("expert=4,tensor=2", "ep+tp", 24),
    ("data=2,expert=2,tensor=2", "dp-attention+ep", 24),
    ("data=2,expert=2,tensor=2", "sp+ep+tp", 24),
    ("expert=2,tensor=4", "sp+ep", 24),
    ("expert=2,tensor=4", "sp+ep", 4),  # a decode step: fewer tokens than devices
]


@pytest.mark.parametrize(("mesh", "strategy", "tokens"), CASES)
@pytest.mark.parametrize("form", RUNNABLE)
def test_a_form_adds_up_each_tokens_experts_and_sends_what_is_planned(mesh, strategy, tokens, form):
    machine = runtime(mesh, strategy, form)
    assert check(machine, tokens) == planned(machine, form, tokens)


@pytest.mark.parametrize("form", RUNNABLE)
@pytest.mark.parametrize(("tokens", "bias"), [(1, 0.0), (13, 50.0)])
def test_odd_numbers_of_tokens_and_crowds_lose_nothing(form, tokens, bias):
    """With the bias every token goes to the same three experts, all of one device."""
    machine = runtime("data=2,expert=4", Rules.of(E=("data", "expert")), form)
    assert check(machine, tokens, bias) == planned(machine, form, tokens)


def emulated(operand, output, starts, sent, places, got, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do, from gathered copies of everything."""
    gather = functools.partial(jax.lax.all_gather, axis_name=axis_name)
    operands, all_starts, all_sent, all_places = map(gather, (operand, starts, sent, places))
    me = jax.lax.axis_index(axis_name)
    at = jnp.arange(output.shape[0])
    for sender in range(operands.shape[0]):
        start, size, place = (x[sender, me] for x in (all_starts, all_sent, all_places))
        row = jnp.clip(at - place + start, 0, len(at) - 1)
        here = (at >= place) & (at < place + size) & (got[sender] == size)
        output = jnp.where(here[:, None], operands[sender][row], output)
    return output


@pytest.mark.parametrize(("mesh", "strategy", "tokens"), CASES[2:4])
def test_ragged_rows_arrive_where_they_are_looked_for(mesh, strategy, tokens, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
    machine = runtime(mesh, strategy, "auto")
    check(Runtime(**{**vars(machine), "dispatch": "ragged-all-to-all"}), tokens)


def test_the_chance_of_a_device_is_what_drawing_gives():
    rng = np.random.default_rng(0)
    drawn = np.array([rng.permutation(64)[:8] // 8 for _ in range(4000)])  # on 8 devices
    share = np.mean([(drawn == device).any(axis=1).mean() for device in range(8)])
    assert chance(64, 8, 8) == pytest.approx(share, abs=0.01)
    assert chance(64, 8, 1) == 1


@pytest.mark.parametrize(
    ("strategy", "tokens", "dtype", "form"),
    [
        ("ep", 64, "bfloat16", "all-reduce"),
        ("ep", 128, "bfloat16", "reduce-scatter"),  # 128 x 2048 in float32 are a mebibyte
        ("ep", 8192, "float32", "all-reduce"),
        ("sp+ep", 8, "float32", "reduce-scatter"),
        ("sp+ep", 3, "bfloat16", "all-reduce"),  # tokens that do not divide stay whole
    ],
)
def test_auto_follows_its_rule(strategy, tokens, dtype, form):
    given = {"mesh": make_mesh("expert=8"), "rules": STRATEGIES[strategy]}
    assert resolve("auto", **given, tokens=tokens, width=2048, dtype=dtype) == form
    assert resolve("all-to-all", **given, tokens=8, width=8, dtype=dtype) == "all-to-all"


@pytest.mark.parametrize(
    ("strategy", "form", "message"),
    [
        ("ep", "alltoall", r"dispatch 'alltoall' is unknown; use auto, all-reduce, .*ragged"),
        ("tp", "all-to-all", r"split no experts over mesh .*'tensor': 2.*E is over no axis"),
        ("ep", "ragged-all-to-all", r"no ragged-all-to-all for cpu, only for tpu, gpu; use all-to"),
    ],
)
def test_a_form_that_cannot_run_is_refused_with_the_reason(strategy, form, message):
    with pytest.raises(ValueError, match=message):
        runtime("expert=4,tensor=2", strategy, form)


def test_the_form_and_the_rule_of_auto_are_logged(caplog):
    caplog.set_level(logging.INFO, logger="qwen_jax")
    runtime("expert=8", "ep", "all-to-all")
    runtime("expert=8", "ep", "auto")
    assert "dispatch: all-to-all\n" in caplog.text
    assert "dispatch: all-reduce, or reduce-scatter where the rules split T" in caplog.text
