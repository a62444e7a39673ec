"""Ours and transformers in turn, on the same random MoE, in float32, on this CPU.

    python scripts/bench_cpu.py                 # needs the extra: pip install -e ".[parity]"
    python scripts/bench_cpu.py --rounds 9 --json

The model has 229 M parameters: hidden 1024, 4 layers, 16/4 heads of 64, 64 experts of 256, top-8,
vocabulary 8192. Each round runs transformers and then ours; medians over rounds and the median of
the per-round ratios are printed, beside the share of the memory bandwidth measured in the same run
(what a float32 matrix-vector product reads) that the bytes of a decode step amount to.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import qwen_jax as qj
from qwen_jax import generation, sampling
from qwen_jax.model.cache import make_cache, pack

SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 256,
    "norm_topk_prob": True,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


class Theirs:
    """transformers, with a key/value cache."""

    def __init__(self, directory: str):
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        self.cache = None

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        with self.torch.inference_mode():
            out = self.model(self.torch.tensor(tokens), use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        self.next = out.logits[:, -1].argmax(-1)
        return self.next.numpy()

    def decode(self, steps: int) -> np.ndarray:
        made = []
        with self.torch.inference_mode():
            for _ in range(steps):
                out = self.model(
                    self.next[:, None], past_key_values=self.cache, use_cache=True, logits_to_keep=1
                )
                self.next = out.logits[:, -1].argmax(-1)
                made.append(self.next.numpy())
        return np.stack(made, 1)


class Ours:
    """The generate loop of `qwen_jax.generation`."""

    def __init__(self, directory: str):
        self.runtime = qj.Runtime.make(mesh={"tensor": 1}, dtype="float32")
        self.config, self.params, _ = qj.load(directory, runtime=self.runtime)
        self.model = (self.params, self.config, self.runtime)

    def prefill(self, tokens: np.ndarray, new_tokens: int) -> np.ndarray:
        rows, length = tokens.shape
        settings = [sampling.RowSettings(temperature=0.0)] * rows
        row_sampling = sampling.RowSampling.make(settings, self.config.text.vocab_size)
        limits = jnp.full(rows, new_tokens, jnp.int32)
        self.rows = generation.Rows(row_sampling, limits, jnp.zeros(rows, jnp.int32))
        self.options = generation.Options(sampling.Features.of(row_sampling), new_tokens)
        width = -(-(length + new_tokens) // self.runtime.page_size)
        table = np.arange(rows * width, dtype=np.int32).reshape(rows, width)
        batch = pack(list(tokens), [0] * rows, table, num_tokens=rows * length)
        cache = make_cache(self.config.text, self.runtime, rows * width)
        jax.block_until_ready((batch, cache))
        began = time.perf_counter()
        x_BD, cache = generation.jit_prefill(*self.model, batch, cache)
        where = (batch.page_table, batch.kv_lens)
        self.state = generation.jit_first(
            *self.model, x_BD, cache, *where, self.rows, None, options=self.options
        )
        first = np.asarray(self.state.tokens[:, 0])
        self.prefill_seconds = time.perf_counter() - began
        return first

    def decode(self, steps: int) -> np.ndarray:
        before = int(self.state.count[0])
        self.state = generation.jit_advance(
            *self.model, self.state, self.rows, jnp.int32(steps), options=self.options
        )
        return np.asarray(self.state.tokens[:, before : before + steps])


def bandwidth() -> float:
    """Bytes per second that a float32 matrix-vector product reads from memory."""
    w = jnp.ones((8192, 16384), jnp.float32)  # 512 MiB: far beyond the caches
    product = jax.jit(lambda x, w: x @ w)
    x = jnp.ones((1, 8192), jnp.float32)
    product(x, w).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        product(x, w).block_until_ready()
        times.append(time.perf_counter() - began)
    return w.nbytes / statistics.median(times)


def decode_bytes(rows: int) -> float:
    """Bytes of the weights that one decode step must read, with uniform routing."""
    d, h = SIZES["hidden_size"], SIZES["head_dim"]
    heads = 2 * SIZES["num_attention_heads"] + 2 * SIZES["num_key_value_heads"]
    experts, active = SIZES["num_experts"], SIZES["num_experts_per_tok"]
    distinct = experts * (1 - (1 - active / experts) ** rows)
    layer = d * h * heads + d * experts + distinct * 3 * d * SIZES["moe_intermediate_size"]
    return 4 * (SIZES["num_hidden_layers"] * layer + d * SIZES["vocab_size"])


def write_model(directory: str) -> None:
    """A random checkpoint, as transformers writes it."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, initializer_range=0.05))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", file=sys.stderr)
    model.save_pretrained(directory)


