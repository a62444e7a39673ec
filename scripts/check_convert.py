"""Checks `convert` at size: its memory, that a kill -9 half-way loses nothing, and its speed.

Writes a random mixture-of-experts checkpoint of the asked size, converts it in a process that is
killed half-way, finishes the conversion in a second process, converts once more without a kill, and
compares the two results byte by byte. Needs Linux (for /proc) and three times the size on the disk.

    python scripts/check_convert.py --gigabytes 4 --directory /tmp
"""

import argparse
import filecmp
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import ml_dtypes
import numpy as np

from qwen_jax.weights.safetensors import INDEX_NAME, save_file

WIDTH, EXPERT_WIDTH, HEADS, KV_HEADS, HEAD = 2048, 768, 32, 4, 128  # Qwen3-30B-A3B's
VOCABULARY = 32768
BOUND = 1.5  # peak memory above the base, in largest leaves


def model_config(gigabytes: float) -> dict:
    """As many layers and experts of Qwen3-30B-A3B's shape as make up the size."""
    expert = 3 * WIDTH * EXPERT_WIDTH * 2
    rest = 2 * VOCABULARY * WIDTH * 2
    experts = 128 if gigabytes > 2 else 32
    layers = max(1, round((gigabytes * 1e9 - rest) / (experts * expert)))
    return {
        "model_type": "qwen3_moe",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
        "intermediate_size": 6144,
        "moe_intermediate_size": EXPERT_WIDTH,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "torch_dtype": "bfloat16",
    }


