"""Pictures and videos of messages: where they may come from, and how many there may be.

Knows URLs and folders; does not look into a picture. What it finds goes on as bytes or as a path
below the allowed folder, so that no text of a client's ever reaches a file system unchecked.
"""

import pathlib
import urllib.parse
from collections.abc import Mapping
from typing import Any

from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.fetch import Fetcher
from qwen_jax.prompt.image_files import local_source

_KINDS = {"image_url": "image", "video_url": "video"}
_SHOWN = 60


class MediaSource:
    """Reads the pictures of messages.

    Args:
        fetcher: for http and https.
        folder: what `file:` URLs may lie in; None: there are none.
        limits: how many of each kind a request may hold.
    """

    def __init__(self, fetcher: Fetcher, folder: pathlib.Path | None, limits: Mapping[str, int]):
        self._fetcher, self._limits = fetcher, limits
        self._folder = None if folder is None else folder.resolve()

    def load(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Messages with the files themselves in place of their URLs.

        Raises:
            ApiError: too many of them, or one that is not allowed or not there.
        """
        self._count(messages)
        return [self._message(message, f"messages[{i}]") for i, message in enumerate(messages)]

    def _count(self, messages: list[dict[str, Any]]) -> None:
        kinds = [
            _KINDS[part["type"]]
            for message in messages
            if isinstance(message.get("content"), list)
            for part in message["content"]
            if part["type"] in _KINDS
        ]
        for kind, most in self._limits.items():
            if kinds.count(kind) > most:
                raise ApiError(
                    400,
                    f"{kinds.count(kind)} {kind}s exceed the limit of {most} in one request",
                    param="messages",
                )

    def _message(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message.get("content")
        if not isinstance(content, list):
            return message
        parts = [self._part(part, f"{where}.content[{j}]") for j, part in enumerate(content)]
        return {**message, "content": parts}

    def _part(self, part: dict[str, Any], where: str) -> dict[str, Any]:
        kind = _KINDS.get(part["type"])
        if kind is None:
            return part
        options = dict(part)
        given = options.pop(options.pop("type"))
        url = given["url"] if isinstance(given, dict) else given
        try:
            return {"type": kind, kind: self._read(url), **options}
        except ValueError as error:
            raise ApiError(400, f"{where}: {error}", param=where) from error

    def _read(self, url: str) -> bytes | pathlib.Path:
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            found = local_source(url, "the URL")
            assert isinstance(found, bytes)
            return found
        if scheme in ("http", "https"):
            return self._fetcher.fetch(url)
        if scheme == "file":
            return self._below_folder(url)
        raise ValueError(f"{url[:_SHOWN]!r} is no data:, http:, https: or file: URL")

    def _below_folder(self, url: str) -> pathlib.Path:
        if self._folder is None:
            raise ValueError("no file: URLs are read here; send a data: URL")
        # Whatever is wrong with the path, the answer is the same: it tells nothing of other files.
        problem = ValueError("there is no such file below the folder that may be read")
        parts = urllib.parse.urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise problem
        try:
            path = pathlib.Path(urllib.parse.unquote(parts.path)).resolve(strict=True)
        except (OSError, ValueError, RuntimeError):
            raise problem from None
        if not path.is_relative_to(self._folder) or not path.is_file():
            raise problem
        return path
