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
# # Cache and long context
#
# Every token leaves a key and a value in every layer, and every later token reads them all. With a
# long context this cache, not the weights, fills the memory and takes the time. This notebook shows
# what a token costs, how the cache is paged, what sharding does to it, and when a step is limited
# by what.
#
# It needs no accelerator and takes about ten seconds. Lines marked `change this line` are where to
# play. `mesh_and_rules` explains the words.

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

import qwen_jax as qj
from qwen_jax import roofline
from qwen_jax.engine.pages import PagePool
from qwen_jax.functional import load
from qwen_jax.model.cache import make_cache, page_bytes
from qwen_jax.planner.chips import CHIPS, Topology
from qwen_jax.planner.plan import Load, abstract_runtime, make_plan
from qwen_jax.weights.presets import preset

# %% [markdown]
# ## What a token costs
#
# Bytes of a token = layers × 2 (key and value) × key/value heads × head size × bytes of a number.
# Grouped-query attention has already divided this by 8: Qwen3-30B-A3B has 32 query heads, and 4
# key/value heads that they share.

# %%
NAMES = (
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-30B-A3B",
    "Qwen/Qwen3-VL-235B-A22B-Instruct",
    "Qwen/Qwen3-Coder-480B-A35B-Instruct",
)
per_token = {}
for name in NAMES:
    text = preset(name).text
    per_token[name] = text.num_hidden_layers * 2 * text.num_key_value_heads * text.head_dim * 2
    long = per_token[name] * 131072 / 1e9
    print(f"{name:38} {per_token[name]:8,} bytes; 128k tokens: {long:5.1f} GB")

# %% [markdown]
# ## Pages
#
# Rows grow at different speeds, so nobody reserves room for the longest: the cache is cut into
# pages of equal size, and each row has a list of pages, wherever they are. Below six rows come,
# grow and go, as in a server; a line is a moment, a square a page, a colour a row, white is free.
# A row's pages are not neighbours, and need not be.

# %%
PAGES, PAGE_SIZE = 28, 16  # change this line: larger pages waste more of each row's last one
rng = np.random.default_rng(3)
pool = PagePool(PAGES)
rows, moments, next_row = {}, [], 0
for moment in range(14):
    if next_row < 6 and moment % 2 == 0:  # a row comes with its prompt
        rows[next_row] = pool.allocate(int(rng.integers(2, 7)))
        next_row += 1
    for row in list(rows):  # rows grow by a page, or end
        if moment > 3 and rng.random() < 0.12:
            pool.release(rows.pop(row))
        elif rng.random() < 0.5:
            (more,) = pool.extend([(rows[row][0], 1)])
            rows[row] += more
    owners = np.full(PAGES, -1)
    for row, pages in rows.items():
        owners[pages] = row
    moments.append(owners)

grid = np.ma.masked_equal(np.array(moments), -1)
figure, axis = plt.subplots(figsize=(11, 4), layout="constrained")
axis.pcolormesh(grid, cmap="tab10", vmin=0, vmax=9, edgecolors="lightgrey", linewidth=0.5)
for moment, owners in enumerate(moments):
    for page, row in enumerate(owners):
        if row >= 0:
            axis.text(
                page + 0.5,
                moment + 0.5,
                str(row),
                ha="center",
                va="center",
                color="white",
                fontsize=8,
            )
axis.invert_yaxis()
axis.set(
    xlabel="page", ylabel="time", title=f"{PAGES} pages of {PAGE_SIZE} positions; numbers are rows"
)
plt.show()

# %% [markdown]
# ## What sharding does to the cache
#
# Heads are split over the axes of `K`, so a device keeps the keys of its own heads. But there are
# only 4 of them here: with eight devices on that axis each head is stored **twice**. The other way
# is to split *rows*: with `dp-attention+ep` each device keeps whole rows, and nothing is doubled.
# `ep` alone keeps the whole cache on every device.
#
# The bars are tokens that fit beside the weights on eight TPU v5e with 16 GB each.

# %%
MODEL = "Qwen/Qwen3-30B-A3B"  # change this line: another name above
config = preset(MODEL)
topology = Topology.parse("v5e:2x4")
settings = {
    "ep": {"expert": 8},
    "tp-attention+ep": {"expert": 4, "tensor": 2},
    "ep+tp": {"expert": 2, "tensor": 4},
    "dp-attention+ep": {"expert": 8},
}
fitting = {}
for strategy, mesh in settings.items():
    plan = make_plan(config, topology, Load(batch=8, context=8192), mesh=mesh, strategy=strategy)
    fitting[f"{strategy}\n{','.join(f'{a}={n}' for a, n in mesh.items())}"] = plan.kv_tokens

figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
bars = axis.bar(list(fitting), [n / 1e3 for n in fitting.values()], color="tab:blue")
axis.bar_label(bars, fmt="%.0f k")
axis.margins(y=0.12)
axis.set(
    ylabel="thousand tokens", title=f"Tokens of cache that fit on {topology}, all rows together"
)
plt.show()

# %% [markdown]
# The arrays themselves say the same. One layer's pages on eight devices, for three strategies of a
# small model: the shape of a device's part, as JAX draws it (`pages x heads`).

# %%
small = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_experts": 8,
    "moe_intermediate_size": 32,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 128,
}
shards = {}
for strategy, mesh in (
    ("ep", "expert=8"),
    ("ep+tp", "expert=2,tensor=4"),
    ("dp-attention+ep", "expert=8"),
):
    runtime = qj.Runtime.make(mesh=mesh, strategy=strategy, dtype="float32", page_size=16)
    tiny, _, _ = load("Qwen/Qwen3-30B-A3B", runtime=runtime, load_format="dummy", overrides=small)
    pages = make_cache(tiny.text, runtime, 16).pages[0]
    shards[strategy] = pages.sharding.shard_shape(pages.shape)
    print(f"{strategy}: {pages.shape} -> each device {shards[strategy]}")
    jax.debug.visualize_array_sharding(pages[:, 0, :, 0], use_color=False)

# %% [markdown]
# ## When the cache takes the time
#
# A decode step reads the weights that its tokens need once, and every row's keys and values once.
# Weights are shared by the rows of a batch; the cache is not. So there is a context from which the
# cache takes longer than the weights, and it is shorter the larger the batch is.

# %%
chip = CHIPS["v5e"]  # change this line: "v6e", "v7x", "h200"
mesh = {"expert": 8}
runtime = abstract_runtime(mesh, "dp-attention+ep", Load())
CONTEXTS = np.array([1, 2, 4, 8, 16, 32, 64, 128]) * 1024
figure, axes = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
crossings = {}
for axis, batch in zip(axes, (8, 32, 128), strict=True):
    empty = roofline.decode_work(config, runtime, rows=batch, context=0).bytes
    whole = np.array(
        [roofline.decode_work(config, runtime, rows=batch, context=int(n)).bytes for n in CONTEXTS]
    )
    weights, cache = (
        np.full(len(CONTEXTS), empty) / chip.bandwidth * 1e3,
        (whole - empty) / chip.bandwidth * 1e3,
    )
    axis.stackplot(
        CONTEXTS / 1024,
        weights,
        cache,
        labels=("weights", "cache"),
        colors=("tab:blue", "tab:orange"),
    )
    crossing = empty / ((whole[-1] - empty) / CONTEXTS[-1])
    crossings[batch] = float(crossing)
    if crossing < CONTEXTS[-1]:
        axis.axvline(crossing / 1024, color="black", ls="--", lw=1)
        at = {"transform": axis.get_xaxis_transform(), "va": "top", "ha": "right"}
        axis.text(crossing / 1024 * 0.93, 0.8, f"equal at\n{crossing / 1024:.0f}k tokens", **at)
    axis.set(xscale="log", xlabel="context (thousand tokens)", title=f"batch {batch}")
    axis.set_xticks([1, 4, 16, 64], ["1", "4", "16", "64"])
axes[0].set_ylabel("ms to read it, at full bandwidth")
axes[0].legend(loc="upper left")
figure.suptitle(f"One decode step of {MODEL} on 8 x {chip.name}: what is read")
plt.show()

# %% [markdown]
# ## Narrower keys and values
#
# The cache can be kept in fewer bits: int8 and fp8 pages have one scale for each head of each
# position. It is the cheapest way to twice the context.

# %%
widths = {}
for kv in ("bfloat16", "int8"):
    runtime = abstract_runtime(mesh, "dp-attention+ep", Load(kv_dtype=kv))
    widths[kv] = page_bytes(config.text, runtime) // runtime.page_size
    print(f"{kv:9} {widths[kv]:,} bytes for each token")

# %% [markdown]
# ## To go on
#
# * `qwen-jax plan --context 131072 --batch 16 --topology v5e:4x4 --search` finds what fits.
# * `LLM(kv_cache_dtype="int8")` runs it; `strategy="sp+ep"` splits long prompts over devices.
# * Where pages are found again (prefix reuse) is in `qwen_jax/engine/pages.py`.
