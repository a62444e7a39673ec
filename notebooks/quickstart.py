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
# # Quickstart
#
# Chat, complete, watch the words come, fill a gap in code, call functions, hold answers to a form,
# look at what else could have been said, and draw many samples at once.
#
# It runs on the **demo** that comes with the package: a Qwen3-VL with a mixture of experts, as the
# published ones but very small, trained from nothing on two CPU cores. It knows a little invented
# world and the forms in which models of this family answer, and nothing else. A real model is
# another line, below. No accelerator is needed; most of the time goes into compiling programs.
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
import dataclasses
import json
import math
import random

import matplotlib.pyplot as plt
import numpy as np

import qwen_jax as qj
from qwen_jax.planner.chips import CHIPS, GiB, Topology
from qwen_jax.planner.plan import Load
from qwen_jax.planner.search import search
from qwen_jax.weights.presets import preset

# %% [markdown]
# ## A model
#
# A name from the Hugging Face hub, or a directory; a mesh that says how devices share it. What is
# not said is chosen and can be read in `llm.plan`. `REAL` has a model for some machines; which
# others fit is in the table at the end.

# %%
REAL = {
    "T4": {"model": "Qwen/Qwen3-VL-2B-Instruct"},
    "TPU v5e-1": {"model": "Qwen/Qwen3-VL-4B-Instruct"},
    "TPU v6e-1": {"model": "Qwen/Qwen3-VL-8B-Instruct"},
    "L4": {"model": "Qwen/Qwen3-VL-8B-Instruct"},
    "8 x TPU v5e": {"model": "Qwen/Qwen3-Coder-30B-A3B-Instruct", "mesh": "expert=8"},
}
SMALL = {"max_num_seqs": 4, "max_num_batched_tokens": 32}  # few shapes of programs to compile
CHOSEN = {"model": qj.DEMO, **SMALL}  # change this line: CHOSEN = REAL["TPU v6e-1"]
llm = qj.LLM(**CHOSEN)
print(llm.plan)

# %% [markdown]
# ## Chat
#
# `chat` takes a conversation or many, and answers all of them together. Temperature 0 always takes
# the likeliest token. The two sums below were kept out of the demo's training, and so was the
# question where Mira lives in these words.

# %%
GREEDY = qj.SamplingParams(temperature=0.0, max_tokens=64)


def user(text):
    """A turn of a conversation."""
    return {"role": "user", "content": text}


def ask(questions, params=GREEDY):
    """The answers, each to a conversation of its own."""
    results = llm.chat([[user(question)] for question in questions], params, use_tqdm=False)
    return [result.outputs[0].content for result in results]


QUESTIONS = [  # change these lines
    "Who are you?",
    "What is 9 + 13?",
    "What is 17 - 4?",
    "Where does Mira live?",
    "What pet does Tom have?",
    "Give river, lamp and bread in reverse order.",
    "Give tree, door and cup as a JSON list.",
]
answers = dict(zip(QUESTIONS, ask(QUESTIONS), strict=True))
for question, answer in answers.items():
    print(f"{question:46} {answer}")

# %% [markdown]
# A batch costs little more than one question, since the weights are read once for all of it. So how
# good is it at sums? Here are 48, drawn at random.

# %%
rng = random.Random(1)
pairs = [(rng.randint(0, 20), rng.randint(0, 20)) for _ in range(48)]
found = ask([f"What is {a} + {b}?" for a, b in pairs])
wrong = {f"{a} + {b}": x for (a, b), x in zip(pairs, found, strict=True) if x != str(a + b)}
sums_right = len(pairs) - len(wrong)
print(f"{sums_right} of {len(pairs)} are right; wrong are {wrong}")

# %% [markdown]
# ## Stream
#
# `stream` yields text as it comes; a bar marks where a piece ends. The first tokens come one by
# one, later ones in longer runs that the device makes without asking the host. The last event has
# the whole result: why it ended, and how long it took.

# %%
pieces = []
for event in llm.stream([user("What can you do?")], GREEDY):
    if event.text:
        pieces.append(event.text)
        print(event.text, end="|", flush=True)
streamed = event.output.outputs[0]
first = event.output.metrics.time_to_first_token
print(f"\n{len(streamed.token_ids)} tokens, the first after {first * 1e3:.0f} ms")
print(f"finish_reason: {streamed.finish_reason}")

# %% [markdown]
# ## Complete, and fill in the middle
#
# `generate` goes on with a text as it is. The demo knows thirty small functions; this one it has
# not seen with these names.

