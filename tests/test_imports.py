"""The import order: a file may import only what stands above it, so the parts stay layers.

Reads the files with `ast`; imports none of them. A new file goes into `_ORDER`, above everything
that uses it.
"""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
_ORDER = """
pallas_kernels.device
pallas_kernels.registry
pallas_kernels.precision
pallas_kernels.tuning
pallas_kernels.program
pallas_kernels.tpu_schedule
pallas_kernels.hopper
pallas_kernels.gpu_report
pallas_kernels.warpgroup
pallas_kernels.narrow
pallas_kernels.buffers
pallas_kernels.ragged_dot.facts
pallas_kernels.ragged_dot.tpu_groups
pallas_kernels.ragged_dot.tpu_product
pallas_kernels.ragged_dot.tpu_kernel
pallas_kernels.ragged_dot.tpu_config
pallas_kernels.ragged_dot.tpu
pallas_kernels.ragged_dot.gpu_items
pallas_kernels.ragged_dot.gpu_config
pallas_kernels.ragged_dot.gpu_product
pallas_kernels.ragged_dot.gpu_refs
pallas_kernels.ragged_dot.gpu_kernel
pallas_kernels.ragged_dot.gpu
pallas_kernels.ragged_dot.xla
pallas_kernels.ragged_dot
pallas_kernels.ragged_dot.cases
pallas_kernels.paged_attention.facts
pallas_kernels.paged_attention.schedule
pallas_kernels.paged_attention.xla
pallas_kernels.paged_attention.tpu_config
pallas_kernels.paged_attention.tpu_packing
pallas_kernels.paged_attention.tpu_walk
pallas_kernels.paged_attention.tpu_copies
pallas_kernels.paged_attention.tpu_attend
pallas_kernels.paged_attention.tpu_kernel
pallas_kernels.paged_attention.tpu
pallas_kernels.paged_attention.gpu_shape
pallas_kernels.paged_attention.gpu_bring
pallas_kernels.paged_attention.gpu_kernel
pallas_kernels.paged_attention.gpu_combine
pallas_kernels.paged_attention.gpu
pallas_kernels.paged_attention
pallas_kernels.paged_attention.cases
pallas_kernels.segment_attention.facts
pallas_kernels.segment_attention.xla
pallas_kernels.segment_attention.tpu
pallas_kernels.segment_attention.gpu
pallas_kernels.segment_attention
pallas_kernels.segment_attention.cases
pallas_kernels

qwen_jax.demo
qwen_jax.dims
qwen_jax.sharding
qwen_jax.expert_dispatch
qwen_jax.distributed
qwen_jax.watch

qwen_jax.weights
qwen_jax.weights.config
qwen_jax.weights.json_keys
qwen_jax.weights.hf_config
qwen_jax.weights.presets
qwen_jax.weights.quant
qwen_jax.weights.config_json
qwen_jax.weights.params
qwen_jax.weights.derive
qwen_jax.weights.layout
qwen_jax.weights.requantize
qwen_jax.kernel_facts
qwen_jax.runtime
qwen_jax.weights.copying
qwen_jax.weights.safetensors_header
qwen_jax.weights.safetensors
qwen_jax.weights.hf
qwen_jax.weights.progress
qwen_jax.weights.storage
qwen_jax.weights.manifest
qwen_jax.weights.location
qwen_jax.weights.orbax_io
qwen_jax.weights.load
qwen_jax.weights.journal
qwen_jax.weights.pieces
qwen_jax.weights.convert
qwen_jax.weights.checkpoint

qwen_jax.model
qwen_jax.model.norm
qwen_jax.model.rope
qwen_jax.model.cache
qwen_jax.model.row_shards
qwen_jax.model.attention
qwen_jax.model.routing
qwen_jax.model.dispatch
qwen_jax.model.moe
qwen_jax.model.text
qwen_jax.model.vision
qwen_jax.model.step
qwen_jax.roofline

qwen_jax.prompt
qwen_jax.prompt.tokenizer_files
qwen_jax.prompt.tokenizer
qwen_jax.prompt.taint
qwen_jax.prompt.sandbox_meter
qwen_jax.prompt.sandbox
qwen_jax.prompt.chat_messages
qwen_jax.prompt.chat
qwen_jax.prompt.fim
qwen_jax.prompt.stop
qwen_jax.prompt.parsing_schema
qwen_jax.prompt.parsing_tags
qwen_jax.prompt.parsing_tools
qwen_jax.prompt.parsing_coder
qwen_jax.prompt.parsing
qwen_jax.prompt.preprocessor
qwen_jax.prompt.media_options
qwen_jax.prompt.media
qwen_jax.prompt.resize
qwen_jax.prompt.patches
qwen_jax.prompt.image_files
qwen_jax.prompt.video_files
qwen_jax.prompt.video
qwen_jax.prompt.images
qwen_jax.prompt.mrope
qwen_jax.prompt.vision_prompt

qwen_jax.structured
qwen_jax.structured.number_bounds
qwen_jax.structured.spec
qwen_jax.structured.matcher
qwen_jax.structured.parameters
qwen_jax.structured.tool_calls
qwen_jax.structured.compile

qwen_jax.sampling_rows
qwen_jax.sampling_select
qwen_jax.sampling_draw
qwen_jax.sampling
qwen_jax.generation_state
qwen_jax.generation
qwen_jax.requests
qwen_jax.results
qwen_jax.picture_inputs
qwen_jax.inputs
qwen_jax.structured.forms
qwen_jax.functional

qwen_jax.engine
qwen_jax.engine.pages
qwen_jax.engine.capacity
qwen_jax.engine.compile_clock
qwen_jax.engine.token_logprobs
qwen_jax.engine.pictures
qwen_jax.engine.constraint
qwen_jax.engine.sequence
qwen_jax.engine.totals
qwen_jax.engine.events
qwen_jax.engine.row
qwen_jax.engine.faults
qwen_jax.engine.request
qwen_jax.engine.wire
qwen_jax.engine.scheduler
qwen_jax.engine.step_clock
qwen_jax.engine.programs
qwen_jax.engine.feeding
qwen_jax.engine.slots
qwen_jax.engine.views
qwen_jax.engine.runner
qwen_jax.engine.outcome
qwen_jax.engine.warmup
qwen_jax.engine.core
qwen_jax.engine.turns
qwen_jax.engine.driver
qwen_jax.engine.lead
qwen_jax.engine.engine
qwen_jax.engine.led
qwen_jax.engine.offline

qwen_jax.planner
qwen_jax.planner.chips
qwen_jax.planner.collectives
qwen_jax.planner.program_text
qwen_jax.planner.compiled
qwen_jax.planner.temporary
qwen_jax.planner.plan
qwen_jax.planner.check
qwen_jax.planner.search
qwen_jax.planner.choose

qwen_jax.llm

qwen_jax.durable
qwen_jax.openai
qwen_jax.openai.errors
qwen_jax.openai.ids
qwen_jax.openai.protocol
qwen_jax.openai.chat_protocol
qwen_jax.openai.completion_protocol
qwen_jax.openai.checks
qwen_jax.openai.batch_lines
qwen_jax.openai.batch_results
qwen_jax.openai.calls
qwen_jax.openai.sampling
qwen_jax.openai.logprobs
qwen_jax.openai.fetch
qwen_jax.openai.media
qwen_jax.openai.answerer
qwen_jax.openai.chat_choice
qwen_jax.openai.chat
qwen_jax.openai.completions
qwen_jax.openai.kinds
qwen_jax.batch
qwen_jax.batch.files
qwen_jax.batch.shard
qwen_jax.batch.jsonl
qwen_jax.batch.parquet
qwen_jax.batch.inputs
qwen_jax.batch.outputs
qwen_jax.batch.progress
qwen_jax.batch.job
qwen_jax.batch.run

qwen_jax

qwen_jax.server
qwen_jax.server.settings
qwen_jax.server.limits
qwen_jax.server.guard
qwen_jax.server.metrics
qwen_jax.server.sse
qwen_jax.server.service
qwen_jax.server.answers
qwen_jax.server.files
qwen_jax.server.batches
qwen_jax.server.storage
qwen_jax.server.batch_worker
qwen_jax.server.storage_routes
qwen_jax.server.routes
qwen_jax.server.app

qwen_jax.commands
qwen_jax.commands.output
qwen_jax.commands.processes
qwen_jax.commands.options
qwen_jax.commands.session
qwen_jax.commands.completion
qwen_jax.commands.conversation
qwen_jax.commands.generate
qwen_jax.commands.chat
qwen_jax.commands.fill
qwen_jax.commands.convert
qwen_jax.commands.info_text
qwen_jax.commands.info
qwen_jax.commands.plan_text
qwen_jax.commands.plan_plot
qwen_jax.commands.plan
qwen_jax.commands.bench
qwen_jax.commands.media
qwen_jax.commands.batch
qwen_jax.commands.serve
qwen_jax.commands.parser
qwen_jax.cli
"""
ORDER = _ORDER.split()
# What an installation may lack, or what is slow to import: only in the function that needs it.
LATE = {
    "PIL",
    "av",
    "fastapi",
    "grain",
    "huggingface_hub",
    "llguidance",
    "matplotlib",
    "orbax",
    "prometheus_client",
    "pyarrow",
    "pydantic",
    "sentencepiece",
    "starlette",
    "torch",
    "transformers",
    "uvicorn",
}
# Packages that need one extra throughout.
EXTRAS = ("qwen_jax.batch.", "qwen_jax.openai.", "qwen_jax.server.")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("pallas_kernels", "qwen_jax")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imports(name, source, *, top_only=False):
    """The dotted names that a module's source imports, `from` ones as far as they are modules."""
    tree = ast.parse(source)
    nodes = list(_at_import(tree)) if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: imports are absolute here"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {each if each in FILES else node.module for each in inner}
    return found


