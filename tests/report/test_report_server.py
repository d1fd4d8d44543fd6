"""The server of `sae-ray report --serve`, asked over HTTP."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from sae_ray.jobs.cli import main

from sae_ray import import_activations
from sae_ray.errors import UsageError
from sae_ray.report.server import report_server
from sae_ray.store.files import Folder

PAGE = "<!DOCTYPE html><title>µ</title>"


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    """Of a server of a folder beside which lies what is nobody's business."""
    (tmp_path / "report" / "data" / "a cell").mkdir(parents=True)
    (tmp_path / "report" / "index.html").write_text(PAGE, encoding="utf-8")
    (tmp_path / "report" / "data" / "a cell" / "index.js").write_text("report()")
    (tmp_path / "secret.txt").write_text("secret")
    with report_server(Folder(tmp_path / "report"), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def asked(port: int, path: str, host: str = "localhost", method: str = "GET") -> tuple[int, str, str]:
    """Status, media type and text of what is at a path, which is sent as it is."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", f"{host}:{port}")
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, str(answer.headers["Content-Type"]), answer.read().decode()
    connection.close()
    return found


def test_a_report_is_served_and_nothing_else(port: int):
    for path in ("/", "/index.html", "/index.html?a=b"):
        assert asked(port, path) == (200, "text/html; charset=utf-8", PAGE)
    assert asked(port, "/", method="HEAD") == (200, "text/html; charset=utf-8", "")
    status, kind, text = asked(port, "/data/a%20cell/index.js")
    assert (status, kind.partition(";")[0], text) == (200, "text/javascript", "report()")
    outside = (
        "/../secret.txt",
        "/%2e%2e/secret.txt",
        "//../secret.txt",
        "/data/..%2f..%2fsecret.txt",
        "/..%5csecret.txt",
    )
    for path in (*outside, "/missing.js", "/data", "/data/", "/%00", "//["):
        status, _, text = asked(port, path)
        assert (status, "secret" in text) == (404, False), path
    assert asked(port, "/", host="evil.example")[0] == 403, "as after DNS rebinding"
    with pytest.raises(UsageError, match=f"--port {port} cannot be used"):
        report_server(Folder("."), port)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "1"], "add --serve"),
        (["--serve", "--port", "99999"], "99999 is not in the range 0<=x<=65535"),
        (["--serve", "--port", "-5"], "-5 is not in the range"),
    ],
)
def test_a_port_that_cannot_be_is_refused(words: list[str], said: str):
    refused = CliRunner().invoke(main, ["report", *words])
    assert (refused.exit_code, said in " ".join(refused.output.split())) == (2, True), refused.output


def test_a_port_that_is_taken_is_found_before_the_report_is_made(port: int, tmp_path: Path):
    """Which would be refused itself: there are no images."""
    root = tmp_path / "root"
    import_activations(root, "resid", np.eye(50))
    refused = CliRunner().invoke(
        main, ["report", "--root", str(root), "--site", "resid", "--serve", "--port", str(port)]
    )
    assert (refused.exit_code, f"--port {port} cannot be used" in refused.output) == (2, True), refused.output
