"""Options that several commands share, and what they mean to the library.

Knows the names of `LLM`'s arguments and of `SamplingParams`; imports no JAX, so that a wrong option
is an error at once.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from qwen_jax.commands import processes
from qwen_jax.requests import SamplingParams

# The library holds these too, in modules that import JAX; a test holds them equal.
DTYPES = ("bfloat16", "float32")
KV_DTYPES = ("auto", "bfloat16", "float32", "fp8", "int8")
LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")
QUANTIZATIONS = ("fp8", "int8")
DISPATCHES = ("auto", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all")
STRATEGIES = (
    "auto",
    "replicated",
    "tp",
    "ep",
    "ep+tp",
    "tp-attention+ep",
    "dp-attention+ep",
    "dp-attention+ep+tp",
    "sp+ep",
    "sp+ep+tp",
    "dp+tp-attention+ep+tp",
    "sp+tp-attention+ep+tp",
)

NO_MODEL = (
    "a model is needed: --model with a directory or a hub id, for example "
    "--model Qwen/Qwen3-0.6B, or --model Qwen3-0.6B --load-format dummy for random weights"
)


def add_model(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """Which checkpoint; ``default``: where none is given."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="M",
        default=default,
        help="directory (Hugging Face or converted), hub id[@revision], gs://…, or with "
        "--load-format dummy a preset's name" + (" (default: the demo)" if default else ""),
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument("--cache-dir", metavar="DIR", help="of downloads (default: the hub's own)")
    group.add_argument(
        "--load-format", choices=LOAD_FORMATS, default="auto", help="dummy: random weights"
    )
    group.add_argument(
        "--config-override",
        "--override",
        dest="config_override",
        metavar="KEY=VALUE",
        action="append",
        type=key_value,
        default=[],
        help="replace a key of config.json, e.g. num_hidden_layers=2; may be repeated",
    )


def add_debug(parser: argparse.ArgumentParser) -> None:
    """What every command has."""
    group = parser.add_argument_group("messages")
    group.add_argument("--quiet", action="store_true", help="no plan, no progress, no footer")
    group.add_argument("--debug", action="store_true", help="a traceback with every error")


def add_processes(parser: argparse.ArgumentParser) -> None:
    """Which of several processes this is, on one or several hosts, in one job."""
    group = parser.add_argument_group(
        "several processes", "All of them run the same command, with the same options but one."
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 can be reached")
    group.add_argument("--num-processes", metavar="N", type=int, help="how many there are")
    group.add_argument("--process-id", metavar="I", type=int, help="which this is, from 0")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="find these out: on a TPU pod slice, Kubernetes, Slurm (srun does not need it)",
    )


def add_runtime(parser: argparse.ArgumentParser, *, rows: bool = True) -> None:
    """Where and how the model runs: the arguments of `LLM`; ``rows``: how many at once, too."""
    group = parser.add_argument_group("machine")
    group.add_argument(
        "--mesh", default="auto", help='e.g. "expert=8", "data=2,tensor=4" (default: all devices)'
    )
    group.add_argument("--strategy", choices=STRATEGIES, default="auto", help="sharding rules")
    add_dispatch(group)
    group.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="of activations; a CPU takes float32"
    )
    group.add_argument("--quantization", choices=QUANTIZATIONS, help="requantise on load")
    group.add_argument("--kv-cache-dtype", choices=KV_DTYPES, default="auto")
    group.add_argument("--max-model-len", metavar="N", type=int, help="longest context")
    if rows:
        group.add_argument("--max-num-seqs", metavar="N", type=int, default=64, help="rows at once")
    group.add_argument(
        "--max-num-batched-tokens", metavar="N", type=int, help="tokens of a prefill chunk"
    )
    group.add_argument("--hbm-utilization", metavar="SHARE", type=float, default=0.9)
    group.add_argument("--page-size", metavar="N", type=int, default=64, help="tokens per page")
    group.add_argument(
        "--kernels", type=kernels, default="auto", help='e.g. "xla", "ragged_dot=xla"'
    )
    group.add_argument(
        "--mm-processor-kwargs",
        metavar="JSON",
        type=json_object,
        help="""of pictures and videos, e.g. '{"max_pixels": 1000000}', '{"fps": 1}'""",
    )
    add_compilation_cache(group)


def add_dispatch(group) -> None:
    """How tokens meet their experts."""
    group.add_argument(
        "--dispatch",
        choices=DISPATCHES,
        default="auto",
        help="how tokens and experts come together over devices (qwen_jax/expert_dispatch.py)",
    )


def add_compilation_cache(group) -> None:
    """Where compiled programs are kept."""
    group.add_argument(
        "--compilation-cache",
        metavar="DIR",
        help="keep compiled programs there ('off': nowhere; default: qwen_jax/programs in "
        "$XDG_CACHE_HOME or ~/.cache)",
    )


