"""The demo checkpoint that ships with the package: where it is, and what is said of it.

A very small Qwen3-VL of the real architecture, which `scripts/train_demo.py` trains from nothing.
Knows a directory; imports nothing.
"""

import pathlib

DEMO = str(pathlib.Path(__file__).parent / "demo_checkpoint")
NAME = "qwen-jax-demo"
NOTE = "this is the demo, too small to know much; a real model: --model Qwen/Qwen3-0.6B"
