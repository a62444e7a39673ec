"""Pictures: from where they may come, and that nothing else is reached."""

import base64
import contextlib
import http.server
import socket
import threading

import pytest
from fake_llm import FakeLLM
from serving import ask

from qwen_jax.openai.errors import ApiError
from qwen_jax.openai.fetch import Fetcher, is_private
from qwen_jax.openai.media import MediaSource

PNG = b"\x89PNG not really"
URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.seen.append(self.path)
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/big":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x" * 10_000)
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.server.stop.wait(0.05)
        elif self.path == "/none":
            self.send_error(404)
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

    def log_message(self, *args):
        pass


@pytest.fixture
def site():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.seen, server.stop = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    thread.join()


def host(site):
    return f"127.0.0.1:{site.server_port}"


def fetcher(site, **changes):
    options = {"most": 100_000, "timeout": 5.0, "forbidden": lambda address: False, **changes}
    return Fetcher([host(site), f"localhost:{site.server_port}"], **options)


def test_a_file_is_fetched_from_a_host_on_the_list(site):
    assert fetcher(site).fetch(f"http://{host(site)}/a.png?x=1&y=a b") == PNG
    assert site.seen == ["/a.png?x=1&y=a%20b"]


def test_another_host_or_port_is_not_asked(site):
    for url in (
        "http://example.com/a.png",
        f"http://127.0.0.1:{site.server_port + 1}/",
        "http://127.0.0.1/",
    ):
        with pytest.raises(ValueError, match="nothing is fetched from"):
            fetcher(site).fetch(url)


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://a:b/", "gopher://x/", "http:///x", "ftp://x"]
)
def test_what_is_no_url_is_refused(site, url):
    with pytest.raises(ValueError, match=r"URL|nothing is fetched"):
        fetcher(site).fetch(url)


def test_a_private_address_is_refused_even_on_the_list(site):
    guarded = fetcher(site, forbidden=is_private)
    for name in (host(site), f"localhost:{site.server_port}"):
        with pytest.raises(ValueError, match="private network"):
            guarded.fetch(f"http://{name}/a.png")
    assert site.seen == []


def test_a_redirect_is_checked_like_the_first_url(site):
    assert fetcher(site).fetch(f"http://{host(site)}/to//a.png") == PNG
    assert fetcher(site).fetch(f"http://{host(site)}/to/http://{host(site)}/a.png") == PNG
    for target in ("http://169.254.169.254/latest", "file:///etc/passwd", "http://example.com/"):
        with pytest.raises(ValueError, match=r"nothing is fetched|no http"):
            fetcher(site).fetch(f"http://{host(site)}/to/{target}")
    with pytest.raises(ValueError, match="redirects"):
        fetcher(site).fetch(f"http://{host(site)}/loop")


def test_a_redirect_to_a_private_address_is_refused(site):
    # Only the second name is forbidden, as if DNS had changed its mind between the two.
    seen = []

    def forbidden(address):
        seen.append(address)
        return len(seen) > 1

    with pytest.raises(ValueError, match="private network"):
        fetcher(site, forbidden=forbidden).fetch(f"http://{host(site)}/to//a.png")


def test_a_name_with_one_private_address_is_refused(site, monkeypatch):
    entry = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    found = [(*entry, ("93.184.216.34", 80)), (*entry, ("10.0.0.1", 80))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: found)
    with pytest.raises(ValueError, match="private network"):
        fetcher(site, forbidden=is_private).fetch(f"http://{host(site)}/")


def test_sizes_times_and_errors_are_bounded(site):
    with pytest.raises(ValueError, match="exceeds 100,000 bytes"):
        fetcher(site).fetch(f"http://{host(site)}/big")
    with pytest.raises(ValueError, match=r"within|Timeout"):
        fetcher(site, timeout=0.3).fetch(f"http://{host(site)}/slow")
    with pytest.raises(ValueError, match="status 404"):
        fetcher(site).fetch(f"http://{host(site)}/none")


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "::1",
     "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "100.64.0.1", "224.0.0.1", "2002:7f00:1::"],
)  # fmt: skip
def test_addresses_of_private_networks(address):
    assert is_private(address)


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:4700::1111", "8.8.8.8"])
def test_addresses_of_the_internet(address):
    assert not is_private(address)


# ---- messages --------------------------------------------------------------------------------


def source(folder=None, **limits):
    fetching = Fetcher([], most=1000, timeout=1.0)
    return MediaSource(fetching, folder, {"image": 2, "video": 1, **limits})


def message(*urls, kind="image_url"):
    parts = [{"type": kind, kind: {"url": url}, "max_pixels": 5000} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what"}]}]


def test_a_data_url_becomes_bytes_and_options_stay():
    (found,) = source().load(message(URL))
    assert found["content"][0] == {"type": "image", "image": PNG, "max_pixels": 5000}
    assert found["content"][1] == {"type": "text", "text": "what"}


def test_files_below_the_folder_only(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a b.png").write_bytes(PNG)
    (tmp_path / "secret.png").write_bytes(PNG)
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (found,) = source(folder).load(message(f"file://{folder}/a%20b.png"))
    assert found["content"][0]["image"] == folder / "a b.png"
    messages = set()
    for path in (
        "../secret.png",
        "%2e%2e/secret.png",
        "link.png",
        "none.png",
        "",
        "a%00b",
        "x" * 5000,
    ):
        with pytest.raises(ApiError) as caught:
            source(folder).load(message(f"file://{folder}/{path}"))
        messages.add(caught.value.message)
    with pytest.raises(ApiError) as caught:
        source(folder).load(message(f"file://other.host{folder}/a%20b.png"))
    messages.add(caught.value.message)
    assert len(messages) == 1, "what is wrong must not tell which files there are"
    with pytest.raises(ApiError, match="no file: URLs"):
        source().load(message(f"file://{folder}/a%20b.png"))


@pytest.mark.parametrize(
    "url", ["/etc/passwd", "etc/passwd", "", "C:\\x.png", "javascript:1", "a.png"]
)
def test_a_bare_path_is_never_read(url, tmp_path):
    with pytest.raises(ApiError, match="no data:, http:, https: or file: URL"):
        source(tmp_path).load(message(url))


def test_too_many_pictures_are_refused():
    with pytest.raises(ApiError, match="3 images exceed the limit of 2"):
        source().load(message(URL) * 3)
    with pytest.raises(ApiError, match="2 videos exceed the limit of 1"):
        source().load(message(URL, URL, kind="video_url"))


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("data:image/png;base64,###", "base64"),
        ("data:,plain", "base64"),
        ("http://127.0.0.1:1/a.png", "nothing is fetched"),
        ("file:///etc/passwd", "no file: URLs"),
        (URL, "reads text only"),
    ],
)
def test_a_picture_that_cannot_be_used_is_a_bad_request(url, said):
    body = {"messages": message(url)}
    response = ask(FakeLLM(), "POST", "/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]
