"""`qwen-jax chat`: a conversation in the terminal, or one answer."""

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import options, processes
from qwen_jax.demo import DEMO

if TYPE_CHECKING:
    from qwen_jax.commands.conversation import Conversation
    from qwen_jax.llm import LLM

EXAMPLE = 'qwen-jax chat --model Qwen/Qwen3-0.6B --system "Answer in one sentence."'


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    parser.add_argument(
        "--prompt", metavar="TEXT", help="ask this and end; '-' reads stdin (default: interactive)"
    )
    for kind in ("image", "video"):
        parser.add_argument(
            f"--{kind}",
            metavar="FILE",
            action="append",
            default=[],
            help=f"{'an' if kind == 'image' else 'a'} {kind} to ask about; may be repeated",
        )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--tools", metavar="FILE", help="JSON list of tools, as OpenAI's API takes them"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        type=options.json_object,
        default={},
        help="""e.g. '{"enable_thinking": false}'""",
    )
    parser.add_argument(
        "--json", action="store_true", help="with --prompt: one JSON object on stdout, at the end"
    )
    options.add_model(parser, default=DEMO)
    options.add_sampling(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model and answers; 130 where ctrl-C ended an answer, or the conversation."""
    given = options.sampling_options(args)
    if args.prompt is None and (args.json or given.get("n", 1) > 1):
        raise ValueError("chat: --json and --n need --prompt: a conversation shows one text a turn")
    tools = _tools(args.tools)
    prompt = options.read_text("-") if args.prompt == "-" else args.prompt
    from qwen_jax.commands import completion, session
    from qwen_jax.commands.conversation import Conversation

    llm = session.open_llm(args)
    if llm.template is None:
        raise ValueError("chat: this checkpoint has no chat template: use qwen-jax generate")
    params = dataclasses.replace(llm.get_default_sampling_params(), **given)
    talk = Conversation(args, llm, params, tools=tools, kwargs=args.chat_template_kwargs)
    for kind in ("image", "video"):
        for path in getattr(args, kind):
            talk.attach(kind, path)
    if prompt is None:
        return processes.end_together(_converse(llm, talk))
    if not args.json and params.n == 1:
        return talk.turn(prompt)
    messages = talk.asked(prompt)
    return completion.finish(
        args,
        llm,
        lambda: llm.chat(
            messages,
            params,
            tools=tools,
            chat_template_kwargs=args.chat_template_kwargs,
            use_tqdm=False,
        ),
    )


def _converse(llm: "LLM", talk: "Conversation") -> int:
    """Turns, which process 0 has with whoever is at its terminal."""
    from qwen_jax.engine.led import led

    return int(led(llm.engine, llm.forms.compiled, lambda: str(talk.loop())))


def _tools(path: str | None) -> Sequence[Mapping[str, Any]] | None:
    if path is None:
        return None
    try:
        tools = json.loads(options.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"--tools {path}: not JSON: {error}") from error
    if not isinstance(tools, list):
        raise ValueError(f"--tools {path}: a list of tools is needed, not {type(tools).__name__}")
    return tools
