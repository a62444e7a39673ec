"""`qwen-jax plan`: does it fit on a machine that is not here, and how fast can it be at best?"""

import argparse
import dataclasses
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import options

if TYPE_CHECKING:
    from qwen_jax.planner.plan import Load, Plan
    from qwen_jax.weights.config import ModelConfig
    from qwen_jax.weights.layout import Layout

EXAMPLE = "qwen-jax plan --model Qwen3-30B-A3B --topology v5e:2x4 --batch 8 --context 8192"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    for flag, about in (
        ("topology", "chips and their shape, e.g. v6e:8x8, v5p:4x4x4, v7x:2x2x2, h200:8"),
        ("devices", "the same"),
    ):
        parser.add_argument(f"--{flag}", dest="topology", metavar="KIND:SHAPE", help=about)
    for flag, default, about in (
        ("batch", 1, "rows that decode together"),
        ("context", 4096, "tokens of each row"),
        ("chunk", 2048, "tokens of a prefill step"),
        ("page-size", 64, "tokens of a page"),
    ):
        parser.add_argument(
            f"--{flag}", metavar="N", type=int, default=default, help=f"{about} (default {default})"
        )
    parser.add_argument(
        "--mesh", default="auto", help='e.g. "expert=16,tensor=4" (default: the best one)'
    )
    parser.add_argument(
        "--strategy", choices=options.STRATEGIES, default="auto", help="sharding rules"
    )
    options.add_dispatch(parser)
    parser.add_argument("--dtype", choices=options.DTYPES, default="bfloat16")
    parser.add_argument("--kv-cache-dtype", choices=options.KV_DTYPES, default="auto")
    parser.add_argument("--quantization", choices=options.QUANTIZATIONS, help="requantise on load")
    parser.add_argument("--utilization", metavar="SHARE", type=float, default=0.95)
    parser.add_argument(
        "--fast", action="store_true", help="arithmetic only: do not compile for a TPU"
    )
    parser.add_argument("--search", action="store_true", help="all meshes and strategies, ranked")
    parser.add_argument(
        "--layout", action="store_true", help="also every parameter: how it is split, its bytes"
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="also a picture (.png, .svg, .pdf): memory, and the bounds"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options.add_model(parser)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Plans; 0 also where nothing fits: the plan says so."""
    if not args.model:
        raise ValueError("plan: a model is needed, for example --model Qwen3-30B-A3B")
    if not args.topology:
        raise ValueError("plan: a machine is needed, for example --topology v6e:4x4 or h200:8")
    if args.plot and (args.search or not args.plot.endswith((".png", ".svg", ".pdf"))):
        raise ValueError(f"plan: --plot {args.plot}: a .png, .svg or .pdf of one plan, no --search")
    from qwen_jax.commands import output, plan_text
    from qwen_jax.commands.info import locate
    from qwen_jax.planner.chips import Topology
    from qwen_jax.planner.search import search
    from qwen_jax.sharding import parse_mesh
    from qwen_jax.weights.checkpoint import read_config

    topology = Topology.parse(args.topology)
    config = read_config(locate(args), dict(args.config_override) or None)
    plans = search(
        config,
        topology,
        _load(args),
        mesh=None if args.mesh == "auto" else parse_mesh(args.mesh),
        strategy=args.strategy,
        dispatch=args.dispatch,
    )
    if args.search:
        if args.json:
            output.write_json([report(config, plan) for plan in plans])
        else:
            output.write(plan_text.ranking([report(config, plan) for plan in plans]) + "\n")
        return 0
    plan, found = _best(args, config, plans[0])
    if args.plot:
        _plot(args.plot, args.model, found)
    if args.json:
        output.write_json(found)
    else:
        output.write(plan_text.lines(args.model, found) + "\n")
        if args.layout:
            output.write(f"\n{_layout(config, plan)}\n")
    return 0


def _load(args: argparse.Namespace) -> "Load":
    from qwen_jax.planner.plan import Load

    return Load(
        batch=args.batch,
        context=args.context,
        chunk=args.chunk,
        dtype=args.dtype,
        kv_dtype=args.kv_cache_dtype,
        quantization=args.quantization,
        page_size=args.page_size,
        utilization=args.utilization,
    )


def _best(
    args: argparse.Namespace, config: "ModelConfig", plan: "Plan"
) -> "tuple[Plan, dict[str, Any]]":
    """The plan, compiled where that is possible, and its report, with a proposal if it must be.

    What does not fit by arithmetic is not compiled: the compiler refuses it.
    """
    from qwen_jax.planner.search import propose

    if plan.topology.chip.platform == "tpu" and plan.fits and not args.fast:
        plan = _compiled(args, config, plan)
    found = report(config, plan)
    if not plan.fits:
        better = propose(config, plan.topology, plan.load)
        found["proposal"] = None if better is None else report(config, better)
    return plan, found


def _plot(file: str, model: str, found: dict[str, Any]) -> None:
    from qwen_jax.commands.plan_plot import figure

    figure(model, found).savefig(file, dpi=150)


def _layout(config: "ModelConfig", plan: "Plan") -> "Layout":
    from qwen_jax.planner.plan import abstract_runtime
    from qwen_jax.weights.layout import layout_of
    from qwen_jax.weights.requantize import requantized

    load = plan.load
    mesh = abstract_runtime(plan.mesh, plan.rules, load).mesh
    return layout_of(requantized(config, load.quantization), mesh, plan.rules, load.dtype)


def _dispatch(config: "ModelConfig", plan: "Plan") -> dict[str, Any]:
    """Bytes that a device sends for its experts in a step, for every form that could run."""
    from qwen_jax.expert_dispatch import FORMS, check
    from qwen_jax.planner.collectives import of_experts
    from qwen_jax.planner.plan import abstract_runtime

    runtime = abstract_runtime(plan.mesh, plan.rules, plan.load, plan.dispatch)
    found: dict[str, Any] = {"asked": plan.dispatch, "forms": {}}
    if not config.text.num_experts:
        return found
    where = {"mesh": runtime.mesh, "rules": runtime.rules}
    steps = {"decode": plan.load.batch, "prefill": plan.load.chunk}
    found |= {step: runtime.dispatch_of(n, config.text.hidden_size) for step, n in steps.items()}
    for form in FORMS:
        try:
            check(form, **where, platform=plan.topology.chip.platform)
        except ValueError:  # this mesh or chip has no such form
            continue
        found["forms"][form] = {
            step: sum(c.sent for c in of_experts(config, runtime, form, n))
            for step, n in steps.items()
        }
    return found


def _compiled(args: argparse.Namespace, config: "ModelConfig", plan: "Plan") -> "Plan":
    from qwen_jax.commands import session
    from qwen_jax.planner.check import check

    session.say(args, f"compiling a decode step and a prefill chunk for {plan.topology} …")
    return check(config, plan)


def report(config: "ModelConfig", plan: "Plan") -> dict[str, Any]:
    """A plan as JSON."""
    gb = {name: getattr(plan, name) for name in ("weights", "cache", "temporary", "peak", "limit")}
    return {
        "topology": str(plan.topology),
        "devices": plan.topology.devices,
        "mesh": dict(plan.mesh),
        "strategy": plan.strategy,
        "rules": str(plan.rules),
        "load": dataclasses.asdict(plan.load),
        "fits": plan.fits,
        "excess": plan.excess,
        "bytes_per_device": gb,
        "kv_tokens": plan.kv_tokens,
        "collectives": [{**dataclasses.asdict(c), "sent": c.sent} for c in plan.collectives],
        "kernels": dict(plan.kernels),
        "dispatch": _dispatch(config, plan),
        "expert_imbalance": plan.imbalance,
        "bound": {
            "decode_tokens_per_s": plan.decode_tokens_per_s,
            "prefill_tokens_per_s": plan.prefill_tokens_per_s,
            "limited_by": plan.decode.limited_by,
            "prefill_limited_by": plan.prefill.limited_by,
            "decode_seconds": dataclasses.asdict(plan.decode),
            "prefill_seconds": dataclasses.asdict(plan.prefill),
        },
        "source": plan.source,
        "proposal": None,
    }
