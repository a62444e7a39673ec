"""`qwen-jax convert`: Hugging Face safetensors -> an orbax checkpoint that loads on any mesh."""

import argparse

from qwen_jax.commands import options, processes

EXAMPLE = "qwen-jax convert --model Qwen/Qwen3-30B-A3B --out qwen3-30b --quantization fp8"


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="M", help="Hugging Face directory, or hub id[@revision]")
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    group.add_argument("--cache-dir", metavar="DIR", help="of downloads (default: the hub's own)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", metavar="DIR", help="the directory to make")
    group.add_argument("--quantization", choices=options.QUANTIZATIONS, help="requantise")
    group.add_argument(
        "--dtype",
        choices=options.DTYPES,
        help="of the weights that are not quantised (default: each file's own)",
    )
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Converts; what a killed conversion left is gone on with."""
    if not args.model:
        raise ValueError(options.NO_MODEL.partition(",")[0])
    if not args.out:
        raise ValueError("convert: --out is missing: the directory to make")
    processes.only_first(lambda: _convert(args))
    return 0


def _convert(args: argparse.Namespace) -> None:
    from qwen_jax.commands import session

    session.show_log(args)
    from qwen_jax.weights.checkpoint import convert

    with session.Bar("convert", quiet=args.quiet) as bar:
        out = convert(
            args.model,
            args.out,
            dtype=args.dtype,
            quantization=args.quantization,
            revision=args.revision,
            cache_dir=args.cache_dir,
            progress=bar.show,
        )
    session.say(args, f"done: qwen-jax chat --model {out}")
