"""`qwen-jax info`: what a checkpoint is. Reads configurations and headers, and no weight."""

import argparse
import collections
import dataclasses
import math
import pathlib
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import options

if TYPE_CHECKING:
    from qwen_jax.weights.checkpoint import Location
    from qwen_jax.weights.config import ModelConfig

EXAMPLE = "qwen-jax info --model Qwen3-30B-A3B"

_FORMS = {"dummy": "config.json"}  # what is called dummy weights elsewhere has none here


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options.add_seed(parser)
    options.add_model(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Describes the checkpoint on stdout."""
    wanted = options.llm_options(args)
    from qwen_jax.commands import info_text, output, session

    args.quiet = True  # what the library chooses is in the report
    session.prepare(args)
    from qwen_jax.weights.checkpoint import read_config

    location = locate(args)
    config = read_config(location, wanted["config_overrides"])
    report = _report(args, location, config)
    if args.json:
        output.write_json(report)
    else:
        output.write(info_text.lines(report) + "\n")
    return 0


def locate(args: argparse.Namespace) -> "Location":
    """Where the checkpoint is. The weights of a hub id are not downloaded for this."""
    from qwen_jax.weights.checkpoint import Location, resolve
    from qwen_jax.weights.location import SIDE_FILES
    from qwen_jax.weights.presets import PRESETS

    name, path = args.model, pathlib.Path(args.model).expanduser()
    given = {"revision": args.revision, "cache_dir": args.cache_dir}
    if args.load_format != "auto":
        return resolve(name, load_format=args.load_format, **given)
    if path.is_dir() and (path / "config.json").exists() and not _has_weights(path):
        return resolve(name, load_format="dummy")
    if not path.exists() and args.revision is None and {name, f"Qwen/{name}"} & set(PRESETS):
        return resolve(name, load_format="dummy")
    if path.exists() or name.startswith("gs://") or name.count("/") != 1:
        return resolve(name, **given)
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        files = huggingface_hub.snapshot_download(
            repository,
            revision=args.revision or revision or None,
            cache_dir=args.cache_dir,
            allow_patterns=[*SIDE_FILES, "config.json"],
        )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: no directory here and no preset, and the hub does not give it: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
    return Location(name, "dummy", pathlib.Path(files))


def _has_weights(path: pathlib.Path) -> bool:
    return (path / "manifest.json").exists() or any(path.glob("*.safetensors*"))


def _report(
    args: argparse.Namespace, location: "Location", config: "ModelConfig"
) -> dict[str, Any]:
    import jax

    from qwen_jax.weights import derive
    from qwen_jax.weights.config import ARCHITECTURES

    text, quant = config.text, config.quantization
    bytes_by_dtype, where = _bytes(location, config)
    return {
        "model": args.model,
        "form": _FORMS.get(location.form, location.form) if location.directory else "preset",
        "architecture": config.model_type,
        "kind": ARCHITECTURES[config.model_type],
        "layers": text.num_hidden_layers,
        "sparse_layers": sum(map(text.is_moe, range(text.num_hidden_layers))),
        "hidden_size": text.hidden_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.head_dim,
        "experts": text.num_experts,
        "experts_per_token": text.num_experts_per_tok,
        "vision": _vision(config),
        "vocab_size": text.vocab_size,
        "tied_embeddings": config.tie_word_embeddings,
        "parameters": {"total": derive.count(config), "active": derive.count_active(config)},
        "bytes": {**bytes_by_dtype, "total": sum(bytes_by_dtype.values()), "from": where},
        "quantization": None if quant is None else _quantization(quant),
        "context": {
            "max_position_embeddings": text.max_position_embeddings,
            "rope_theta": text.rope.theta,
            "rope": text.rope.kind,
        },
        **_text_side(location, args),
        "machine": _machine(args, config, jax.devices()),
    }


def _vision(config: "ModelConfig") -> dict[str, Any] | None:
    tower = config.vision
    return None if tower is None else {"depth": tower.depth, "hidden_size": tower.hidden_size}


def _quantization(quant: Any) -> dict[str, Any]:
    found = dataclasses.asdict(quant)
    return {name: found[name] for name in ("form", "block", "scale_dtype")}


def _bytes(location: "Location", config: "ModelConfig") -> tuple[dict[str, int], str]:
    """Bytes by dtype: of the files where there are any, else of what the configuration says."""
    import jax

    from qwen_jax.weights import derive, manifest
    from qwen_jax.weights.safetensors import Checkpoint

    found: collections.Counter[str] = collections.Counter()
    if location.form == "safetensors":
        files = Checkpoint(location.local)
        for name in files.names:
            info = files.info(name)
            found[info.dtype.name] += info.nbytes
        return dict(found), "safetensors headers"
    if location.form == "orbax":
        for array in manifest.read(location.files).arrays.values():
            itemsize = jax.numpy.dtype(array.dtype).itemsize
            found[array.dtype] += math.prod(array.shape) * itemsize
        return dict(found), "manifest"
    for array in jax.tree.leaves(derive.abstract(config, config.dtype)):
        found[array.dtype.name] += array.size * array.dtype.itemsize
    return dict(found), "configuration"


def _text_side(location: "Location", args: argparse.Namespace) -> dict[str, Any]:
    """Tokenizer, chat template and sampling defaults; None where the checkpoint has none."""
    from qwen_jax.prompt.chat import ChatTemplate
    from qwen_jax.prompt.parsing import tool_format
    from qwen_jax.prompt.tokenizer import Tokenizer
    from qwen_jax.weights.location import local_files, read_json

    found: dict[str, Any] = dict.fromkeys(
        ("tokenizer", "chat_template", "tool_format", "generation_config")
    )
    directory = local_files(location, args.cache_dir)
    if directory is None:
        return found
    found["generation_config"] = read_json(directory, "generation_config.json")
    try:
        tokenizer = Tokenizer.from_dir(directory)
        found["tokenizer"] = {"size": tokenizer.size, "special": len(tokenizer.special_ids)}
    except FileNotFoundError:
        found["tokenizer"] = None
    try:
        found["tool_format"] = tool_format(ChatTemplate.from_dir(directory).source)
        found["chat_template"] = True
    except FileNotFoundError:
        found["chat_template"] = False
    return found


def _machine(args: argparse.Namespace, config: "ModelConfig", devices: Any) -> dict[str, Any]:
    """How it would run here: kernels, and whether it fits."""
    from qwen_jax.engine.capacity import make_plan
    from qwen_jax.model.cache import page_bytes
    from qwen_jax.planner.choose import runtime_for

    runtime = runtime_for(
        config,
        rows=args.max_num_seqs,
        max_model_len=args.max_model_len,
        mesh=args.mesh,
        strategy=args.strategy,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        kernels=args.kernels,
        page_size=args.page_size,
        dispatch=args.dispatch,
        quantization=args.quantization,
    )
    found = {
        "devices": len(devices),
        "device": devices[0].device_kind,
        "dtype": runtime.dtype,
        "kv_dtype": runtime.kv_dtype,
        "kernels": dict(runtime.kernels),
        "kv_bytes_per_token": page_bytes(config.text, runtime) // runtime.page_size,
    }
    try:
        plan = make_plan(
            config,
            runtime,
            quantization=args.quantization,
            max_model_len=args.max_model_len,
            max_num_seqs=args.max_num_seqs,
            hbm_utilization=args.hbm_utilization,
        )
    except ValueError as error:
        return {**found, "fits": False, "problem": str(error)}
    names = ("memory", "weights", "kv_tokens", "max_model_len")
    return {**found, "fits": True, **{name: getattr(plan, name) for name in names}}