def layer_shapes(config: dict, layer: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of one decoder layer."""
    at = f"model.layers.{layer}."
    yield f"{at}input_layernorm.weight", (WIDTH,)
    yield f"{at}post_attention_layernorm.weight", (WIDTH,)
    for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
        yield f"{at}self_attn.{name}_proj.weight", (heads * HEAD, WIDTH)
    yield f"{at}self_attn.o_proj.weight", (WIDTH, HEADS * HEAD)
    yield from ((f"{at}self_attn.{x}_norm.weight", (HEAD,)) for x in "qk")
    yield f"{at}mlp.gate.weight", (config["num_experts"], WIDTH)
    for expert in range(config["num_experts"]):
        yield f"{at}mlp.experts.{expert}.gate_proj.weight", (EXPERT_WIDTH, WIDTH)
        yield f"{at}mlp.experts.{expert}.up_proj.weight", (EXPERT_WIDTH, WIDTH)
        yield f"{at}mlp.experts.{expert}.down_proj.weight", (WIDTH, EXPERT_WIDTH)


def write_checkpoint(directory: pathlib.Path, gigabytes: float) -> int:
    """Writes it, one file per layer; returns its bytes."""
    config = model_config(gigabytes)
    rng = np.random.default_rng(0)
    where, total = {}, 0
    ends = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "lm_head.weight": (VOCABULARY, WIDTH)}
    shards = [{**ends, "model.norm.weight": (WIDTH,)}]
    shards += [dict(layer_shapes(config, i)) for i in range(config["num_hidden_layers"])]
    for i, shapes in enumerate(shards):
        tensors = {name: random_bfloat16(rng, shape) for name, shape in shapes.items()}
        file = f"model-{i:05d}.safetensors"
        save_file(directory / file, tensors)
        where |= dict.fromkeys(shapes, file)
        total += sum(x.nbytes for x in tensors.values())
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": where}))
    (directory / "config.json").write_text(json.dumps(config))
    return total


def random_bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Random signs, mantissas and exponents, none of them NaN."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    return ((bits & 0x8FFF) | 0x3000).view(ml_dtypes.bfloat16)


def resident(field: str) -> int:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its peak."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def convert_here(source: str, out: str) -> None:
    """What the child processes run: converts, and prints progress and memory as JSON lines."""
    import jax

    from qwen_jax.weights.checkpoint import convert

    jax.devices()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    base, start, busy = resident("VmRSS"), time.monotonic(), time.process_time()
    convert(source, out, progress=lambda t: print(json.dumps([t.done, t.total]), flush=True))
    seconds, above = time.monotonic() - start, resident("VmHWM") - base
    told = {"base": base, "above": above, "seconds": seconds, "cpu": time.process_time() - busy}
    print(json.dumps(told), flush=True)


def run_child(source: pathlib.Path, out: pathlib.Path, kill_at: float | None) -> dict:
    """Converts in a process of its own; kills it when that part of the bytes is written."""
    command = [sys.executable, __file__, "--child", str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            told = json.loads(line)
            if isinstance(told, dict):
                return told
            if kill_at is not None and told[0] >= kill_at * told[1]:
                child.send_signal(signal.SIGKILL)
                return {"killed_at": told[0] / told[1]}
    raise SystemExit("the conversion failed")


def stamps(directory: pathlib.Path) -> dict[str, int]:
    """When each array file was written, of arrays whose files are all there."""
    journal = (directory / "journal.jsonl").read_text().splitlines()
    lines = (json.loads(line) for line in journal[1:])
    arrays = [name for kind, _, what in lines if kind == "leaf" for name in what]
    files = (path for name in arrays for path in (directory / "params" / name).iterdir())
    return {str(path.relative_to(directory)): path.stat().st_mtime_ns for path in files}


def differences(one: pathlib.Path, other: pathlib.Path) -> list[str]:
    """Names of array files that are not equal."""
    names = {str(p.relative_to(x)) for x in (one, other) for p in x.rglob("*") if p.is_file()}
    _, unequal, missing = filecmp.cmpfiles(one, other, sorted(names), shallow=False)
    clock = "params/_CHECKPOINT_METADATA"  # orbax notes the time
    return [name for name in unequal + missing if name != clock]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where to work")
    parser.add_argument("--kill-at", type=float, default=0.5, help="part of the bytes")
    parser.add_argument("--child", nargs=2, metavar=("SOURCE", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.child:
        convert_here(*options.child)
        return 0
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="check_convert_") as work:
        return check(pathlib.Path(work), options.gigabytes, options.kill_at)


def check(work: pathlib.Path, gigabytes: float, kill_at: float) -> int:
    """Runs the whole check; returns the exit code."""
    source = work / "source"
    source.mkdir()
    size, config = write_checkpoint(source, gigabytes), model_config(gigabytes)
    largest = 2 * max(
        config["num_experts"] * 2 * EXPERT_WIDTH * WIDTH, VOCABULARY * WIDTH
    )  # bfloat16
    print(f"checkpoint      {size / 1e9:.2f} GB, largest leaf {largest / 1e6:.0f} MB")
    killed = run_child(source, work / "killed", kill_at)
    print(f"killed          at {killed['killed_at']:.0%} of the bytes")
    finished = stamps(work / "killed.partial")
    if (work / "killed").exists():
        print("FAILED: the killed conversion has its name already")
        return 1
    runs = {
        "resumed": run_child(source, work / "killed", None),
        "in one go": run_child(source, work / "whole", None),
    }
    for name, run in runs.items():
        share = run["above"] / largest
        print(
            f"{name:15} {run['seconds']:.1f} s ({run['cpu']:.1f} s of processors), base "
            f"{run['base'] / 1e6:.0f} MB, peak {run['above'] / 1e6:.0f} MB above it: {share:.2f} "
            f"of the largest leaf (bound {BOUND})"
        )
    again = [f for f, t in finished.items() if (work / "killed" / f).stat().st_mtime_ns != t]
    unequal = differences(work / "killed", work / "whole")
    print(f"written again   {len(again)} of {len(finished)} files that were finished at the kill")
    print(f"different       {len(unequal)} files: {unequal[:5]}")
    fits = all(run["above"] <= BOUND * largest for run in runs.values())
    good = fits and not again and not unequal
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
