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
# # Pictures and videos
#
# A Qwen3-VL sees: a vision tower turns patches of pixels into a few tokens, which stand in the
# prompt among those of the text. This notebook draws pictures, asks about them, and then looks at
# what the model gets of them: patches, tokens, and positions in time, rows and columns.
#
# It runs on the **demo** that comes with the package: very small, but of the real architecture with
# DeepStack and M-RoPE. It has learned pictures of coloured shapes and digits in nine places, and
# videos of one thing after the other. No accelerator is needed; most of the time goes into
# compiling programs. Lines marked `change this line` are where to play.

# %%
# On Colab this installs the project; where it is installed it does nothing.
import importlib.util
import subprocess
import sys

PACKAGE = "qwen-jax[notebook]"  # change this line to a path or a git URL to install that
if importlib.util.find_spec("qwen_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", PACKAGE], check=True)

# %%
import collections
import math
import random

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image, ImageDraw, ImageFont

import qwen_jax as qj
from qwen_jax.prompt.preprocessor import PixelRules
from qwen_jax.prompt.resize import image_size

# Few rows and short chunks: so few shapes of programs are compiled, which is what takes time here.
llm = qj.LLM(qj.DEMO, max_num_seqs=4, max_num_batched_tokens=32)
GREEDY = qj.SamplingParams(temperature=0.0, max_tokens=96)

# %% [markdown]
# ## Drawing
#
# A picture is said by what is in its places. Pillow draws it; nothing here is a file.

