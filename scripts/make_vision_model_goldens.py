"""Writes tests/golden/vision_model.npz: what transformers computes on a tiny Qwen3-VL-MoE.

The default tests compare with this file, and so need neither torch nor transformers.

Example:
    PYTHONPATH=tests python scripts/make_vision_model_goldens.py
"""

import argparse
import pathlib
import sys

import hf_vision
import numpy as np
import vision_model

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"
NEW_TOKENS = 12
VARIANT, TOWER_CASE = "vl_moe", "two images"


def arrays() -> dict[str, np.ndarray]:
    """The tower's stages for one prompt, and logits and greedy tokens of every case."""
    llm = vision_model.shared_llm(VARIANT)
    model = hf_vision.load(vision_model.directory(VARIANT))
    found = {}
    for case in vision_model.CASES:
        given = vision_model.prompt(llm, case)
        inputs = hf_vision.inputs(given, llm.config)
        found[f"tokens/{case}"] = np.array(given.token_ids, np.int32)
        found[f"logits/{case}"] = hf_vision.logits(model, inputs)
        found[f"greedy/{case}"] = hf_vision.greedy(model, inputs, NEW_TOKENS)
        if case == TOWER_CASE:
            tower = hf_vision.tower(model, inputs)
            found |= {f"tower/{name}": x for name, x in tower.items()}
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="directory to write to")
    path = parser.parse_args(argv).out / "vision_model.npz"
    np.savez_compressed(path, **arrays())
    print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
