"""Images of clients, without a server."""

from __future__ import annotations

import asyncio
import http.server
import threading

import pytest
from fastapi import HTTPException
from sae_ray.serve import images
from sae_ray.serve.images import check_public, fetch, read_image

from .conftest import data_url, white


@pytest.fixture
def web():
    """A web server on this machine; its answers come from a table."""
    answers: dict[str, tuple[int, dict[str, str], bytes]] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}", answers
    server.shutdown()
    server.server_close()


def refusal(work) -> str:
    with pytest.raises(HTTPException) as caught:
        asyncio.run(work)
    return caught.value.detail


PRIVATE = (
    *("127.0.0.1", "10.0.0.1", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0", "224.0.0.1", "100.64.0.1"),
    *("::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "ff02::1", "::"),
)


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_that_are_not_public(address):
    with pytest.raises(OSError, match="not a public address"):
        check_public(address)


def test_public_addresses():
    check_public("93.184.216.34")
    check_public("2606:2800:220:1:248:1893:25c8:1946")


def test_a_host_that_is_not_allowed_is_not_asked(web):
    url, _ = web
    assert "does not fetch images" in refusal(fetch(f"{url}/a", [], 1000))
    assert "does not fetch images" in refusal(fetch(f"{url}/a", ["example.com"], 1000))
    assert "does not fetch images" in refusal(fetch("http://localhost@example.com/a", ["localhost"], 1000))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_an_allowed_host_that_is_not_public_is_not_asked(web, host):
    url, answers = web
    answers["/a"] = (200, {}, b"secret")
    asked = f"{url.replace('localhost', host)}/a"
    assert "could not be fetched" in refusal(fetch(asked, ["localhost", "127.0.0.1", "::1"], 1000))


def test_limits_of_what_is_fetched(web, monkeypatch):
    url, answers = web
    monkeypatch.setattr(images, "check_public", lambda address: None)  # the test's own server is all there is
    answers["/image"] = (200, {}, b"x" * 900)
    answers["/large"] = (200, {}, b"x" * 5000)
    answers["/moved"] = (302, {"Location": f"{url}/image"}, b"")
    assert asyncio.run(fetch(f"{url}/image", ["localhost"], 1000)) == b"x" * 900
    assert len(asyncio.run(fetch(f"{url}/large", ["localhost"], 1000))) == 1001
    assert "answered 302" in refusal(fetch(f"{url}/moved", ["localhost"], 1000))
    assert "more than" in refusal(read_image(f"{url}/large", ["localhost"], 1000, 10**6))


def test_sizes_are_checked_before_decoding():
    image = data_url(white())
    assert asyncio.run(read_image(image, [], 10**6, 56 * 56)).size == (56, 56)
    assert "pixel bomb: 56x56" in refusal(read_image(image, [], 10**6, 56 * 56 - 1))
    assert "more than" in refusal(read_image(image, [], 10, 10**6))
