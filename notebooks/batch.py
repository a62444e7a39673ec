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
# # Files of requests
#
# Thousands of requests come as a file, OpenAI's batch lines, and their answers go to another.
# Machines fail in between, so this notebook kills a batch in the middle with `kill -9`, goes on,
# and counts: no line is lost, none is answered twice. Then several jobs share a file.
#
# It runs on the **demo** that comes with the package, a very small Qwen3-VL. No accelerator is
# needed; most of the time goes into the start of three commands and compiling their programs.
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
import base64
import collections
import io
import json
import pathlib
import random
import tempfile
import time

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw

import qwen_jax as qj

FOLDER = pathlib.Path(tempfile.mkdtemp(prefix="qwen-batch-"))  # change this line to keep the files

# %% [markdown]
# ## A real model
#
# Model and machine are these two lines: options of the command, and of `qj.LLM`, under the same
# names. `quickstart` has the planner's table of what fits where.

# %%
MODEL = qj.DEMO  # change this line: "Qwen/Qwen3-VL-30B-A3B-Instruct"
# For the demo as little as this, so that few programs are compiled; for a real model
# change this line: MACHINE = {"mesh": "expert=8"}
MACHINE = {"max_num_seqs": 4, "max_num_batched_tokens": 32}

# %% [markdown]
# ## The requests
#
# A line has a name of yours (`custom_id`), a route, and a body as the server takes it. Here are
# sums, pictures (as `data:` URLs in the line itself), and code to go on with, where tokens are
# drawn. One line is wrong: an option is misspelt.

# %%
COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
rng = random.Random(3)


def picture(where, colour):
    """A data: URL of a disc in a corner."""
    image = Image.new("RGB", (96, 96), (245, 245, 245))
    x, y = 16 + 64 * ("right" in where), 16 + 64 * ("bottom" in where)
    ImageDraw.Draw(image).ellipse((x - 12, y - 12, x + 12, y + 12), fill=COLOURS[colour])
    held = io.BytesIO()
    image.save(held, "png")
    return f"data:image/png;base64,{base64.b64encode(held.getvalue()).decode()}"


def chat(content):
    """Route and body of a question."""
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 16, "temperature": 0}
    return "/v1/chat/completions", body


def request(kind):
    """Route, body and, where there is one, the right answer."""
    if kind == "sum":
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return *chat(f"What is {a} + {b}?"), str(a + b)
    if kind == "picture":
        where, colour = rng.choice(PLACES), rng.choice(list(COLOURS))
        question = {"type": "text", "text": f"What colour is the shape at the {where}?"}
        seen = {"type": "image_url", "image_url": {"url": picture(where, colour)}}
        return *chat([seen, question]), f"{colour.capitalize()}."
    prompt = f"def {rng.choice(('read', 'write', 'close', 'open'))}(self"
    return "/v1/completions", {"prompt": prompt, "max_tokens": 16, "temperature": 1}, None


COUNT = 240  # change this line
lines, wanted = [], {}
for i in range(COUNT):
    kind = rng.choice(("sum", "sum", "picture", "code"))
    url, body, answer = request(kind)
    name = f"{kind}-{i:04}"
    lines.append({"custom_id": name, "method": "POST", "url": url, "body": body})
    wanted[name] = answer
lines[100]["body"]["temprature"] = lines[100]["body"].pop("temperature")
bad = lines[100]["custom_id"]

IN, OUT = FOLDER / "in.jsonl", FOLDER / "out.jsonl"
IN.write_text("".join(json.dumps(line) + "\n" for line in lines))
print(f"{COUNT} lines, {IN.stat().st_size:,} bytes; the first:\n{json.dumps(lines[0], indent=2)}")

# %% [markdown]
# ## Run it, and kill it
#
# The command is `qwen-jax batch --model M -i in.jsonl -o out.jsonl --resume`. When half of the
# answers are there its process is killed: no signal it could handle, no time to write anything.


# %%
def command(output, *more):
    """`qwen-jax batch` for the file, as a list of words."""
    machine = [word for name, x in MACHINE.items() for word in (option(name), str(x))]
    files = ["-i", str(IN), "-o", str(output), "--resume"]
    program = [sys.executable, "-m", "qwen_jax.cli"]
    return [*program, "batch", "--model", MODEL, *files, *machine, *more]


def option(name):
    """As it is called in a shell."""
    return "--" + name.replace("_", "-")


def answered():
    """Whole lines of the output."""
    return OUT.read_bytes().count(b"\n") if OUT.exists() else 0


process = subprocess.Popen(command(OUT), stderr=subprocess.PIPE, text=True)
while answered() < COUNT // 2 and process.poll() is None:
    time.sleep(0.002)