# %%
COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 180),
    "orange": (245, 135, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
DIGITS = tuple("0123456789")
PLACES = (
    *("top left", "top", "top right"),
    *("left", "centre", "right"),
    *("bottom left", "bottom", "bottom right"),
)


def draw_thing(canvas, thing, x, y, radius):
    """Something such as "red circle" or "blue 7" around (x, y)."""
    colour, kind = thing.split()
    fill, box = COLOURS[colour], (x - radius, y - radius, x + radius, y + radius)
    if kind == "circle":
        canvas.ellipse(box, fill=fill)
    elif kind == "ring":
        canvas.ellipse(box, outline=fill, width=max(2, round(0.35 * radius)))
    elif kind == "square":
        side = 0.88 * radius
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif kind in ("triangle", "diamond"):
        count = 3 if kind == "triangle" else 4
        turns = [2 * math.pi * i / count for i in range(count)]
        reach = 1.1 * radius
        canvas.polygon([(x + reach * math.sin(t), y - reach * math.cos(t)) for t in turns], fill)
    elif kind == "cross":
        arm = 0.32 * radius
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    else:
        font = ImageFont.load_default(round(2.3 * radius))
        bold = int(radius > 16)  # large digits are not to be thinner
        canvas.text((x, y), kind, fill=fill, font=font, anchor="mm", stroke_width=bold)


def draw_picture(things, *, cell=32, side=3):
    """side x side cells of as many pixels; ``things`` by their place."""
    image = Image.new("RGB", (side * cell, side * cell), (245, 245, 245))
    canvas = ImageDraw.Draw(image)
    for place, thing in things.items():
        row, column = divmod(PLACES.index(place) if side > 1 else 0, side)
        draw_thing(canvas, thing, (column + 0.5) * cell, (row + 0.5) * cell, 0.36 * cell)
    return image


# %% [markdown]
# ## Asking
#
# A picture is a part of a message. A few questions about two pictures, all in one call; an answer
# that is not what the picture was made of would stand there in red.

# %%
SCENES = [  # change these lines
    {"top left": "red circle", "centre": "blue 7", "right": "green cross", "bottom": "orange ring"},
    {
        "top": "yellow triangle",
        "top right": "purple 4",
        "left": "orange square",
        "bottom left": "purple diamond",
        "bottom right": "blue circle",
    },
]


def asked(picture, question):
    """A conversation that begins with a picture."""
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def tell(conversations):
    """An answer to each."""
    return [result.outputs[0].content for result in llm.chat(conversations, GREEDY, use_tqdm=False)]


def article(thing):
    """As the demo has learned to say it."""
    return f"{'An' if thing[0] in 'aeiou' else 'A'} {thing}."


def questions(things):
    """(kind, question, right answer) about a picture."""
    found = [("count", "How many things are there?", f"{len(things)}.")]
    for place, thing in things.items():
        colour, kind = thing.split()
        if kind in DIGITS:
            found.append(("digit", f"Which digit is at the {place}?", f"{kind}."))
        else:
            where = f"What colour is the shape at the {place}?"
            found.append(("colour", where, f"{colour.capitalize()}."))
            found.append(("shape", f"What is at the {place}?", article(thing)))
        if list(things.values()).count(thing) == 1:
            found.append(("place", f"Where is the {thing}?", f"At the {place}."))
        count = sum(other.startswith(f"{colour} ") for other in things.values())
        found.append(("count", f"How many {colour} things are there?", f"{count}."))
    return found


def write(axis, asked_for, answers):
    """Questions and answers, line by line; what is wrong is red. Returns which are right."""
    axis.axis("off")
    found = [answer == wanted for (_, wanted), answer in zip(asked_for, answers, strict=True)]
    for i, ((question, wanted), answer, good) in enumerate(
        zip(asked_for, answers, found, strict=True)
    ):
        text = f"{question} {answer}" if good else f"{question} {answer} (No: {wanted})"
        colour = "darkgreen" if good else "firebrick"
        axis.text(0, 1 - (i + 0.5) / 6, text, color=colour, va="center")
    return found


def one_of_each(things):
    """The first question of each kind."""
    first = {}
    for kind, question, wanted in questions(things):
        first.setdefault(kind, (question, wanted))
    return list(first.values())


figure, axes = plt.subplots(
    1, 4, figsize=(13, 3), width_ratios=(1, 1.4, 1, 1.4), layout="constrained"
)
shown = []
for things, (left, right) in zip(SCENES, axes.reshape(2, 2), strict=True):
    picture, chosen = draw_picture(things, cell=64), one_of_each(things)
    answers = tell([asked(picture, question) for question, _ in chosen])
    left.imshow(picture)
    left.set(xticks=[], yticks=[])
    shown += write(right, chosen, answers)
plt.show()

# %% [markdown]
# How good is it, then? Twenty questions of each kind about pictures drawn at random.

# %%
EACH = 20  # change this line
rng = random.Random(5)


def random_things():
    """Some things in some places."""
    kinds = [*SHAPES, *rng.choices(DIGITS, k=3)]
    chosen = sorted(rng.sample(PLACES, rng.randint(2, 6)), key=PLACES.index)
    return {place: f"{rng.choice(list(COLOURS))} {rng.choice(kinds)}" for place in chosen}


pool = {kind: [] for kind in ("colour", "shape", "place", "count", "digit")}
while min(map(len, pool.values())) < EACH:
    things = random_things()
    picture, possible = draw_picture(things), questions(things)
    for kind, question, wanted in rng.sample(possible, min(3, len(possible))):
        pool[kind].append((asked(picture, question), wanted))
exam = [(kind, *item) for kind, items in pool.items() for item in items[:EACH]]
told = tell([conversation for _, conversation, _ in exam])
right = collections.Counter(
    kind for (kind, _, wanted), answer in zip(exam, told, strict=True) if answer == wanted
)
figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
bars = axis.bar(list(pool), [right[kind] for kind in pool], color="tab:blue")
axis.bar_label(bars)
axis.set(ylim=(0, EACH * 1.15), ylabel=f"right of {EACH}", title="Questions about new pictures")
plt.show()

# %% [markdown]
# ## Several turns
#
# A conversation keeps its picture: it stands in the first message, and later questions refer to it.
# The tower runs once, since a picture is known by its pixels.

# %%
TURNS = [  # change these lines
    "How many things are there?",
    "Which digit is at the centre?",
    "Where is the orange ring?",
    "Describe the picture.",
]
picture, messages = draw_picture(SCENES[0], cell=64), []
for question in TURNS:
    messages += [{"role": "user", "content": question}] if messages else asked(picture, question)
    (answer,) = tell([messages])
    messages.append({"role": "assistant", "content": answer})
turns = [message["content"] for message in messages[1::2]]
for question, answer in zip(TURNS, turns, strict=True):
    print(f"{question}\n    {answer}")

# %% [markdown]
# ## Two pictures
#
# A prompt may hold several, each where its part stands. The demo has learned with one picture in a
# conversation, so it does not know which of two is meant; a real Qwen3-VL does. What can be seen
# here is that both are in the prompt.

# %%
pair = [draw_picture(things, cell=64) for things in SCENES]
parts = [{"type": "image", "image": image} for image in pair]
both = [{"role": "user", "content": [*parts, {"type": "text", "text": "What is at the centre?"}]}]
(result,) = llm.chat(both, GREEDY, use_tqdm=False)
two_pictures = result.metrics.picture_tokens
print(f"{two_pictures} tokens for two pictures; the demo says: {result.outputs[0].content}")

# %% [markdown]
# ## A video
#
# Frames and their rate, or a file (the extra `video`). Of each second the demo sees two frames,
# which become one slice with its time before it, as text: `<0.2 seconds>`.

# %%
STORY = ["green square", "red triangle", "blue ring"]  # change this line
RATE = 4  # frames per second; each thing is there for a second
stills = [np.asarray(draw_picture({"centre": thing}, side=1)) for thing in STORY]
frames = np.repeat(np.stack(stills), RATE, axis=0)
clip = {"type": "video", "video": (frames, {"fps": float(RATE)})}


def seen(question):
    """A conversation that begins with the video."""
    return [{"role": "user", "content": [clip, {"type": "text", "text": question}]}]


film = llm.inputs.chat(seen("What is seen first?"), {}).vision
times = [f"{seconds:.1f}" for seconds in film.pictures[0].timestamps]
video_asks = [
    ("What is seen first?", article(STORY[0])),
    ("What is seen last?", article(STORY[-1])),
    (f"What is seen at {times[1]} seconds?", article(STORY[1])),
    (f"When is the {STORY[2]} first seen?", f"At {times[2]} seconds."),
]
video_told = tell([seen(question) for question, _ in video_asks])

figure, axes = plt.subplots(
    1,
    len(STORY) + 1,
    figsize=(11, 2.4),
    width_ratios=[1] * len(STORY) + [2.4],
    layout="constrained",
)
for i, (axis, still) in enumerate(zip(axes, stills, strict=False)):
    axis.imshow(still)
    axis.set(xticks=[], yticks=[], title=f"second {i}", xlabel=f"<{times[i]} seconds>")
write(axes[-1], video_asks, video_told)
plt.show()

# %% [markdown]
# ## What the model sees
#
# A picture is brought to a size that divides into patches (here of 16 pixels: thin lines), and two
# by two patches become one token (thick lines). The picture below is put together again from the
# patches that the tower gets; the numbers are the tokens, in their order in the prompt.

# %%
small = draw_picture(SCENES[1])
prompt = llm.inputs.chat(asked(small, "What is at the left?"), {})
patched = prompt.vision.pictures[0]
_, rows, columns = patched.grid
merge = patched.merge_size


def pixels_of(patched):
    """uint8 [rows, columns, 3]: a picture's patches in their places again."""
    side = math.isqrt(patched.patches.shape[1] // 6)  # 3 colours in 2 frames, which are the same
    blocks = patched.patches.reshape(
        rows // merge, columns // merge, merge, merge, 3, 2, side, side
    )[:, :, :, :, :, 0]
    return blocks.transpose(0, 2, 5, 1, 3, 6, 4).reshape(rows * side, columns * side, 3)


again = pixels_of(patched)
same_pixels = bool(np.array_equal(again, np.asarray(small)))
print(f"{small.size} pixels -> {rows} x {columns} patches -> {patched.num_tokens} tokens")

figure, (axis, beside) = plt.subplots(
    1, 2, figsize=(11, 4), width_ratios=(1, 1.6), layout="constrained"
)
axis.imshow(again)
side = len(again) // rows
for i in range(rows + 1):
    at, width = i * side - 0.5, 2.5 if i % merge == 0 else 0.6
    axis.axhline(at, color="black", lw=width)
    axis.axvline(at, color="black", lw=width)
for token in range(patched.num_tokens):
    row, column = divmod(token, patched.token_columns)
    corner = (column * merge * side + 2, row * merge * side + 2)
    axis.text(*corner, str(token), ha="left", va="top", fontsize=11, fontweight="bold")
axis.set(xticks=[], yticks=[], title="patches and tokens")

ids = prompt.token_ids
texts = [llm.tokenizer.decode([token], skip_special_tokens=False) for token in ids]
visual = prompt.vision.feature_rows(0, len(ids)) >= 0
beside.axis("off")
beside.set_title(f"the prompt: {len(ids)} tokens, {visual.sum()} of them for the picture")
PER_ROW = 8
for i, (text, is_picture) in enumerate(zip(texts, visual, strict=True)):
    shown_text = f"▦ {visual[:i].sum()}" if is_picture else repr(text)[1:-1].replace(" ", "␣")
    beside.text(
        (i % PER_ROW + 0.5) / PER_ROW,
        1 - (i // PER_ROW + 0.5) / math.ceil(len(ids) / PER_ROW),
        shown_text.replace("<|", "").replace("|>", ""),
        ha="center",
        va="center",
        fontsize=8,
        bbox={"facecolor": "moccasin" if is_picture else "aliceblue", "boxstyle": "round"},
    )
plt.show()

# %% [markdown]
# ## Where a token stands
#
# A rotary position has three numbers here: time, row and column. For text all three are the same
# and count up. The tokens of a picture share their time, and rows and columns count from it: so
# the model can tell left from right. After the picture the count goes on behind its longer side:
# nine tokens take three positions. Two pictures are told apart by their time.

# %%
figure, axes = plt.subplots(1, 2, figsize=(13, 3.8), layout="constrained")
for axis, vision, title in zip(
    axes,
    (prompt.vision, llm.inputs.chat(both, {}).vision),
    ("a picture and a question", "two pictures and a question"),
    strict=True,
):
    styles = (("time", "-", 4), ("row", "--", 2), ("column", ":", 2))
    for positions, (name, style, width) in zip(vision.positions, styles, strict=True):
        axis.plot(positions, style, lw=width, alpha=0.8, drawstyle="steps-mid", label=name)
    for span in vision.spans:
        axis.axvspan(span.start - 0.5, span.stop - 0.5, color="moccasin")
    axis.set(xlabel="token of the prompt", ylabel="position", title=title)
axes[0].legend(title="shaded: the picture")
plt.show()
(span,) = prompt.vision.spans
picture_positions = prompt.vision.positions[:, span.start : span.stop]
picture_positions = (picture_positions - picture_positions[0, 0]).tolist()

# %% [markdown]
# ## A real model
#
# The cells above work unchanged with `llm = qj.LLM(**REAL["TPU v6e-1"])`, with photographs,
# documents and films, and with questions of any kind; only the right answers of the demo's world
# are said in other words then. `quickstart` has the planner's table of what fits where.
#
# These models see more: patches of 16 pixels as here, but up to 16,777,216 pixels of a picture. How
# many tokens is that? `mm_processor_kwargs={"max_pixels": …}` bounds it, and so the time it takes.

# %%
REAL = {
    "T4": {"model": "Qwen/Qwen3-VL-2B-Instruct"},
    "TPU v5e-1": {"model": "Qwen/Qwen3-VL-4B-Instruct"},
    "TPU v6e-1": {"model": "Qwen/Qwen3-VL-8B-Instruct"},
    "8 x TPU v5e": {"model": "Qwen/Qwen3-VL-30B-A3B-Instruct", "mesh": "expert=8"},
}
# change this line: llm = qj.LLM(**REAL["TPU v6e-1"], mm_processor_kwargs={"max_pixels": 1_000_000})


def tokens_of(width, height, rules):
    """Tokens of a picture of so many pixels."""
    given = {"min_pixels": rules.min_pixels, "max_pixels": rules.max_pixels}
    high, wide = image_size(height, width, factor=rules.factor, **given)
    return high * wide // rules.factor**2


sizes = {}
print("pixels           tokens    with max_pixels=1,000,000")
for width, height in ((640, 480), (1280, 720), (1920, 1080), (3840, 2160), (8000, 6000)):
    size = [
        tokens_of(width, height, PixelRules(max_pixels=most)) for most in (16_777_216, 1_000_000)
    ]
    sizes[f"{width} x {height}"] = size
    print(f"{width:5} x {height:<5} {size[0]:9,} {size[1]:9,}")

# %% [markdown]
# ## To go on
#
# * `qwen-jax chat --image a.png --prompt "…"` asks from a shell, `--video b.mp4` about a film.
# * `batch` answers files of questions, pictures included.
# * The tower is in `qwen_jax/model/vision.py`, positions are in `qwen_jax/prompt/mrope.py`.
