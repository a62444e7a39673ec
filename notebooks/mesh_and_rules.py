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
# # Mesh and rules
#
# A model is sharded by two values: a **mesh**, which arranges devices along named axes, and
# **rules**, which say over which axes each dimension of the model is split. Both are data. Nothing
# in the model's code mentions a device.
#
# This notebook needs no accelerator: a CPU plays eight devices. It takes about ten seconds.
# Lines marked `change this line` are where to play.

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

import matplotlib.pyplot as plt
import numpy as np
from jax.sharding import NamedSharding

import qwen_jax as qj
from qwen_jax import sharding
from qwen_jax.dims import parse
from qwen_jax.functional import load
from qwen_jax.model.cache import make_cache, pack
from qwen_jax.model.step import jit_step
from qwen_jax.weights import derive
from qwen_jax.weights.params import table
from qwen_jax.weights.presets import preset

# %% [markdown]
# ## Letters
#
# Every dimension of the model has a letter, the same one everywhere: in einsums, in the table of
# weights, in the rules. A weight is a row of letters:
#
# | | | | |
# |---|---|---|---|
# | `D` width | `N` query heads | `K` key/value heads | `H` head size |
# | `E` experts | `F` width of an expert | `P` gate and up | `V` vocabulary |
# | `T` tokens | `B` rows (sequences) | `I` width of a dense MLP | `R` outputs of the router |
#
# Here are the weights of one layer of Qwen3-30B-A3B: no weight is loaded, a table is read.

# %%
config = preset("Qwen/Qwen3-30B-A3B")
rows = table(config)
layer = rows.layers[0]
for row in (
    layer.attn.q,
    layer.attn.k,
    layer.attn.o,
    layer.mlp.router,
    layer.mlp.gate_up,
    layer.mlp.down,
):
    name = row.name.partition("layers.0.")[2]
    print(f"{name:34}  {row.dims:8}  {row.shape}")

# %% [markdown]
# ## A mesh
#
# Eight devices as four rows of two. The axes have names; what they are for is up to the rules.

# %%
mesh = sharding.make_mesh("expert=4,tensor=2")  # change this line: "expert=8", "tensor=8" …
print(dict(mesh.shape))

# %% [markdown]
# ## Rules
#
# A rule names the mesh axes of a letter. With the rules below each device holds the heads and the
# experts of its own row and column. A letter without a rule is whole on every device.

# %%
rules = qj.Rules.of(E="expert", N="tensor", K="tensor", V="tensor")  # change this line: F="tensor"
for row in (layer.attn.q, layer.mlp.gate_up, layer.mlp.router):
    spec = sharding.spec(row.dims, mesh, rules, row.size, row.name)
    shard = NamedSharding(mesh, spec).shard_shape(row.shape)
    print(f"{row.dims:8} {row.shape!s:22} -> {spec!s:55} each device: {shard}")

# %% [markdown]
# What cannot be split is an error with the numbers in it, and never quietly replicated:

# %%
try:
    three = sharding.make_mesh("expert=3,tensor=2")  # six of the eight devices
    sharding.spec(layer.mlp.gate_up.dims, three, rules, layer.mlp.gate_up.size, "the experts")
except ValueError as error:
    print(error)

# %% [markdown]
# JAX draws who holds what. The vocabulary is split over `tensor`, so each half lies on four
# devices: the columns of the picture are rows of the embedding, the numbers are devices.

# %%
place = NamedSharding(mesh, sharding.spec("V D", mesh, rules))
jax.debug.visualize_sharding((64, 16), place, use_color=False)

# %% [markdown]
# ## Strategies are named rules
#
# The picture shows two weights of a layer with four strategies on the same eight devices: above the
# experts' first matrix (experts × their width), below the queries' (heads × model width). A colour
# is a device; where several devices hold the same piece, their numbers stand in it.
#
# With `ep` alone attention is whole everywhere. `tp-attention+ep` uses all devices for both. With
# `dp-attention+ep` each device computes the attention of its own rows, so more of it is repeated;
# what that buys is in `cache_and_long_context`.

# %%
COLOURS = plt.get_cmap("tab10")
SHOWN = {  # change these lines: any of sharding.STRATEGIES, any mesh of eight
    "tp": "tensor=8",
    "ep": "expert=8",
    "tp-attention+ep": "expert=4,tensor=2",
    "dp-attention+ep": "expert=4,tensor=2",
}


def holders(shape, place):
    """(row bounds, column bounds) -> numbers of the devices that hold this part."""
    found = {}
    for device, index in place.devices_indices_map(shape).items():
        key = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        found.setdefault(key, []).append(device.id)
    return found


def draw(axis, letters, sizes, mesh, rules):
    """Who holds which part of an array of two dimensions."""
    shape = tuple(sizes[letter] for letter in letters)
    place = NamedSharding(mesh, sharding.spec(" ".join(letters), mesh, rules))
    for ((top, bottom), (left, right)), devices in holders(shape, place).items():
        corner, width, height = (left, top), right - left, bottom - top
        colour = "dimgrey" if len(devices) == mesh.size else COLOURS(devices[0])
        axis.add_patch(
            plt.Rectangle(corner, width, height, facecolor=colour, edgecolor="white", lw=2)
        )
        text = "all" if len(devices) == mesh.size else ",".join(map(str, devices))
        middle = ((left + right) / 2, (top + bottom) / 2)
        axis.annotate(text, middle, ha="center", va="center", color="white", fontweight="bold")
    axis.set(xlim=(0, shape[1]), ylim=(shape[0], 0))
    axis.set(xlabel=f"{letters[1]} ({shape[1]:,})", ylabel=f"{letters[0]} ({shape[0]})")