process.kill()
process.communicate()
killed_by = process.returncode  # -9: by signal 9
held = OUT.read_bytes()
survived = held[: held.rfind(b"\n") + 1]
first_run = survived.count(b"\n")
print(f"ended with status {killed_by}: {first_run} of {COUNT} answers are on the disk")

# %% [markdown]
# ## Go on
#
# The same command again. It reads which lines are done and does the others. Its exit status is 1,
# because a line has failed.

# %%
resumed = subprocess.run(command(OUT), stderr=subprocess.PIPE, text=True, check=False)
print(*resumed.stderr.splitlines()[-4:], sep="\n")
print("exit status", resumed.returncode)

# %% [markdown]
# Is everything there, once? The names in the output and in the error file are held against those of
# the input, and the answers from before the kill must still be there, byte for byte. The picture
# has an answer where it stands in the output, and how far up it stands in the input.


# %%
def read(path):
    """The objects of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


results, errors = read(OUT), read(OUT.with_name("out.errors.jsonl"))
times_answered = collections.Counter(line["custom_id"] for line in [*results, *errors])
lost = [name for name in wanted if not times_answered[name]]
repeated = [name for name, times in times_answered.items() if times > 1]
kept = OUT.read_bytes().startswith(survived)
print(
    f"lost: {lost}; answered more than once: {repeated}; the first {first_run} are as they were:",
    kept,
)

number = {name: i for i, name in enumerate(wanted)}
order = [number[line["custom_id"]] for line in results]
figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
for run, part in (("killed", slice(first_run)), ("resumed", slice(first_run, None))):
    axis.plot(range(len(order))[part], order[part], ".", label=f"the run that was {run}")
axis.axvline(first_run - 0.5, color="black", ls="--", lw=1)
axis.axhline(number[bad], color="firebrick", lw=0.8, label="the line that is wrong")
axis.set(xlabel="line of the output", ylabel="line of the input", title="Each line once")
axis.legend()
plt.show()

# %% [markdown]
# ## What was wrong
#
# A line that cannot be answered does not stop the others. What was wrong with it, and where it
# stands, is in `out.errors.jsonl`. `--retry-errors` tries such lines again, for instance after a
# picture could not be fetched.

# %%
for line in errors:
    problem = line["response"]["body"]["error"]
    print(f"{line['file']}, line {line['line']}: {line['custom_id']}: {problem['message']}")

# %% [markdown]
# ## A table of results
#
# Answers come in the order in which they are ready; `custom_id` says what they answer. A reply is
# that of the server, so the text is where OpenAI's clients look for it.


# %%
def text_of(line):
    """The text of an answer, of either route."""
    (choice,) = line["response"]["body"]["choices"]
    return choice["message"]["content"] if "message" in choice else choice["text"]


table = sorted((line["custom_id"], text_of(line)) for line in results)
right, asked = collections.Counter(), collections.Counter()
for name, text in table:
    kind = name.split("-")[0]
    asked[kind] += 1
    right[kind] += text == wanted[name]
tokens = sum(line["response"]["body"]["usage"]["completion_tokens"] for line in results)
print(f"{'custom_id':14} {'answer':34} right answer")
for name, text in [*table[:3], *table[100:103], *table[-3:]]:
    print(f"{name:14} {text!r:34.34} {wanted[name] or ''}")
for kind in ("sum", "picture"):
    print(f"{kind}: {right[kind]} of {asked[kind]} right")
print(f"{tokens:,} tokens in {len(results)} answers")

# %% [markdown]
# ## Several jobs
#
# `--shard i/n` does every n-th line from line i on, into a file of its own. On a cluster n jobs do
# this at once, each with devices of its own, and each goes on by itself if it is killed.

# %%
PARTS = FOLDER / "parts.jsonl"
shard = subprocess.run(
    command(PARTS, "--shard", "0/2"), stderr=subprocess.PIPE, text=True, check=False
)
print(*shard.stderr.splitlines()[-4:], sep="\n")

# %% [markdown]
# ## From Python
#
# `qj.run_batch` is the same with a model that is loaded (here now, and not earlier: an accelerator
# belongs to one process). It does the other half. Seeds come from the names of lines, so the two
# shards together say what the one job said, drawn tokens included, however they were batched.

# %%
llm = qj.LLM(MODEL, **MACHINE)
summary = qj.run_batch(llm, IN, PARTS, shard="1/2", resume=True)
print(summary)
shards = sorted(FOLDER.glob("parts-*.jsonl"))
print([path.name for path in shards])
together = sorted((line["custom_id"], text_of(line)) for path in shards for line in read(path))
same = together == table
print("the shards together say the same:", same)

# %% [markdown]
# ## To go on
#
# * The README has a Slurm array and Ray Data over shards; input may be many files, or Parquet.
# * `qwen-jax serve` has the same as `/v1/batches`, and a batch goes on after a restart there, too.
# * With a real model leave `MACHINE` empty but for the mesh: 64 rows at once are the default.
