"""Writes tests/golden/vision.*: what transformers makes of the pictures of tests/vision_samples.

The default tests compare with these files, and so need neither torch nor transformers. Pixel values
are kept as SHA-256 of their float32 bytes, the rest as it is.

Example:
    PYTHONPATH=tests python scripts/make_vision_goldens.py
"""

import argparse
import hashlib
import json
import pathlib
import sys

import numpy as np
import vision_reference as reference
import vision_samples as samples

OUT = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"


def pixels(name: str, picture) -> dict:
    """Grid and digest of a picture's pixel values."""
    values, grid = reference.pixel_values(picture)
    assert values.dtype == np.float32, name
    return {"grid": grid, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


def tables() -> dict:
    """Everything that is small enough to read."""
    frames = samples.noise(5, 64, 96, 3, seed=20)
    patches, grid = reference.video_patches(frames)
    return {
        "transformers": reference.VERSION,
        "pictures": {name: pixels(name, p) for name, p in samples.pictures().items()},
        "image_size": {k: reference.image_size(*v) for k, v in samples.SIZES.items()},
        "video_size": {k: reference.video_size(*v) for k, v in samples.VIDEO_SIZES.items()},
        "sample_indices": {
            k: reference.sample_indices(*v).tolist() for k, v in samples.SAMPLINGS.items()
        },
        "timestamps": reference.timestamps([0, 7, 14, 22, 29], 29.97),
        "video_patches": {"grid": grid, "sha256": hashlib.sha256(patches.tobytes()).hexdigest()},
    }


def arrays() -> dict[str, np.ndarray]:
    """Positions in prompts, and the tower's inputs."""
    found = {}
    for name, runs in samples.MIXES.items():
        positions, delta = reference.rope_index(samples.mix(runs))
        found[f"mrope/{name}"] = np.append(positions.ravel(), delta).astype(np.int32)
    for name, grids in samples.GRIDS.items():
        for field, value in reference.tower_inputs(grids).items():
            small = value.astype(np.float32 if field == "tap_weights" else np.int16)
            found[f"{field}/{name}"] = small
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="directory to write to")
    args = parser.parse_args(argv)
    text = json.dumps(tables(), indent=1) + "\n"
    (args.out / "vision.json").write_text(text, encoding="utf-8")
    np.savez_compressed(args.out / "vision.npz", **arrays())
    for name in ("vision.json", "vision.npz"):
        print(f"{args.out / name}: {(args.out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
