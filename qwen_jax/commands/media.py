"""Options for the pictures and videos of requests: where they may come from, and how many.

Shared by the commands that take OpenAI's requests; knows no request.
"""

import argparse
import pathlib


def add_media(parser: argparse.ArgumentParser) -> None:
    """What may be read for a request."""
    group = parser.add_argument_group("pictures", "data: URLs are always read.")
    group.add_argument(
        "--allowed-media-domains",
        metavar="HOST",
        action="append",
        default=[],
        help="fetch http(s) URLs from it (HOST or HOST:PORT); may be repeated",
    )
    group.add_argument("--allowed-local-media-path", metavar="DIR", help="read file: URLs below it")
    group.add_argument("--max-images", metavar="N", type=int, default=32, help="per request")
    group.add_argument("--max-videos", metavar="N", type=int, default=2, help="per request")


def folder(args: argparse.Namespace) -> pathlib.Path | None:
    """What `file:` URLs may lie in.

    Raises:
        ValueError: it is no directory.
    """
    given = args.allowed_local_media_path
    if given is not None and not pathlib.Path(given).is_dir():
        raise ValueError(f"--allowed-local-media-path {given} is no directory")
    return None if given is None else pathlib.Path(given)


def limits(args: argparse.Namespace) -> dict[str, int]:
    """How many of each kind a request may hold."""
    return {"image": args.max_images, "video": args.max_videos}
