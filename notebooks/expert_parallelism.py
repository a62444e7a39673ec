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
# # Expert parallelism
#
# In a mixture of experts every token visits only `A` of `R` experts, and which ones is known when
# it gets there. Split the experts over devices and two questions come up: **who waits** (a device
# whose experts nobody chose has nothing to do) and **what travels** (a token and its experts are
# seldom on the same device). This notebook measures both.
#
# It needs no accelerator: a CPU plays eight devices. It takes about twenty seconds. Lines marked
# `change this line` are where to play. `mesh_and_rules` explains the words.

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
from qwen_jax import expert_dispatch, roofline, sharding
from qwen_jax.functional import load
from qwen_jax.planner.collectives import of_experts
from qwen_jax.planner.compiled import collectives_of, lower_step
from qwen_jax.sampling import RowSettings
from qwen_jax.weights.presets import preset

# %% [markdown]
# ## Where tokens go
#
# The routing is an output of the model. Here it is of a small model with the structure of
# Qwen3-30B-A3B (four layers, 32 experts of which each token visits 4) and random weights, for 512
# random tokens. With a real checkpoint only the line with `load` changes.

# %%
small = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}
DEVICES = 8
runtime = qj.Runtime.make(mesh=f"expert={DEVICES}", strategy="ep", dtype="float32")
config, params, _ = load(
    "Qwen/Qwen3-30B-A3B", runtime=runtime, load_format="dummy", overrides=small
)
tokens = np.random.default_rng(0).integers(1024, size=512)  # change this line: text, or 8 tokens
(routing,) = qj.routing(params, config, [tokens], runtime=runtime)
print("layers, tokens, experts of a token:", routing.shape)
print("the first token's experts in each layer:", *map(list, routing[:, 0].tolist()))

# %% [markdown]
# Count them. A column is an expert, a white line is a border between devices, and 1.0 is the share
# that every expert would get if the router were even. Random weights are far from it: a few experts
# get several times their share, and some next to nothing. Training makes routers more even, and
# your text decides how even they are.

# %%
experts = config.text.num_experts
load_of = np.stack([np.bincount(layer.ravel(), minlength=experts) for layer in routing])
share = load_of / load_of.mean(axis=1, keepdims=True)

