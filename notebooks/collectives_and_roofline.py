# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Collectives and the roofline
#
# How fast can a model be on a machine that you do not have? Three numbers of a chip bound every
# step: bytes per second of its memory, operations per second, and bytes per second of its links. A
# step's needs follow from shapes and rules; and for TPUs the compiler itself runs anywhere, so its
# program can be looked at before a chip is rented.
#
# The arithmetic needs no accelerator. The compiled part wants the package libtpu (`pip install
# libtpu`, any Linux machine) and no TPU; without it programs are compiled for eight CPU devices.
# It takes about a minute. Lines marked `change this line` are where to play.

# %%
# On Colab this installs the project; where it is installed it does nothing.
import importlib.util
import subprocess
import sys

PACKAGE = "qwen-jax[notebook]"  # change this line to a path or a git URL to install that
if importlib.util.find_spec("qwen_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", PACKAGE], check=True)

# %%
import jax

jax.config.update("jax_platforms", "cpu")  # remove these two lines on a machine with accelerators
jax.config.update("jax_num_cpu_devices", 8)

import dataclasses

import matplotlib.pyplot as plt
import numpy as np

import qwen_jax as qj
from qwen_jax import roofline
from qwen_jax.planner.chips import CHIPS, Topology
from qwen_jax.planner.collectives import of_step
from qwen_jax.planner.compiled import compile_step, topology_devices
from qwen_jax.planner.plan import Load, abstract_runtime
from qwen_jax.planner.search import search
from qwen_jax.weights.presets import preset

config = preset("Qwen/Qwen3-30B-A3B")  # change this line: see qwen_jax/weights/presets.py

# %% [markdown]
# ## The roofline
#
# **Intensity** is operations for each byte that is read. Below the ridge a chip waits for its
# memory, above it for its arithmetic. The lines are published figures of chips, the points are
# steps of the model on eight devices: a decode step with one token of each row (1 to 512 rows with
# 4,096 tokens of context), and a prefill chunk of 2,048 tokens.
#
# Decoding stays far to the left: twice the rows is nearly twice the tokens per second, until all
# experts are read anyway and each row brings its own cache.

# %%
SHOWN = ("v5e", "v6e", "v7x", "h200")
runtime = abstract_runtime({"expert": 8}, "dp-attention+ep", Load())
works = {
    f"{rows}": roofline.decode_work(config, runtime, rows=rows, context=4096)
    for rows in (1, 8, 64, 512)
}
works["prefill"] = roofline.prefill_work(config, runtime, rows=1, length=2048)

figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
intensity = np.logspace(-1, 4, 200)
for name in SHOWN:
    chip = CHIPS[name]
    axis.plot(
        intensity, np.minimum(intensity * chip.bandwidth, chip.rate("bfloat16")) / 1e12, label=name
    )
chip = CHIPS["v6e"]  # change this line: whose roof the points are under
for label, work in works.items():
    x = work.flops / work.bytes
    y = min(x * chip.bandwidth, chip.rate("bfloat16")) / 1e12
    axis.plot(x, y, "o", color="black", zorder=3)
    text = "prefill of 2,048" if label == "prefill" else f"{label} row{'s' * (label != '1')}"
    white = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axis.annotate(text, (x, y), xytext=(9, -13), textcoords="offset points", bbox=white)
axis.set(
    xscale="log",
    yscale="log",
    xlabel="operations for each byte read",
    ylabel="TFLOP/s that a device can reach",
    title=f"Qwen3-30B-A3B in bfloat16 on eight devices, under the roof of {chip.name}",
)
axis.grid(alpha=0.3)
axis.legend(title="device")
plt.show()

# %% [markdown]
# ## What limits a plan
#
# `search` plans all meshes and strategies of a topology by arithmetic. For the best plan of every
# strategy: the least milliseconds of a decode step that each resource needs. If they overlapped
# perfectly the longest bar would be the step.

# %%
topology = Topology.parse("v6e:4x4")  # change this line: "v5e:4x4", "v7x:2x2x2", "h200:8"
asked = Load(batch=128, context=8192)
plans = search(config, topology, asked)
best = {}
for plan in plans:
    best.setdefault(plan.strategy, plan)
best = dict(list(best.items())[:6])
fits = {"best": plans[0].fits}
parts = {"memory": "tab:blue", "arithmetic": "tab:green", "links": "tab:orange"}