figure, axes = plt.subplots(2, 4, figsize=(13, 6), layout="constrained")
for (name, shape), column in zip(SHOWN.items(), axes.T, strict=True):
    own, named = sharding.make_mesh(shape), sharding.strategy(name)
    for axis, row, letters in zip(
        column, (layer.mlp.gate_up, layer.attn.q), ("EF", "ND"), strict=True
    ):
        draw(axis, letters, row.size, own, named)
    column[0].set_title(f"{name}\n{shape}")
figure.suptitle("Who holds what: experts (above) and queries (below); numbers are devices")
plt.show()

# %% [markdown]
# ## What it costs: bytes on each device
#
# The same rules give the bytes of every weight on every device, so the memory of a strategy is
# known before anything is loaded. Experts are 95 % of this model: whoever does not split them does
# not fit. What a strategy leaves whole, each device pays for.

# %%
GROUPS = {"experts": "E", "attention": "NK", "embedding and head": "V"}


def bytes_by_group(config, mesh, rules):
    """Gigabytes on each device, by what the weights are for."""
    found = dict.fromkeys((*GROUPS, "router and norms"), 0.0)
    shapes, places = derive.abstract(config), derive.shardings(config, mesh, rules)
    for row, shape, place in zip(
        *map(jax.tree.leaves, (table(config), shapes, places)), strict=True
    ):
        letters = set(parse(row.dims))
        group = next((g for g, mark in GROUPS.items() if letters & set(mark)), "router and norms")
        found[group] += np.prod(place.shard_shape(shape.shape)) * shape.dtype.itemsize / 1e9
    return found


settings = {
    "tp": "tensor=8",
    "ep": "expert=8",
    "ep+tp": "expert=4,tensor=2",
    "tp-attention+ep": "expert=4,tensor=2",
    "dp-attention+ep": "expert=4,tensor=2",
    "replicated": "expert=8",
}
found = {
    f"{name}\n{shape}": bytes_by_group(config, sharding.make_mesh(shape), sharding.strategy(name))
    for name, shape in settings.items()
}
totals = {name.split("\n")[0]: float(sum(parts.values())) for name, parts in found.items()}

figure, axis = plt.subplots(figsize=(11, 4.4), layout="constrained")
bottom = np.zeros(len(found))
for group in next(iter(found.values())):
    heights = np.array([parts[group] for parts in found.values()])
    axis.bar(list(found), heights, bottom=bottom, label=group)
    bottom += heights
for x, total in enumerate(bottom):
    axis.text(x, min(total, 18.6) + 0.2, f"{total:.1f} GB", ha="center")
axis.axhline(16, color="black", ls="--", lw=1)
axis.text(-0.4, 16.2, "memory of a TPU v5e")
axis.set(ylim=(0, 20), ylabel="GB on each device")
axis.set_title(
    "Qwen3-30B-A3B in bfloat16 on eight devices: weights by strategy (replicated is cut off)"
)
axis.legend(loc="upper left", bbox_to_anchor=(0, 0.8))
plt.show()

# %% [markdown]
# ## The same numbers come out
#
# Sharding changes where numbers are, not what they are. A small model with the same structure and
# random weights (one layer, sixteen experts), on one device and on eight:

# %%
small = {
    "num_hidden_layers": 1,
    "hidden_size": 128,
    "num_experts": 16,
    "moe_intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
}
prompt = [np.arange(1, 24), np.arange(100, 109)]


def logits_of(mesh, strategy):
    """Float32 logits after the last token of each row."""
    runtime = qj.Runtime.make(mesh=mesh, strategy=strategy, dtype="float32", page_size=16)
    config, params, _ = load(
        "Qwen/Qwen3-30B-A3B", runtime=runtime, load_format="dummy", overrides=small
    )
    pages = np.arange(16, dtype=np.int32).reshape(8, 2)
    batch = pack(prompt, [0, 0], pages, num_tokens=64)
    out = jit_step(params, config, runtime, batch, make_cache(config.text, runtime, 16))
    return np.asarray(out.logits[:2])


alone = logits_of("expert=1", "replicated")
differences = {}
for strategy, mesh in (
    ("ep", "expert=8"),
    ("tp-attention+ep", "expert=4,tensor=2"),
):
    differences[strategy] = float(np.abs(logits_of(mesh, strategy) - alone).max())
    print(
        f"{strategy:16} {mesh:18} largest difference {differences[strategy]:.1e}, "
        f"of logits up to {np.abs(alone).max():.1f}"
    )

# %% [markdown]
# ## To go on
#
# * Write a strategy of your own in the line with `Rules.of` and look at the pictures again.
# * `expert_parallelism` shows what devices then have to tell each other, and why some wait.
# * `qwen-jax plan --search` ranks all meshes and strategies for a machine that you do not have.