def add_seed(parser: argparse.ArgumentParser) -> None:
    """For commands that sample nothing."""
    parser.add_argument("--seed", metavar="S", type=int, default=0, help="of random weights")


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """The names of `SamplingParams`; what is not given is the checkpoint's own choice."""
    group = parser.add_argument_group(
        "sampling", "What is not given comes from the checkpoint's generation_config.json."
    )

    def number(name: str, kind: type, help: str) -> None:
        metavar = "N" if kind is int else "X"
        group.add_argument(f"--{name}", metavar=metavar, type=kind, default=None, help=help)

    number("max-tokens", int, "new tokens at most (default: until a stop token; ctrl-C stops)")
    number("min-tokens", int, "no stop token before these")
    number("temperature", float, "0 is greedy")
    number("top-p", float, "keep the fewest best tokens of this probability")
    number("top-k", int, "keep the best K tokens; 0 keeps all")
    number("min-p", float, "keep tokens this likely, relative to the best")
    number("seed", int, "of sampling and of random weights (default 0: runs repeat)")
    number("n", int, "completions of each prompt")
    number("presence-penalty", float, "subtracted for tokens that were generated")
    number("frequency-penalty", float, "the same, for each time")
    number("repetition-penalty", float, "divides, for tokens of the prompt too; 1 is off")
    number("logprobs", int, "report the best N with each token (--json); -1 all")
    number("prompt-logprobs", int, "the same for the prompt's tokens")
    group.add_argument(
        "--stop", metavar="TEXT", action="append", help="ends the text; may be repeated"
    )
    group.add_argument("--stop-token-ids", metavar="ID,…", type=integers)
    group.add_argument("--allowed-token-ids", metavar="ID,…", type=integers)
    group.add_argument(
        "--logit-bias", metavar="ID=X", action="append", type=bias, help="may be repeated"
    )
    for name, help in (
        ("ignore-eos", "go on past the end of the text"),
        ("skip-special-tokens", "leave special tokens out of the text (default)"),
        ("include-stop-str-in-output", "keep the stop string in the text"),
    ):
        group.add_argument(
            f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=help
        )


SAMPLING_NAMES = tuple(
    field.name for field in dataclasses.fields(SamplingParams) if field.name != "structured_outputs"
)


def sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What was given of `SamplingParams`, checked as far as it can be without a checkpoint.

    Raises:
        ValueError: a value out of range.
    """
    given = {name: getattr(args, name) for name in SAMPLING_NAMES}
    given = {name: value for name, value in given.items() if value is not None}
    if "logit_bias" in given:
        given["logit_bias"] = dict(given["logit_bias"])
    SamplingParams(**given)
    return given


def llm_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `LLM`.

    Raises:
        ValueError: no model was given.
    """
    if not args.model:
        raise ValueError(NO_MODEL)
    same = (
        "mesh strategy dtype quantization kv_cache_dtype max_model_len max_num_seqs "
        "max_num_batched_tokens hbm_utilization load_format kernels page_size dispatch revision "
        "cache_dir mm_processor_kwargs"
    )
    return {
        "model": args.model,
        "seed": args.seed or 0,
        "config_overrides": dict(args.config_override) or None,
        **{name: getattr(args, name) for name in same.split()},
    }


def read_text(path: str) -> str:
    """The text of a file, or of stdin for "-".

    Raises:
        ValueError: it is not UTF-8.
    """
    # Only process 0 of several need have the file, and only it has the stdin that is meant.
    return processes.from_first(lambda: _read_text(path))


def _read_text(path: str) -> str:
    try:
        if path == "-":
            return sys.stdin.read()
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from error


# ---- values ------------------------------------------------------------------------------------


def key_value(text: str) -> tuple[str, Any]:
    """KEY=VALUE; the value is JSON where it can be, else the text itself."""
    key, found, value = text.partition("=")
    if not key or not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def json_object(text: str) -> Mapping[str, Any]:
    """JSON with names and values."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value


def kernels(text: str) -> str | Mapping[str, str]:
    """One name for every op, or op=name pairs."""
    if "=" not in text:
        return text
    pairs = [part.partition("=") for part in text.split(",")]
    if not all(op and name for op, _, name in pairs):
        raise argparse.ArgumentTypeError(f"{text!r} is not OP=NAME,…")
    return {op.strip(): name.strip() for op, _, name in pairs}


def integers(text: str) -> Sequence[int]:
    """Numbers with commas between."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of integers: 1,2,3") from None


def bias(text: str) -> tuple[int, float]:
    """ID=X."""
    token, found, value = text.partition("=")
    try:
        return int(token), float(value if found else "")
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=NUMBER, e.g. 15=-2.5") from None
