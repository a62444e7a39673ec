"""Writes tests/golden: what transformers computes on the tiny checkpoints of tests/tiny.

The default tests compare with these files, and so need neither torch nor transformers. Running this
again with the same versions gives the same arrays up to float32 rounding.
"""

import argparse
import json
import pathlib
import platform
import tempfile

import hf_reference
import numpy as np
import tiny
import torch
import transformers

PROMPTS = (1, 7, 33, 130)
GREEDY_AFTER, GREEDY_TOKENS = 33, 16
LADDER_PROMPT = 7
NEAREST_TIE = 1e-4  # float32 noise must not decide which expert or token is taken


def golden(variant: str, scratch: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything kept of one variant, by name.

    Raises:
        ValueError: a choice of expert or token is so near a tie that it could flip.
    """
    config = tiny.VARIANTS[variant]
    own = tiny.write(scratch / variant, variant)
    quantised = "quantization_config" in config
    twin = tiny.write(scratch / f"{variant}_twin", variant, dequantised=True) if quantised else own
    model = hf_reference.load(twin)
    found = {"digest": np.array(tiny.digest(own)), "versions": np.array(json.dumps(versions()))}
    for length in PROMPTS:
        tokens = tiny.prompt(length, config["vocab_size"])
        found[f"tokens_{length}"] = tokens
        found[f"logits_{length}"] = hf_reference.logits(model, tokens)
        _check(variant, hf_reference.routing_gap(hf_reference.ladder(model, tokens)), "an expert")
    tokens = found[f"tokens_{GREEDY_AFTER}"]
    greedy = found["greedy"] = hf_reference.greedy(model, tokens, GREEDY_TOKENS)
    after = hf_reference.logits(model, np.concatenate([tokens, greedy]))[len(tokens) - 1 : -1]
    best = np.sort(after, axis=-1)[:, ::-1]
    _check(variant, float((best[:, 0] - best[:, 1]).min()), "a greedy token")
    found["rope_cos"], found["rope_sin"] = hf_reference.rope(model, max(PROMPTS))
    return found | one_layer_of_each_kind(
        hf_reference.ladder(model, found[f"tokens_{LADDER_PROMPT}"])
    )


def one_layer_of_each_kind(ladder: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of a whole ladder the last dense layer and the last one with experts."""
    layers = {name.split(".")[0] for name in ladder}
    sparse = sorted(layer for layer in layers if f"{layer}.router_probs" in ladder)
    kept = {*sparse[-1:], *sorted(layers.difference(sparse))[-1:]}
    return {name: x for name, x in ladder.items() if name.split(".")[0] in kept}


def versions() -> dict[str, str]:
    """What made a golden file."""
    used = {"transformers": transformers, "torch": torch, "numpy": np}
    return {"python": platform.python_version(), **{k: m.__version__ for k, m in used.items()}}


def _check(variant: str, gap: float, what: str) -> None:
    if gap < NEAREST_TIE:
        raise ValueError(
            f"{variant}: {what} is chosen by {gap:.1e}, nearer a tie than {NEAREST_TIE}; "
            "change tiny.SEED"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: PYTHONPATH=tests python scripts/make_goldens.py --out tests/golden",
    )
    parser.add_argument("--out", type=pathlib.Path, required=True, help="directory of the files")
    parser.add_argument("--variant", action="append", help="only this one (repeatable)")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for variant in args.variant or tiny.VARIANTS:
        with tempfile.TemporaryDirectory() as scratch:
            found = golden(variant, pathlib.Path(scratch))
        path = args.out / f"{variant}.npz"
        np.savez_compressed(path, **found)
        print(f"{path}: {path.stat().st_size:,} bytes, {len(found)} arrays")


if __name__ == "__main__":
    main()
