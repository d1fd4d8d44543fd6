"""What cluster/serve/local.yaml and docs/cluster.md say to type on a cluster runs as it stands."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from sae_ray.jobs.cluster import free_port

from tests.machine import DEAD_PROXY, PATIENCE_S, RAY, head_options, until

from .conftest import chat

REPOSITORY = Path(__file__).parents[2]
pytestmark = [pytest.mark.ray, pytest.mark.serve]

TOLD_WITHIN_S = 5.0
"""What a load balancer that asks /ready may count on."""

STUDY = """
name = "demo"
images.train.path = "{world}/heldout"
images.heldout_fraction = 0.25
encoder.model = "{world}/clip"
judge = {{ model = "open_clip:local-dir:{world}/judge", point = "projection" }}
grid = [{{ sites = ["projection"], expansions = [1], k = [4] }}]
training = {{ batch_size = 64, steps = 60, warmup_steps = 5, threshold_start_step = 20 }}
resources = {{ extract.workers = 1, evaluate.workers = 1, score.workers = 1 }}
"""


def lines_to_deploy() -> str:
    """The indented lines of the comment at the head of the configuration."""
    text = (REPOSITORY / "cluster" / "serve" / "local.yaml").read_text()
    return "".join(re.findall(r"^#   (.*\n)", text, re.MULTILINE))


def lines_to_submit() -> str:
    page = (REPOSITORY / "docs" / "cluster.md").read_text()
    [section] = [one for one in page.split("\n## ") if one.startswith("Submitting a study")]
    [lines] = re.findall(r"^```\n(.*?)^```", section, re.DOTALL | re.MULTILINE)
    return lines.replace("http://127.0.0.1:8265", "$RAY_DASHBOARD_ADDRESS")


@pytest.fixture
def checkout(served_study, tmp_path) -> tuple[Path, str]:
    """A copy whose `runs/demo` is a small finished study, with a port of its own, and the address of that."""
    folder = tmp_path / "checkout"
    for room in ("sae_ray", "jobs", "serve", "cluster"):
        shutil.copytree(REPOSITORY / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "runs").mkdir()
    (folder / "runs" / "demo").symlink_to(served_study)
    (folder / "studies").mkdir()
    values = json.loads((served_study / "study.json").read_text())
    world = Path(values["study"]["images"]["train"]["path"]).parent
    (folder / "studies" / "demo.toml").write_text(STUDY.format(world=world))
    file = folder / "cluster" / "serve" / "local.yaml"
    config, port = yaml.safe_load(file.read_text()), free_port()
    config["http_options"]["port"] = port
    file.write_text(yaml.safe_dump(config))
    return folder, f"http://127.0.0.1:{port}"


@pytest.fixture(params=["no token at home", "a token at home"])
def home(request, tmp_path) -> Path:
    home = tmp_path / "home"
    (home / ".ray").mkdir(parents=True)
    if request.param == "a token at home":
        (home / ".ray" / "auth_token").write_text("0123456789abcdef" * 4)
    return home


@pytest.fixture
def shell(checkout, home) -> Iterator[Callable[[str], str]]:
    """Runs lines in the copy. `ray start` gets ports and a folder of its own; what was started ends with the test."""
    folder, _ = checkout
    scratch = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))  # Ray's sockets need a short path
    dashboard = free_port()
    isolated = head_options(scratch / "ray", dashboard, cpus=8)
    ours = Path(sys.executable).parent
    start = f'exec {ours}/python -c "{RAY}" "$@" {" ".join(isolated)}'
    (scratch / "ray-command").write_text(f'#!/bin/sh\nif [ "$1" = start ]; then {start}; fi\nexec {ours}/ray "$@"\n')
    (scratch / "bin").mkdir()
    (scratch / "ray-command").chmod(0o755)
    (scratch / "ray-command").rename(scratch / "bin" / "ray")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        "PATH": f"{scratch / 'bin'}:{ours}:{os.environ['PATH']}",
        "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
    }
    sessions = []

    def run(lines: str) -> str:
        command = ["bash", "-euxc", lines]
        with (scratch / "output").open("w+") as output:  # not a pipe, which what stays behind would keep open
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
            sessions.append(process.pid)
            code = process.wait()
            output.seek(0)
            said = output.read()
        assert code == 0, said
        return said

    def left() -> list[int]:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if session(pid) in sessions]

    yield run
    for pid in left():
        os.kill(pid, signal.SIGKILL)
    until(lambda: not left())
    shutil.rmtree(scratch, ignore_errors=True)


def session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


@pytest.fixture(scope="module")
def submitted(tmp_path_factory) -> Path:
    """Where the first of the tests below leaves the root of its study; the next one submits what is finished."""
    return tmp_path_factory.mktemp("submitted") / "root"


def test_an_application_is_deployed_and_a_study_submitted(checkout, home, shell, submitted):
    _, address = checkout
    shell(lines_to_deploy())
    until(lambda: ready(address))
    said = shell('! curl -sf "$RAY_DASHBOARD_ADDRESS/api/version"')
    assert "ray_version" not in said, "who has no token is not let in"

    root, again = home / "sae-ray" / "demo", submitted.exists()
    if again:
        shutil.copytree(submitted, root)
    said = shell(lines_to_submit())
    assert "comparisons hold" in said
    assert "not writable" not in said
    assert ("nothing left to do" in said) == again
    summary = json.loads((root / "summary.json").read_text())
    assert len(summary["cells"]) == 2
    assert not summary["failed"]
    if not again:
        shutil.copytree(root, submitted)


def test_sae_ray_serve_prints_only_its_own_lines(served_study, tmp_path):
    with serving(served_study, tmp_path) as (address, server):
        assert ready(address)
    assert ((tmp_path / "stderr").read_text(), server.returncode) == ("", 0)
    assert not (tmp_path / ".ray").exists(), "a token there would lock the user out of heads that ask for one"


@pytest.mark.slow
def test_a_dead_engine_is_told_of_within_seconds_and_replaced(served_study, tmp_path):
    config = tmp_path / "vllm.yaml"
    config.write_text("language: {engine: vllm, kv_cache_mb: 256}\n")
    with serving(served_study, tmp_path, "--config", str(config)) as (address, server):
        first = answered(address)
        for _ in range(2):
            [core] = [one for one in psutil.Process(server.pid).children(recursive=True) if "EngineCor" in one.name()]
            core.kill()
            killed = time.monotonic()
            until(lambda: not ready(address))
            assert time.monotonic() - killed < TOLD_WITHIN_S
            until(lambda: ready(address))
            assert answered(address) == first


@contextmanager
def serving(root: Path, home: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`sae-ray serve` from when it serves until it was asked to end, its errors in the file `stderr` of its home."""
    address = f"http://127.0.0.1:{free_port()}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "SAE_RAY_"))}
    command = [sys.executable, "-m", "sae_ray.jobs.cli", "serve", "--root", str(root), *options]
    with (home / "stderr").open("w") as stderr:
        server = subprocess.Popen(
            [*command, "--port", address.split(":")[-1]],
            env=environment | DEAD_PROXY | {"HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
        try:
            assert server.stdout is not None
            assert any("documentation" in line for line in server.stdout), "it ended before it served"
            yield address, server
            server.terminate()
            server.wait(PATIENCE_S)
        finally:
            server.kill()


def answered(address: str) -> str:
    response = httpx.post(f"{address}/v1/chat/completions", json=chat("What is shown?"), timeout=PATIENCE_S)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def ready(address: str) -> bool:
    try:
        return httpx.get(f"{address}/ready", timeout=PATIENCE_S).status_code == 200
    except httpx.HTTPError:
        return False