# %%
START = "def quicksort(points):\n"  # change this line
longer = dataclasses.replace(GREEDY, max_tokens=120)
written = llm.generate(START, longer, use_tqdm=False)[0].outputs[0].text
print(f"{START}⟦{written}⟧")

# %% [markdown]
# `fill` is told what comes after the gap, too, and that is what an editor needs: from the prefix
# alone nobody can know what the rest will want. The demo has read Python's standard library, too,
# but is far too small for it: there it fills most gaps wrongly.

# %%
PREFIX = """def largest(prices):
    result = prices[0]
    for price in prices:
        """
SUFFIX = """
            result = price
    return result
"""

alone = llm.generate(PREFIX, GREEDY, use_tqdm=False)[0].outputs[0].text
filled = llm.fill(PREFIX, SUFFIX, GREEDY)[0].outputs[0].text
print("prefix alone goes on with:", repr(alone[:40]))
print(f"filled in:\n\n{PREFIX}⟦{filled}⟧{SUFFIX}")

# %% [markdown]
# ## Call functions
#
# Tools are described as for OpenAI's API. The model does not run anything: it writes a call, which
# comes back parsed; you run the function, put what it returned into the conversation, and ask
# again. That is the whole loop. The demo was never taught with this city, nor with 20 minutes.


# %%
def get_weather(city):
    """Any function of yours."""
    return {"Oslo": "3 degrees", "Cairo": "19 degrees"}.get(city, "unknown")


def set_timer(minutes):
    """Another."""
    return "ok"


def described(function, about, **parameters):
    """A function's definition in OpenAI's form."""
    properties = {name: {"type": kind} for name, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    named = {"name": function.__name__, "description": about, "parameters": schema}
    return {"type": "function", "function": named}


FUNCTIONS = {function.__name__: function for function in (get_weather, set_timer)}
TOOLS = [
    described(get_weather, "Get the weather of a city.", city="string"),
    described(set_timer, "Set a timer.", minutes="integer"),
]


def converse(question):
    """Asks, makes the calls that come back, and returns the calls and the final answer."""
    messages, made = [user(question)], []
    while True:
        (result,) = llm.chat(messages, GREEDY, tools=TOOLS, use_tqdm=False)
        answer = result.outputs[0]
        print(answer.text)
        if not answer.tool_calls or len(made) > 3:
            return made, answer.content
        calls = [{"type": "function", "function": vars(call)} for call in answer.tool_calls]
        messages.append({"role": "assistant", "content": answer.content, "tool_calls": calls})
        for call in answer.tool_calls:
            arguments = json.loads(call.arguments)
            returned = FUNCTIONS[call.name](**arguments)
            print(f"    {call.name}({arguments}) returned {returned!r}")
            messages.append({"role": "tool", "content": returned})
            made.append([call.name, arguments])


conversations = {}
for question in ("What is the weather in Oslo?", "Set a timer for 20 minutes."):
    print(f"--- {question}")
    conversations[question] = converse(question)

# %% [markdown]
# ## Answers of a given form
#
# A JSON schema, a list of choices or a regular expression: at each token only what can still lead
# to such a text may be chosen. So the form is certain, whatever the model; the content is its own.

# %%
PETS = ["dog", "cat", "parrot", "rabbit", "horse", "turtle", "hamster", "goldfish"]
SENTENCES = [f"Tom has a {pet}." for pet in PETS]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": SENTENCES}},
    "required": ["answer"],
    "additionalProperties": False,
}
FORMS = {
    "free": None,
    "json": {"json": SCHEMA, "disable_any_whitespace": True},
    "choice": {"choice": SENTENCES},
    "regex": {"regex": rf"Tom has a ({'|'.join(PETS)})!!!"},
}
each = [dataclasses.replace(GREEDY, structured_outputs=form) for form in FORMS.values()]
formed = dict(zip(FORMS, ask(["What pet does Tom have?"] * len(FORMS), each), strict=True))
for name, text in formed.items():
    print(f"{name:7} {text}")

# %% [markdown]
# ## What else could have been said
#
# `logprobs=5` reports the five likeliest tokens at every step. A column below is a step, from the
# chosen token on top to less likely ones; the darker, the more probable. A sum is a matter of
# certainty; code may go on in many ways.


# %%
def alternatives(output, count=5):
    """[steps][count] of (token's text, probability), the likeliest first."""
    return [
        [
            (token.decoded_token or "", math.exp(token.logprob))
            for token in sorted(step.values(), key=lambda token: token.rank)[:count]
        ]
        for step in output.logprobs
    ]


