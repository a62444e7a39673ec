"""Fetches a file over HTTP from hosts on a list, and from no address of a private network.

Knows sockets, redirects and DNS; knows nothing of what the file is. The name is resolved once and
the connection goes to the address that was checked, so that a name cannot point elsewhere between
the check and the connection.
"""

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse
from collections.abc import Callable, Collection

_REDIRECTS = 3
_MOVED = (301, 302, 303, 307, 308)
_PIECE = 64 * 1024
_DEFAULT_PORTS = {"http": 80, "https": 443}

Forbidden = Callable[[str], bool]


def is_private(address: str) -> bool:
    """Whether an IP address is not one of the public internet."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    if mapped is not None:
        return is_private(str(mapped))
    return not ip.is_global or ip.is_multicast


class Fetcher:
    """Fetches files.

    Args:
        hosts: allowed ones, ``host`` for its usual port or ``host:port``.
        most: bytes of a file.
        timeout: seconds for all of it, redirects included.
        forbidden: addresses that are not connected to.
    """

    def __init__(
        self,
        hosts: Collection[str],
        *,
        most: int,
        timeout: float,
        forbidden: Forbidden = is_private,
    ):
        self._hosts = {host.lower() for host in hosts}
        self._most, self._timeout, self._forbidden = most, timeout, forbidden

    def fetch(self, url: str) -> bytes:
        """The file at a URL.

        Raises:
            ValueError: it may not be fetched, or it cannot be; the message names the host only.
        """
        deadline = time.monotonic() + self._timeout
        for _ in range(_REDIRECTS + 1):
            parts = self._checked(url)
            try:
                found = self._get(parts, deadline)
            except (OSError, http.client.HTTPException) as error:
                raise ValueError(
                    f"{parts.hostname} does not give the file: {type(error).__name__}"
                ) from error
            if isinstance(found, bytes):
                return found
            url = urllib.parse.urljoin(url, found)
        raise ValueError(f"more than {_REDIRECTS} redirects")

    def _checked(self, url: str) -> urllib.parse.SplitResult:
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").lower(), parts.port
        except ValueError as error:
            raise ValueError(f"not a URL: {error}") from None
        if parts.scheme not in _DEFAULT_PORTS or not host:
            raise ValueError(f"{url[:40]!r} is no http or https URL")
        name = host if port in (None, _DEFAULT_PORTS[parts.scheme]) else f"{host}:{port}"
        if name not in self._hosts:
            allowed = ", ".join(sorted(self._hosts)) or "none"
            raise ValueError(
                f"nothing is fetched from {name[:100]!r} (allowed: {allowed}); send a data: URL"
            )
        return parts

    def _get(self, parts: urllib.parse.SplitResult, deadline: float) -> bytes | str:
        """The file, or where it has moved to."""
        connection = self._connect(parts, deadline)
        try:
            path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
            query = urllib.parse.quote(parts.query, safe="/%:@!$&'()*+,;=~-._?")
            target = f"{path}?{query}" if query else path
            connection.request("GET", target, headers={"Accept": "image/*, video/*"})
            reply = connection.getresponse()
            if reply.status in _MOVED:
                return reply.getheader("Location") or ""
            if reply.status != 200:
                raise ValueError(f"{parts.hostname} answers with status {reply.status}")
            return self._read(reply, connection, deadline)
        finally:
            connection.close()

    def _connect(
        self, parts: urllib.parse.SplitResult, deadline: float
    ) -> http.client.HTTPConnection:
        host = parts.hostname or ""
        port = parts.port or _DEFAULT_PORTS[parts.scheme]
        left = max(deadline - time.monotonic(), 0.001)
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not addresses or any(self._forbidden(address) for address in addresses):
            raise ValueError(f"{host} is an address of a private network")
        opened = socket.create_connection((addresses[0], port), timeout=left)
        connection = http.client.HTTPConnection(host, port, timeout=left)
        if parts.scheme == "https":
            try:
                opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host)
            except OSError:
                opened.close()
                raise
        connection.sock = opened
        return connection

    def _read(
        self, reply: http.client.HTTPResponse, connection: http.client.HTTPConnection, end: float
    ) -> bytes:
        pieces, size = [], 0
        while piece := reply.read1(_PIECE):
            pieces.append(piece)
            size += len(piece)
            if size > self._most:
                raise ValueError(f"the file exceeds {self._most:,} bytes")
            left = end - time.monotonic()
            if left <= 0:
                raise ValueError(f"the file did not arrive within {self._timeout:g} seconds")
            if connection.sock is not None:
                connection.sock.settimeout(left)
        return b"".join(pieces)
