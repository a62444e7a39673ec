"""`qwen-jax serve`: an OpenAI-compatible server for one model."""

import argparse
import contextlib
import ipaddress
import os
import pathlib
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from qwen_jax.commands import media, options, processes
from qwen_jax.demo import DEMO, NAME

if TYPE_CHECKING:
    from qwen_jax.server.settings import Settings
    from qwen_jax.server.storage import Storage

EXAMPLE = "qwen-jax serve --model Qwen/Qwen3-0.6B --port 8000 --api-key secret"

_MIB = 2**20
_SAY_EVERY = 10.0  # seconds, where there is no bar


def add_options(parser: argparse.ArgumentParser) -> None:
    """What the command takes."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address (default: this machine only)")
    group.add_argument("--port", metavar="N", type=int, default=8000, help="0: any free one")
    group.add_argument(
        "--served-model-name",
        metavar="N",
        action="append",
        help="what requests call the model (default: --model); may be repeated",
    )
    group.add_argument(
        "--api-key",
        metavar="K",
        action="append",
        help="asked of every request to /v1; may be repeated (or QWEN_JAX_API_KEY, which ps does "
        "not show)",
    )
    group.add_argument(
        "--state-dir",
        metavar="DIR",
        help="files and batches ('off': none; default: qwen_jax/server in $XDG_STATE_HOME or "
        "~/.local/state)",
    )
    group.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compile all programs first, and not when a request needs them",
    )
    group.add_argument(
        "--access-log",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="a line for each request",
    )
    media.add_media(parser)
    _add_limits(parser)
    options.add_model(parser, default=DEMO)
    options.add_seed(parser)
    options.add_runtime(parser)
    options.add_debug(parser)


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")

    def number(name: str, kind: type, default: Any, help: str) -> None:
        metavar = "N" if kind is int else "S"
        group.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=help)

    number("max-requests", int, 256, "in progress at once; more get 429")
    number("max-body-mb", int, 64, "of a request")
    number("max-upload-mb", int, 512, "of a file for /v1/files")
    number("request-timeout", float, 3600.0, "seconds for a whole request")
    number("body-timeout", float, 60.0, "seconds for a body to arrive")
    number("send-timeout", float, 60.0, "seconds for a client to take a piece of a stream")
    number("shutdown-timeout", float, 60.0, "seconds for what runs when the server is stopped")


def run(args: argparse.Namespace) -> int:
    """Loads the model and serves it until ctrl-C or SIGTERM."""
    wanted = options.llm_options(args)
    from qwen_jax.commands import session

    settings = address = storage = None
    with contextlib.ExitStack() as held:
        if processes.is_first():
            settings = _settings(args, wanted["model"])
            _check_address(args)
            address = held.enter_context(bind(args))
            if settings.state is not None:
                from qwen_jax.server.storage import Storage

                storage = held.enter_context(contextlib.closing(Storage.open(settings.state)))
        llm = session.open_llm(args)
        serve(args, llm, settings, address, storage)
    return 0


def bind(args: argparse.Namespace) -> socket.socket:
    """Takes the address before a model is loaded for it; nobody is answered there yet.

    Raises:
        ValueError: it cannot be had.
    """
    with contextlib.ExitStack() as unless_taken:
        try:
            found = socket.getaddrinfo(args.host, args.port, type=socket.SOCK_STREAM)
            taken = unless_taken.enter_context(socket.socket(found[0][0]))
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(found[0][4])
        except OSError as error:
            raise ValueError(
                f"serve: {args.host}:{args.port} cannot be had: {error.strerror}; give another "
                "--host or --port (0: any free one)"
            ) from None
        unless_taken.pop_all()
    return taken


def serve(
    args: argparse.Namespace,
    llm: Any,
    settings: "Settings | None",
    address: socket.socket | None,
    storage: "Storage | None" = None,
) -> None:
    """Serves a model that is loaded, until a signal ends it.

    settings, address: None in a process that only helps process 0.
    storage: of ``settings.state``, already open; None where there is none.
    """
    from qwen_jax.engine.led import led

    def work() -> str:
        assert settings is not None
        assert address is not None
        _answer(args, llm, settings, address, storage)
        return ""

    try:
        if args.warmup:
            _warm_up(args, llm)
        led(llm.engine, llm.forms.compiled, work)
    finally:
        llm.engine.close()


def _answer(
    args: argparse.Namespace,
    llm: Any,
    settings: "Settings",
    address: socket.socket,
    storage: "Storage | None",
) -> None:
    import uvicorn

    from qwen_jax.commands import session
    from qwen_jax.server.app import Server, make_app

    service, app = make_app(llm, settings, storage)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning" if args.quiet else "info",
        access_log=args.access_log,
        server_header=False,
        timeout_graceful_shutdown=int(settings.send_timeout) + 1,
    )
    where = f"http://{args.host}:{address.getsockname()[1]}"
    session.say(args, f"serving {settings.model_names[0]} on {where} (ctrl-C ends it)")
    with _signals_end_it():
        Server(config, service).run(sockets=[address])


def _warm_up(args: argparse.Namespace, llm: Any) -> None:
    """Compiles what requests will need, so that none of them waits for it."""
    from tqdm import tqdm

    from qwen_jax.commands import session

    began = said = time.monotonic()
    shown = not args.quiet and sys.stderr.isatty()
    with tqdm(desc="compile", unit="program", disable=not shown, leave=False) as bar:

        def show(done: int, whole: int) -> None:
            nonlocal said
            bar.total = whole
            bar.update(done - bar.n)
            if not shown and time.monotonic() > said + _SAY_EVERY:  # in a log, or a container
                said = time.monotonic()
                session.say(args, f"compile: {done} of {whole} programs")

        llm.engine.warmup(show)
    try:
        _ = llm.forms.compiler
    except (ModuleNotFoundError, ValueError) as error:  # said to those who ask for a form, too
        session.say(args, f"no structured outputs: {error}")
    session.say(args, f"compile: {time.monotonic() - began:.1f} s (--no-warmup: when asked)")


@contextlib.contextmanager
def _signals_end_it() -> Iterator[None]:
    """uvicorn raises the signal that ended it once more, for whoever waits: here nobody does."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(kind, lambda *_: None) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _settings(args: argparse.Namespace, model: str) -> "Settings":
    try:
        import fastapi  # noqa: F401  (the extra, before the model is loaded)
        import uvicorn  # noqa: F401

        from qwen_jax.server.settings import Settings
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"serve needs {error.name}: pip install 'qwen-jax[server]'", name=error.name
        ) from None
    keys = args.api_key or [key for key in [os.environ.get("QWEN_JAX_API_KEY")] if key]
    return Settings(
        model_names=tuple(args.served_model_name or [NAME if model == DEMO else model]),
        api_keys=tuple(keys),
        media_hosts=tuple(args.allowed_media_domains),
        media_folder=media.folder(args),
        media_limits=media.limits(args),
        max_requests=args.max_requests,
        max_body=args.max_body_mb * _MIB,
        max_upload=args.max_upload_mb * _MIB,
        request_timeout=args.request_timeout,
        body_timeout=args.body_timeout,
        send_timeout=args.send_timeout,
        shutdown_timeout=args.shutdown_timeout,
        state=_state(args.state_dir),
    )


def _state(wanted: str | None) -> pathlib.Path | None:
    if wanted == "off":
        return None
    home = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return pathlib.Path(wanted or f"{home}/qwen_jax/server").expanduser()


def _check_address(args: argparse.Namespace) -> None:
    """Says it where everybody who reaches the machine could use the model."""
    from qwen_jax.commands import session

    try:
        local = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        local = args.host == "localhost"
    if not local and not (args.api_key or os.environ.get("QWEN_JAX_API_KEY")):
        session.say(args, f"warning: {args.host} is open to others, and no --api-key is asked for")
    if not 0 <= args.port < 65536:
        raise ValueError(f"serve: --port {args.port} is not in 0 .. 65535")
