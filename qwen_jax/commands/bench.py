"""`qwen-jax bench`: tokens per second, beside what the machine's bandwidth and arithmetic allow."""

import argparse
import statistics
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import options
from qwen_jax.requests import SamplingParams

if TYPE_CHECKING:
    from qwen_jax.llm import LLM
    from qwen_jax.roofline import Machine, Work

EXAMPLE = (
    "qwen-jax bench --model Qwen3-30B-A3B --load-format dummy --override num_hidden_layers=2"
    " --batch 8"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    for name, default, about in (
        ("batch", 1, "rows"),
        ("prompt-len", 512, "tokens of each prompt, random ones"),
        ("new-tokens", 64, "tokens to generate for each"),
        ("repeats", 3, "timed runs, after one that compiles; the medians are shown"),
    ):
        parser.add_argument(
            f"--{name}", metavar="N", type=int, default=default, help=f"{about} (default {default})"
        )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options.add_seed(parser)
    options.add_model(parser)
    options.add_runtime(parser, rows=False)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model, measures the machine and the model."""
    for name in ("batch", "prompt_len", "new_tokens", "repeats"):
        least = 2 if name == "new_tokens" else 1
        if getattr(args, name) < least:
            raise ValueError(f"bench: --{name.replace('_', '-')} must be at least {least}")
    if args.max_model_len is None:
        args.max_model_len = args.prompt_len + args.new_tokens
    args.max_num_seqs = args.batch
    from qwen_jax import roofline
    from qwen_jax.commands import output, session

    llm = session.open_llm(args)
    session.say(args, "measuring the machine …")
    machine = roofline.measure(llm.runtime.dtype)
    report = _report(args, llm, machine)
    if args.json:
        output.write_json(report)
    else:
        output.write(_text(report) + "\n")
    return 0


def _report(args: argparse.Namespace, llm: "LLM", machine: "Machine") -> dict[str, Any]:
    import jax

    from qwen_jax import roofline
    from qwen_jax.commands import session

    runs = _runs(args, llm)
    rows, length, new = args.batch, args.prompt_len, args.new_tokens
    prefill = roofline.prefill_work(llm.config, llm.runtime, rows=rows, length=length)
    # The first new token comes with prefill; the average context of the others.
    context = length + new / 2
    decode = roofline.decode_work(llm.config, llm.runtime, rows=rows, context=context)
    return {
        "model": args.model,
        "device": jax.devices()[0].device_kind,
        "devices": llm.runtime.mesh.size,
        "dtype": llm.runtime.dtype,
        "kernels": dict(llm.runtime.kernels),
        "batch": rows,
        "prompt_len": length,
        "new_tokens": new,
        "repeats": args.repeats,
        "bandwidth_gb_per_s": machine.bytes_per_s / 1e9,
        "matmul_tflop_per_s": machine.flops_per_s / 1e12,
        "prefill": _rate(rows * length, [r.prefill_time for r in runs], machine, prefill),
        "decode": _rate(rows, [r.decode_time / (new - 1) for r in runs], machine, decode),
        "compile_seconds": llm.totals.compile_time,
        "peak_memory_gb": session.peak_memory() / 1e9,
    }


def _runs(args: argparse.Namespace, llm: "LLM") -> list:
    """The totals of each timed run."""
    import numpy as np

    from qwen_jax.commands import session

    rng = np.random.default_rng(args.seed)

    def generate() -> None:
        # New prompts each time: the engine would find the old ones in its cache.
        ids = rng.integers(llm.config.text.vocab_size, size=(args.batch, args.prompt_len))
        prompts = [{"prompt_token_ids": row} for row in ids]
        llm.generate(prompts, params, use_tqdm=False)

    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=args.new_tokens)
    with session.Compiling(args):
        generate()
    found = []
    for _ in range(args.repeats):
        before = llm.totals
        generate()
        found.append(llm.totals - before)
    return found


def _rate(tokens: int, seconds: list[float], machine: "Machine", work: "Work") -> dict[str, Any]:
    """What was reached, and what could have been."""
    took, least = statistics.median(seconds), machine.seconds(work)
    return {
        "tokens_per_s": tokens / took,
        "seconds": took,
        "bound_tokens_per_s": tokens / least,
        "limited_by": machine.limit(work),
        "share_of_bound": least / took,
        "gb": work.bytes / 1e9,
        "gflop": work.flops / 1e9,
    }


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['model']}, {report['dtype']}, {report['devices']} x {report['device']}, "
        f"batch {report['batch']}, prompt {report['prompt_len']}, new {report['new_tokens']}",
        f"measured here: {report['bandwidth_gb_per_s']:,.1f} GB/s, "
        f"{report['matmul_tflop_per_s']:,.3f} TFLOP/s",
        "",
        f"{'':8} {'tok/s':>12} {'bound':>12} {'share':>7} {'ms':>10} {'GB':>8} {'GFLOP':>9}  limit",
    ]
    for name in ("prefill", "decode"):
        part = report[name]
        lines.append(
            f"{name:8} {part['tokens_per_s']:12,.1f} {part['bound_tokens_per_s']:12,.1f} "
            f"{part['share_of_bound']:7.1%} {part['seconds'] * 1e3:10.2f} {part['gb']:8.3f} "
            f"{part['gflop']:9.2f}  {part['limited_by']}"
        )
    compiling, peak = report["compile_seconds"], report["peak_memory_gb"]
    return "\n".join([*lines, f"compiling {compiling:.1f} s, peak memory {peak:.2f} GB"])