figure, axis = plt.subplots(figsize=(11, 2.6), layout="constrained")
picture = axis.imshow(share, aspect="auto", cmap="viridis", vmin=0)
for border in range(experts // DEVICES, experts, experts // DEVICES):
    axis.axvline(border - 0.5, color="white", lw=2)
axis.set(
    xlabel=f"expert ({experts // DEVICES} on each of {DEVICES} devices)",
    ylabel="layer",
    yticks=range(len(share)),
    title=f"Load of every expert, relative to an even router ({len(tokens)} tokens)",
)
figure.colorbar(picture, label="times the even share")
plt.show()

# %% [markdown]
# A device waits for the slowest one, in every layer. So what counts is the busiest device against
# the average: with 2 the expert matmuls take twice as long as they would if rows were even.

# %%
rows_of_a_layer = load_of.sum(1).tolist()
by_device = load_of.reshape(len(load_of), DEVICES, -1).sum(-1)
busiest = by_device.max(1) / by_device.mean(1)

figure, axes = plt.subplots(1, len(by_device), figsize=(12, 3), sharey=True, layout="constrained")
for layer, (axis, rows) in enumerate(zip(axes, by_device, strict=True)):
    colours = ["tab:red" if n == rows.max() else "tab:blue" for n in rows]
    axis.bar(range(DEVICES), rows, color=colours)
    axis.axhline(rows.mean(), color="black", ls="--", lw=1)
    axis.set(title=f"layer {layer}: busiest is {busiest[layer]:.2f}x", xlabel="device")
axes[0].set_ylabel("rows (token, expert)")
figure.suptitle("Rows that each device's experts compute; dashed: the average")
plt.show()

# %% [markdown]
# ## Few tokens: who reads weights
#
# In decode a step has one token of each row of the batch. Then time is not arithmetic but reading
# weights, and what matters is **how many different experts** the tokens chose. For a router that
# draws `A` of `R` evenly the expected number is `R (1 - (1 - A/R)^T)`. With the sizes of
# Qwen3-30B-A3B, 8 tokens already touch 40 % of all experts: a batch is not free until nearly all
# experts are read anyway.
#
# The right picture repeats the experiment with devices: the busiest one reads many more experts
# than the average one when tokens are few and devices are many.

# %%
R, A = 128, 8  # change this line: 160, 8 are those of Qwen3-Coder-480B
SIZES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
full = preset("Qwen/Qwen3-30B-A3B")
rng = np.random.default_rng(0)


def used_experts(tokens, draws=200):
    """bool [draws, R]: the experts that an even router chooses for so many tokens."""
    scores = rng.random((draws, tokens, R))
    chosen = scores.argpartition(A, axis=-1)[..., :A]
    used = np.zeros((draws, R), bool)
    np.put_along_axis(used, chosen.reshape(draws, -1), True, axis=1)
    return used


drawn = {size: used_experts(size) for size in SIZES}
figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
left.plot(SIZES, [used.mean() for used in drawn.values()], "o", label="drawn")
formula = [roofline.distinct_experts(full, size) / 128 for size in SIZES]
left.plot(SIZES, formula, "-", label="$1 - (1 - A/R)^T$")
left.set(
    xscale="log",
    xlabel="tokens in the step",
    ylabel="share of experts that are read",
    ylim=(0, 1.05),
)
left.set_title("A small batch reads few of 128 experts")
left.legend()
uneven = {}
for devices in (4, 8, 32, 128):
    each = [used.reshape(len(used), devices, -1).sum(-1) for used in drawn.values()]
    uneven[devices] = [float(n.max(1).mean() / n.mean()) for n in each]
    right.plot(SIZES, uneven[devices], "o-", label=f"{devices} devices")
right.set(
    xscale="log", yscale="log", xlabel="tokens in the step", ylabel="busiest device / average"
)
right.set_title("Experts read by the busiest device")
right.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
right.legend()
for axis in (left, right):
    axis.set_xticks([1, 8, 64, 512], ["1", "8", "64", "512"])
    axis.grid(alpha=0.3)
plt.show()

# %% [markdown]
# ## What travels: four forms of dispatch
#
# All of them compute the same sums and drop nothing. They differ in what devices send:
#
# * **all-reduce**: every device has all tokens and runs its own experts on them; partial sums of
#   all tokens are added over the devices, in float32.
# * **reduce-scatter**: the same, but each device keeps the sums of its part of the tokens.
# * **all-to-all**: tokens are split too. A token travels to the devices of its experts and one sum
#   comes back from each. Slots have room for the worst case, because shapes are static.
# * **ragged-all-to-all**: the same, but only rows that exist travel. XLA has it on TPU and GPU.
#
# First, that they agree. The runtime names the form; everything else stays as it is.


# %%
def logprobs_of(form):
    """Log probabilities after the last of 64 tokens, by token id."""
    own = dataclasses.replace(runtime, dispatch=form)
    greedy = RowSettings(temperature=0.0)
    rows, everything = [tokens[:64].tolist()], config.text.vocab_size
    state = qj.generate(
        params,
        config,
        rows,
        max_new_tokens=1,
        runtime=own,
        settings=greedy,
        logprobs=everything,
    )
    found = np.zeros(everything, np.float32)
    found[np.asarray(state.logprobs.top_ids[0, 0])] = state.logprobs.top_logprobs[0, 0]
    return found


reference = logprobs_of("all-reduce")
HERE = ("all-reduce", "reduce-scatter", "all-to-all")  # a CPU has no ragged-all-to-all
differences = {form: float(np.abs(logprobs_of(form) - reference).max()) for form in HERE}
print(differences)

# %% [markdown]
# Then what each sends, counted in the compiled program: the name of a collective, the bytes of its
# result on each device, and how often it is there (four layers).

# %%
TOKENS = 512
counted = {}
for form in HERE:
    own = dataclasses.replace(runtime, dispatch=form)
    program = lower_step(config, own, tokens=TOKENS, rows=8, pages=64, table_width=8).compile()
    counted[form] = collectives_of(program.as_text())
    print(form)
    for (op, size), count in sorted(counted[form].items()):
        print(f"    {op:16} {size:>9,} bytes  x {count}")

# %% [markdown]
# At full size the same list is arithmetic. Bytes that each device sends in one layer, for a prefill
# chunk of 2,048 tokens of Qwen3-30B-A3B in bfloat16, as the experts are spread over more devices.
# An all-reduce sends every token's sum whoever computed it. An all-to-all with worst-case slots
# sends as much until tokens are spread thin; the ragged one sends only what a token's 8 experts
# need, which with 64 devices is 8 of 64 copies.

# %%
CHUNK = 2048  # change this line: 64, a decode step
WAYS = [2, 4, 8, 16, 32, 64]
sent = {form: [] for form in expert_dispatch.FORMS}
for ways in WAYS:
    mesh = jax.sharding.AbstractMesh((1, ways, 1), sharding.AXES)
    own = dataclasses.replace(runtime, mesh=mesh, dtype="bfloat16")
    for form, line in sent.items():
        messages = of_experts(full, own, form, CHUNK)
        line.append(sum(each.sent for each in messages) / full.text.num_hidden_layers / 1e6)

figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
for form, line in sent.items():
    axis.plot(WAYS, line, "o--" if form == "all-to-all" else "o-", label=form)
axis.set(
    xscale="log",
    xlabel="devices that share the experts",
    ylabel="MB sent by each device in a layer",
    title=f"What a dispatch sends: {CHUNK:,} tokens of Qwen3-30B-A3B",
    ylim=(0, None),
)
axis.set_xticks(WAYS, list(map(str, WAYS)))
axis.minorticks_off()
axis.grid(alpha=0.3)
axis.legend()
plt.show()

# %% [markdown]
# ## To go on
#
# * Give `tokens` eight entries instead of 512 and look at the load again.
# * `dispatch="auto"` of `Runtime.make` chooses by a rule stated in `qwen_jax/expert_dispatch.py`.
# * `collectives_and_roofline` turns bytes into time on chips that you do not have.
