"""`qwen-jax fill`: writes the code that belongs into a gap."""

import argparse
import dataclasses

from qwen_jax.commands import options
from qwen_jax.demo import DEMO

EXAMPLE = (
    "qwen-jax fill --model Qwen/Qwen3-Coder-30B-A3B-Instruct --file code.py   (with a <FILL> mark)"
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument("--file", metavar="PATH", help="code with one <FILL> mark; '-' reads stdin")
    parser.add_argument("--prefix-file", metavar="PATH", help="the code before the gap")
    parser.add_argument("--suffix-file", metavar="PATH", help="the code after it")
    parser.add_argument("--path", metavar="PATH", help="of the file, as the model shall see it")
    parser.add_argument("--repo", metavar="NAME", help="the repository's name; needs --path")
    parser.add_argument(
        "--chat-wrapped",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="ask in a user turn (default: where there is a chat template)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, at the end")
    options.add_model(parser, default=DEMO)
    options.add_sampling(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model and fills the gap; 130 where ctrl-C ended it."""
    given = options.sampling_options(args)
    prefix, suffix = _sides(args)
    if args.repo and not args.path:
        raise ValueError("fill: --repo needs --path: the path of the file in the repository")
    from qwen_jax.commands import completion, session

    llm = session.open_llm(args)
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    prompt = llm.fill_prompt(
        prefix, suffix, path=args.path, repo=args.repo, chat_wrapped=args.chat_wrapped
    )
    if args.json or params.n > 1:
        return completion.complete(args, llm, [prompt], params)
    return completion.stream(args, llm, prompt, params)


def _sides(args: argparse.Namespace) -> tuple[str, str]:
    """The code before and after the gap."""
    if args.file:
        if args.prefix_file or args.suffix_file:
            raise ValueError("fill: give --file, or --prefix-file and --suffix-file, not both")
        from qwen_jax.prompt import fim

        return fim.split_fill(options.read_text(args.file))
    if not args.prefix_file and not args.suffix_file:
        raise ValueError("fill: give --file (with a <FILL> mark), or --prefix-file, --suffix-file")
    if args.prefix_file == args.suffix_file == "-":
        raise ValueError("fill: only one of --prefix-file and --suffix-file can be stdin")
    sides = (args.prefix_file, args.suffix_file)
    before, after = ("" if path is None else options.read_text(path) for path in sides)
    return before, after