def _at_import(node):
    """Every node that runs, or at least is reached, when the module is imported."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _at_import(child)


def problems(name, source, order=ORDER):
    """What a module imports that does not stand above it."""
    own = {each for each in imports(name, source) if each in FILES or each.split(".")[0] in PARTS}
    place = {each: index for index, each in enumerate(order)}
    return sorted(each for each in own if place.get(each, len(order)) >= place[name])


PARTS = {name.split(".")[0] for name in FILES}


def test_every_file_has_one_place():
    missing = sorted(set(FILES) - set(ORDER))
    assert not missing, f"put these into _ORDER of tests/test_imports.py: {missing}"
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("name", FILES)
def test_a_file_imports_only_what_stands_above_it(name):
    below = problems(name, FILES[name].read_text()) if name in ORDER else []
    assert not below, f"{name} imports {below}; move it below them, or do not import them"


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith("pallas_kernels")])
def test_kernels_know_nothing_of_the_model(name):
    roots = {each.split(".")[0] for each in imports(name, FILES[name].read_text())}
    assert "qwen_jax" not in roots


@pytest.mark.parametrize("name", FILES)
def test_optional_and_heavy_packages_are_imported_where_they_are_used(name):
    if name.startswith(EXTRAS):
        return  # the extras `batch` and `server` as a whole: only commands import them, late
    at_top = imports(name, FILES[name].read_text(), top_only=True)
    assert not {each for each in at_top if each.split(".")[0] in LATE}


@pytest.mark.parametrize("name", [name for name in FILES if not f"{name}.".startswith(EXTRAS)])
def test_whole_extras_are_imported_late(name):
    at_top = imports(name, FILES[name].read_text(), top_only=True)
    assert not {each for each in at_top if f"{each}.".startswith(EXTRAS)}


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("from qwen_jax import dims", []),
        ("from qwen_jax.weights import params", ["qwen_jax.weights.params"]),
        ("from qwen_jax.weights.params import Param", ["qwen_jax.weights.params"]),
        ("def f():\n    import qwen_jax.llm", ["qwen_jax.llm"]),
        ("from qwen_jax.weights.quant import QArray", ["qwen_jax.weights.quant"]),
        ("import qwen_jax.no_such_file", ["qwen_jax.no_such_file"]),
    ],
)
def test_an_import_from_below_is_seen(source, wrong):
    assert problems("qwen_jax.weights.quant", source) == wrong


def test_an_import_inside_a_function_is_not_at_the_top():
    source = (
        "import os\nif TYPE_CHECKING:\n    import grain\nif os:\n    import av\n"
        "def f():\n    import torch\nclass A:\n    import PIL\n"
    )
    assert imports("x", source, top_only=True) == {"os", "av", "PIL"}
    assert imports("x", source) == {"os", "av", "PIL", "grain", "torch"}
