"""`qwen-jax generate`: completes a prompt as it is, without a chat template."""

import argparse
import dataclasses

from qwen_jax.commands import options
from qwen_jax.demo import DEMO

EXAMPLE = 'qwen-jax generate --model Qwen/Qwen3-0.6B --prompt "def quicksort(" --max-tokens 100'


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--prompt",
        metavar="TEXT",
        action="append",
        help="'-' reads stdin; may be repeated, for a batch",
    )
    parser.add_argument(
        "--json", action="store_true", help="one JSON object per result on stdout, at the end"
    )
    options.add_model(parser, default=DEMO)
    options.add_sampling(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model and completes the prompts; 130 where ctrl-C ended a text."""
    given = options.sampling_options(args)
    if not args.prompt:
        raise ValueError('generate: --prompt is missing: --prompt "text", or --prompt - for stdin')
    prompts = [options.read_text("-") if text == "-" else text for text in args.prompt]
    from qwen_jax.commands import completion, session

    llm = session.open_llm(args)
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    if args.json or len(prompts) > 1 or params.n > 1:
        return completion.complete(args, llm, prompts, params)
    return completion.stream(args, llm, prompts[0], params)