def draw(axis, table, title):
    """Steps from left to right, alternatives from top to bottom."""
    chances = np.array([[chance for _, chance in step] for step in table]).T
    axis.imshow(chances, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for x, step in enumerate(table):
        for y, (text, chance) in enumerate(step):
            shown = repr(text)[1:-1].replace(" ", "␣").replace("$", r"\$")
            colour = "white" if chance > 0.6 else "black"
            axis.text(x, y - 0.14, shown, ha="center", va="center", color=colour, fontsize=9)
            axis.text(x, y + 0.26, f"{chance:.0%}", ha="center", color=colour, fontsize=7)
    axis.set(title=title, xlabel="step", xticks=range(len(table)), yticks=[])


CODE = "import os\nimport sys\n\n\ndef main("  # change this line
looked = dataclasses.replace(GREEDY, logprobs=5, max_tokens=10)
(sum_result,) = llm.chat([user("What is 9 + 13?")], looked, use_tqdm=False)
(code_result,) = llm.generate(CODE, looked, use_tqdm=False)
tables = [alternatives(result.outputs[0]) for result in (sum_result, code_result)]
widths = [len(table) for table in tables]
figure, axes = plt.subplots(1, 2, figsize=(13, 3.2), width_ratios=widths, layout="constrained")
for axis, table, title in zip(axes, tables, ("9 + 13", "after “def main(”"), strict=True):
    draw(axis, table, title)
plt.show()

# %% [markdown]
# ## Seeds
#
# With a temperature above 0 tokens are drawn. A request's seed fixes them, whatever else is in the
# batch and wherever it stands there; `n` gives several samples of one prompt.

# %%
drawn = qj.SamplingParams(temperature=1.0, max_tokens=12, seed=7)
(single,) = llm.generate(CODE, drawn, use_tqdm=False)
others = [dataclasses.replace(drawn, seed=seed) for seed in (1, 2, 7)]
crowd = [result.outputs[0].text for result in llm.generate([CODE] * 3, others, use_tqdm=False)]
single = single.outputs[0].text
for seed, text in zip((1, 2, 7), crowd, strict=True):
    print(f"seed {seed}: {text!r}")
print(f"seed 7, alone: {single!r}")

# %% [markdown]
# ## A real model
#
# Which fits where? Weights, cache and temporaries against the memory of a device, and the tokens
# per second that its bandwidth allows one user at most: arithmetic from published figures, not a
# measurement. Nothing is downloaded. `int8` means that it fits if it is requantised on load
# (`quantization="int8"`). Eight devices share a model by the strategy `ep+tp`. A T4 has no units
# for bfloat16, so it is taken to compute in float32.

# %%
T4 = dataclasses.replace(
    CHIPS["l4"], name="t4", memory=15 * GiB, bandwidth=320e9, flops={"bfloat16": 8.1e12}
)
MACHINES = {
    "T4": Topology(T4, (1,)),
    "TPU v5e-1": Topology.parse("v5e:1"),
    "TPU v6e-1": Topology.parse("v6e:1"),
    "L4": Topology.parse("l4:1"),
    "8 x TPU v5e": Topology.parse("v5e:2x4"),
}
MODELS = [
    "Qwen/Qwen3-0.6B",
    "Qwen/Qwen3-VL-2B-Instruct",
    "Qwen/Qwen3-VL-4B-Instruct",
    "Qwen/Qwen3-VL-8B-Instruct",
    "Qwen/Qwen3-30B-A3B-FP8",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct",
]


def best_plan(model, topology):
    """The best mesh for a row of 4,096 tokens, as the checkpoint is or in int8; None: no room."""
    config = preset(model)
    for form in (None,) if config.quantization else (None, "int8"):
        load = Load(batch=1, context=4096, chunk=512, quantization=form, utilization=0.9)
        plan = search(config, topology, load, strategy="ep+tp")[0]
        if plan.fits:
            return plan
    return None


def told(plan):
    """Tokens per second at most, and in which form."""
    if plan is None:
        return "-"
    form = f"{plan.load.quantization} " if plan.load.quantization else ""
    return f"{form}{plan.decode_tokens_per_s:,.0f}"


fits = {
    model: {name: told(best_plan(model, topology)) for name, topology in MACHINES.items()}
    for model in MODELS
}
print(f"{'at most tokens/s':36}" + "".join(f"{name:>13}" for name in MACHINES))
for model, cells in fits.items():
    print(f"{model:36}" + "".join(f"{cell:>13}" for cell in cells.values()))

# %% [markdown]
# ## To go on
#
# * `images_and_video` shows pictures and videos; `batch` answers files with many requests.
# * `qwen-jax chat`, `fill` and `serve` are the same from a shell: `qwen-jax --help`.
# * `mesh_and_rules` explains meshes; `qwen-jax plan` says more about any machine.
