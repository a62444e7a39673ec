"""What the owner of a server may choose. Plain values; knows no request."""

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Of one server. Sizes in bytes, times in seconds.

    Attributes:
        model_names: what requests may call the model; the first one is what replies say.
        api_keys: one of them must come as bearer token; none: everybody may ask.
        media_hosts: hosts that pictures may be fetched from, as ``host`` or ``host:port``.
        media_folder: `file:` URLs may name what is below; None: none.
        media_limits: pictures and videos per request.
        max_media: a fetched picture or video at most.
        max_body: a request's body at most.
        max_upload: an uploaded file at most.
        max_requests: generating or waiting at once; more are turned away with 429.
        body_timeout: for a body to arrive.
        send_timeout: for a client to take a piece of a reply.
        fetch_timeout: for a picture or a video to be fetched.
        compile_timeout: for a schema or a grammar to be compiled.
        request_timeout: for a whole request.
        shutdown_timeout: for what is running when the server is asked to stop.
        state: directory of files and batches; None: no such routes.
        max_batch_lines: requests of one batch.
        batch_concurrency: requests of batches at once.
    """

    model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    media_hosts: tuple[str, ...] = ()
    media_folder: pathlib.Path | None = None
    media_limits: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"image": 32, "video": 2}
    )
    max_media: int = 64 * 2**20
    max_body: int = 64 * 2**20
    max_upload: int = 512 * 2**20
    max_requests: int = 256
    body_timeout: float = 60.0
    send_timeout: float = 60.0
    fetch_timeout: float = 20.0
    compile_timeout: float = 10.0
    request_timeout: float = 3600.0
    shutdown_timeout: float = 60.0
    state: pathlib.Path | None = None
    max_batch_lines: int = 50_000
    batch_concurrency: int = 16

    def __post_init__(self) -> None:
        if not self.model_names:
            raise ValueError("model_names is empty: a server needs a name for its model")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not value > 0:
                raise ValueError(f"{field.name}={value} is not positive")
        if any(not key for key in self.api_keys):
            raise ValueError("an API key is empty; leave it out for a server without keys")