figure, axis = plt.subplots(figsize=(10, 4.4), layout="constrained")
y = np.arange(len(best))
for i, (part, colour) in enumerate(parts.items()):
    times = [getattr(plan.decode, part) * 1e3 for plan in best.values()]
    drawn = axis.barh(y + (i - 1) * 0.27, times, height=0.25, color=colour, label=part)
    axis.bar_label(drawn, fmt="%.2f", padding=3, fontsize=8)
names = [f"{p.strategy} ({','.join(f'{a}={n}' for a, n in p.mesh.items())})" for p in best.values()]
axis.set_yticks(
    y,
    [
        name if plan.fits else f"{name}, does not fit"
        for name, plan in zip(names, best.values(), strict=True)
    ],
)
axis.invert_yaxis()
axis.set(xscale="log", xlim=(0.01, 300))
axis.set(
    xlabel="ms of a decode step",
    title=f"{asked.batch} rows of {asked.context:,} tokens on {topology}: least time by resource",
)
axis.legend(title="resource", loc="upper right")
plt.show()

# %% [markdown]
# ## Ask the compiler
#
# XLA compiles for a TPU topology with libtpu alone. Two layers of the model at full width, a decode
# step of 64 rows, on eight devices with three strategies. What comes back is the program that would
# run: which collectives it has, and how much memory it wants.

# %%
TOPOLOGY = "v5e:2x4"  # change this line
if importlib.util.find_spec("libtpu") is None:
    TOPOLOGY, targets = "8 CPU devices", jax.devices()
else:
    targets = topology_devices(TOPOLOGY)
print(f"compiling for {TOPOLOGY}")
ROWS = 64
two = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=2))
tried = {"ep": "expert=8", "ep+tp": "expert=4,tensor=2", "dp-attention+ep": "expert=8"}
compiled, expected = {}, {}
for strategy, mesh in tried.items():
    target = qj.Runtime.make(mesh=mesh, strategy=strategy, devices=targets, config=two)
    compiled[strategy] = compile_step(
        two, target, tokens=ROWS, rows=ROWS, pages=ROWS * 16, table_width=16
    )
    expected[strategy] = of_step(two, target, tokens=ROWS, rows=ROWS)
    program = compiled[strategy]
    print(
        f"{strategy} ({mesh}): compiled in {program.seconds:.1f} s, "
        f"temporary {program.temporary / 1e6:.1f} MB on each device"
    )
    for (op, size), count in sorted(program.collectives.items(), key=lambda item: -item[0][1]):
        print(f"    {op:20} {size:>11,} bytes  x {count}")

# %% [markdown]
# The planner's list says what each message is for. Side by side, in one layer after the other: the
# bytes of all results of collectives, in the program and by arithmetic. The logits, gathered once
# where the vocabulary is split, are left out: they would hide the rest. Where the program has less,
# the compiler has found something: for TPU it adds the experts' sums in bfloat16, half of what
# the planner counts.

# %%
LOGITS = ROWS * config.text.vocab_size * 4


def total(messages):
    """MB of results, logits apart: of (op, bytes) -> count, or of planned collectives."""
    if isinstance(messages, dict):
        pairs = [(size, count) for (_, size), count in messages.items()]
    else:
        pairs = [(each.bytes, each.count) for each in messages]
    return sum(size * count for size, count in pairs if size != LOGITS) / 1e6


figure, axis = plt.subplots(figsize=(8, 3.8), layout="constrained")
x = np.arange(len(tried))
bars = {
    "compiled program": [total(compiled[s].collectives) for s in tried],
    "arithmetic": [total(expected[s]) for s in tried],
}
for i, (label, heights) in enumerate(bars.items()):
    drawn = axis.bar(x + (i - 0.5) * 0.38, heights, width=0.36, label=label)
    axis.bar_label(drawn, fmt="%.2f")
axis.set_xticks(x, [f"{name}\n{mesh}" for name, mesh in tried.items()])
axis.set(
    ylabel="MB on each device",
    title=f"Results of collectives: decode of {ROWS} rows, two layers, {TOPOLOGY}",
)
axis.margins(y=0.12)
axis.legend()
plt.show()

# %% [markdown]
# ## To go on
#
# * `qwen-jax plan --model … --topology … ` compiles the full model's step and holds it against the
#   memory; `--search` ranks strategies; `--json` is for programs.
# * `scripts/compile_tpu.py` does it for many models and topologies.
# * `jax.profiler` shows on real chips what of the messages was hidden behind arithmetic.
