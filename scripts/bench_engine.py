"""The engine's throughput at several numbers of requests at once, and what its host costs.

    python scripts/bench_engine.py                      # a random 200 M model, on this machine
    python scripts/bench_engine.py --model Qwen/Qwen3-0.6B --concurrency 1 8 --new-tokens 128 --json

For each number, so many requests of random tokens begin together; a round that compiles, then
timed ones, of which the fastest counts. "step" is the time of a decode step in the engine, "loop"
that of `qwen_jax.generate`, whose steps never see the host, on the same rows. "host" is what the
engine itself works per step, "waited" the share of the round in which it waited for the device.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

import qwen_jax as qj
from qwen_jax.sampling import RowSettings

_BOTH = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
RANDOM = {  # config.json
    "moe": _BOTH  # that of bench_cpu.py
    | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 256,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "dense": _BOTH
    | {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "intermediate_size": 4096,
        "num_hidden_layers": 12,
    },
}


def open_llm(args: argparse.Namespace) -> qj.LLM:
    """The model, or the random one; one row for each request."""
    options = {
        "max_model_len": args.prompt_len + args.new_tokens,
        "max_num_seqs": max(args.concurrency),
        "dtype": args.dtype,
    }
    if args.model:
        return qj.LLM(args.model, load_format=args.load_format, **options)
    with tempfile.TemporaryDirectory() as directory:
        pathlib.Path(directory, "config.json").write_text(json.dumps(RANDOM[args.random]))
        return qj.LLM(directory, load_format="dummy", **options)


def measure(llm: qj.LLM, args: argparse.Namespace, count: int) -> dict:
    """The fastest of several rounds of ``count`` requests."""
    params = qj.SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=args.new_tokens)
    rng = np.random.default_rng(count)
    best: dict = {}
    for round_ in range(args.rounds + 1):
        # New prompts each time: the engine would find old ones in its cache.
        ids = rng.integers(0, llm.config.text.vocab_size, (count, args.prompt_len))
        before, began = llm.totals, time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        seconds, spent = time.perf_counter() - began, llm.totals - before
        if round_ and (not best or seconds < best["seconds"]):
            decode_steps = args.new_tokens - 1
            best = {
                "requests": count,
                "seconds": seconds,
                "tokens_per_s": spent.generated_tokens / seconds,
                "step_ms": 1e3 * spent.decode_time / decode_steps,
                "host_ms": 1e3 * spent.host_time / spent.steps,
                "waited": spent.wait_time / seconds,
            }
    return best | {"loop_ms": loop_ms(llm, args, count)}


def loop_ms(llm: qj.LLM, args: argparse.Namespace, count: int) -> float:
    """A decode step of the functional loop: its time for all tokens less that for one."""
    rng = np.random.default_rng(count)
    tokens = rng.integers(0, llm.config.text.vocab_size, (count, args.prompt_len)).tolist()
    settings = RowSettings(temperature=0.0)
    fastest = {}
    for new in (1, args.new_tokens):
        times = []
        for _ in range(args.rounds + 1):
            began = time.perf_counter()
            state = qj.generate(
                llm.params,
                llm.config,
                tokens,
                max_new_tokens=new,
                runtime=llm.runtime,
                settings=settings,
            )
            jax.block_until_ready(state.tokens)
            times.append(time.perf_counter() - began)
        fastest[new] = min(times[1:])
    return 1e3 * (fastest[args.new_tokens] - fastest[1]) / (args.new_tokens - 1)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="default: a random one")
    parser.add_argument(
        "--random",
        choices=RANDOM,
        default="dense",
        help="dense (200 M parameters: every row shares all weights), or moe (229 M: 16 rows read "
        "4.4 times the weights that one does)",
    )
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--prompt-len", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64, help="at least 2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    llm = open_llm(args)
    print(f"{llm.plan}, {os.cpu_count()} CPUs, jax {jax.__version__}", file=sys.stderr)
    results: list[dict] = []
    for count in args.concurrency:
        results.append(measure(llm, args, count))
        r = results[-1]
        if not args.json:
            print(
                f"{count:3} requests: {r['tokens_per_s']:8.1f} tok/s "
                f"({r['tokens_per_s'] / results[0]['tokens_per_s']:.2f} x), "
                f"step {r['step_ms']:.2f} ms, loop {r['loop_ms']:.2f} ms, "
                f"host {r['host_ms']:.3f} ms per step, waited {r['waited']:.0%}",
                flush=True,
            )
    if args.json:
        device = jax.devices()[0].device_kind
        print(json.dumps({"device": device, "jax": jax.__version__, "results": results}))


if __name__ == "__main__":
    main()