def measure(theirs: Theirs, ours: Ours, rows: int, length: int, steps: int, rounds: int) -> dict:
    """Both in turn; returns medians in milliseconds and ratios (theirs / ours)."""
    tokens = np.random.default_rng(rows).integers(0, SIZES["vocab_size"], (rows, length))
    times: dict[str, list[float]] = {k: [] for k in ("hf_pre", "our_pre", "hf_dec", "our_dec")}
    for round_ in range(rounds + 1):  # the first warms both up
        began = time.perf_counter()
        first = theirs.prefill(tokens)
        hf_prefill = time.perf_counter() - began
        began = time.perf_counter()
        made = theirs.decode(steps)
        hf_decode = (time.perf_counter() - began) / steps
        our_first = ours.prefill(tokens, steps + 8)
        ours.decode(2)
        began = time.perf_counter()
        ours.decode(steps)
        our_decode = (time.perf_counter() - began) / steps
        agreed = bool((first == our_first).all())
        if not agreed:
            raise SystemExit(f"first tokens differ: {first} and {our_first}")
        if round_:
            for key, value in zip(
                times, (hf_prefill, ours.prefill_seconds, hf_decode, our_decode), strict=True
            ):
                times[key].append(value)
    same = float(np.mean(made[:, : steps - 2] == np.asarray(ours.state.tokens)[:, 1 : steps - 1]))
    ratio = {
        part: statistics.median(
            a / b for a, b in zip(times[f"hf_{part}"], times[f"our_{part}"], strict=True)
        )
        for part in ("pre", "dec")
    }
    return {
        "rows": rows,
        "prompt": length,
        "prefill_ms": {k: 1e3 * statistics.median(times[f"{k}_pre"]) for k in ("hf", "our")},
        "decode_ms": {k: 1e3 * statistics.median(times[f"{k}_dec"]) for k in ("hf", "our")},
        "prefill_ratio": ratio["pre"],
        "decode_ratio": ratio["dec"],
        "same_tokens": same,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps per round")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as directory:
        write_model(directory)
        theirs, ours = Theirs(directory), Ours(directory)
    results = []
    for rows, length in ((1, 512), (8, 64)):
        result = measure(theirs, ours, rows, length, args.steps, args.rounds)
        rate = bandwidth()
        moved = decode_bytes(rows) / (result["decode_ms"]["our"] / 1e3)
        result |= {"bandwidth_gb_s": rate / 1e9, "decode_share_of_bandwidth": moved / rate}
        results.append(result)
        if not args.json:
            print(
                f"{rows} rows of {length}: prefill {result['prefill_ms']['hf']:.0f} ms theirs, "
                f"{result['prefill_ms']['our']:.0f} ms ours, ratio {result['prefill_ratio']:.2f}; "
                f"decode {result['decode_ms']['hf']:.1f} and {result['decode_ms']['our']:.1f} ms "
                f"per step, ratio {result['decode_ratio']:.2f}, {moved / 1e9:.1f} of "
                f"{rate / 1e9:.1f} GB/s ({100 * moved / rate:.0f} %); "
                f"{100 * result['same_tokens']:.0f} % of tokens equal",
                flush=True,
            )
    if args.json:
        print(json.dumps({"cpus": os.cpu_count(), "jax": jax.__version__, "results": results}))


if __name__ == "__main__":
    main()
