"""`sae-ray submit` to a real head that asks for a token; and what is refused or uploaded, without one."""

from __future__ import annotations

import http.server
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from click.testing import CliRunner
from ray._private.runtime_env.packaging import create_package, get_uri_for_directory
from sae_ray.jobs.cli import main, run
from sae_ray.jobs.cluster import free_port
from sae_ray.jobs.options import arguments
from sae_ray.jobs.submit import write_upload

from tests.machine import DEAD_PROXY, PATIENCE_S, RAY, head_options, until
from tests.roots import differences

from .conftest import to_toml

REPOSITORY = Path(__file__).parents[2]
ROOMS = {"sae_ray": "sae_ray", "jobs": "sae_ray/jobs", "serve": "sae_ray/serve"}


class Job(NamedTuple):
    id: str
    status: str
    metadata: dict[str, str]


class Head:
    """A Ray head and how to submit to it. While its gate is shut, jobs begin and wait."""

    def __init__(self, scratch: Path):
        self.token = secrets.token_hex(32)
        self.home = scratch / "home"
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self._gate = scratch / "gate"
        self._scratch = scratch
        (self.home / ".ray").mkdir(parents=True)
        (self.home / ".ray" / "auth_token").write_text(self.token)
        # The `python` of a job is the first one on the path of the head.
        python = scratch / "bin" / "python"
        python.parent.mkdir()
        waiting = f"while [ -e {self._gate} ]; do sleep 0.1; done"
        python.write_text(f'#!/bin/sh\n{waiting}\nexec {sys.executable} "$@"\n')
        python.chmod(0o755)
        plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.environment = plain | {"HOME": str(self.home), "RAY_AUTH_MODE": "token"}

    def start(self) -> subprocess.Popen:
        options = head_options(self._scratch / "ray", self.port, cpus=4)
        path = f"{self._scratch / 'bin'}:{os.environ['PATH']}"
        with (self._scratch / "log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-c", RAY, "start", "--head", "--block", *options],
                env=self.environment | {"PATH": path},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def shut_gate(self) -> None:
        self._gate.touch()

    def open_gate(self) -> None:
        self._gate.unlink(missing_ok=True)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.address}{path}", headers={"Authorization": f"Bearer {self.token}"}, timeout=PATIENCE_S)

    def takes_jobs(self) -> bool:
        with suppress(httpx.TransportError):
            return self.get("/api/jobs/").status_code == 200
        return False

    def jobs(self, root: Path) -> list[Job]:
        """Of a root, in the order of their ids."""
        found = [job for job in self.get("/api/jobs/").json() if (job["metadata"] or {}).get("root") == str(root)]
        return sorted(Job(job["submission_id"], job["status"], job["metadata"]) for job in found)

    def supervisor(self) -> int:
        """The process of the only job that runs."""
        wanted = {"class_name": "JobSupervisor", "state": "ALIVE"}
        query = "&".join(f"filter_keys={key}&filter_predicates=%3D&filter_values={wanted[key]}" for key in wanted)
        (actor,) = self.get(f"/api/v0/actors?detail=1&{query}").json()["data"]["result"]["result"]
        return actor["pid"]

    def log(self, job_id: str) -> str:
        return self.get(f"/api/jobs/{job_id}/logs").json()["logs"]

    def stop(self, job_id: str) -> None:
        headers = {"Authorization": f"Bearer {self.token}"}
        httpx.post(f"{self.address}/api/jobs/{job_id}/stop", headers=headers, timeout=PATIENCE_S).raise_for_status()


class Submitting:
    """A running `sae-ray submit`."""

    def __init__(self, folder: Path, *words: object, patch: str = "pass", **environment: str | None):
        folder.mkdir()
        self._out, self._err = folder / "out", folder / "err"
        code = f"import sys; from sae_ray.jobs import submit; {patch}; from sae_ray.jobs.cli import main; main()"
        with self._out.open("w") as out, self._err.open("w") as err:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, "submit", *map(str, words)],
                cwd=folder,
                env={name: value for name, value in environment.items() if value is not None},
                stdout=out,
                stderr=err,
            )

    @property
    def out(self) -> str:
        """The job's log, as shown so far."""
        return self._out.read_text()

    @property
    def err(self) -> str:
        """The command's own lines."""
        return self._err.read_text()

    def until(self, holds: Callable[[], bool]) -> None:
        def holds_while_it_runs() -> bool:
            assert self._process.poll() is None, self.out + self.err
            return holds()

        until(holds_while_it_runs)

    def code(self) -> int:
        return self._process.wait(PATIENCE_S)

    def interrupt(self) -> None:
        self._process.send_signal(signal.SIGINT)


class Wire:
    """A connection to a port of this machine that can break."""

    def __init__(self, target: int):
        self.port, self._target = free_port(), target
        self.mend()

    def mend(self) -> None:
        self._ends: list[socket.socket] = []
        self._broken = False
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._server], daemon=True).start()

    def cut(self) -> None:
        """Connections end, and none can be made."""
        self._broken = True
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.lose(silently=False)

    def lose(self, silently: bool = True) -> None:
        """Nothing is heard any more of the connections that there are. New ones can be made."""
        ends, self._ends = self._ends, []
        for end in [] if silently else ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self, server: socket.socket) -> None:
        while True:
            try:
                near, _ = server.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=[source, sink], daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(2**16):
                if source in self._ends:
                    sink.sendall(data)
        if source in self._ends:
            with suppress(OSError):
                sink.shutdown(socket.SHUT_WR)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    scratch = Path(tempfile.mkdtemp(prefix="sr", dir="/tmp"))  # Ray's sockets need a short path
    head = Head(scratch)
    process = head.start()

    def takes_jobs() -> bool:
        assert process.poll() is None, (scratch / "log").read_text()
        return head.takes_jobs()

    try:
        until(takes_jobs)
        yield head
    finally:
        # Jobs end with their supervisors, which are in the session of the head.
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with suppress(ProcessLookupError):
                if os.getsid(int(pid)) == process.pid:
                    os.kill(int(pid), signal.SIGKILL)
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def submit(head, tmp_path) -> Iterator[Callable[..., Submitting]]:
    """Starts `sae-ray submit` in a folder of its own; the gate is open again after the test."""
    started: list[Submitting] = []

    def submit(
        *words: object, address: str = head.address, patch: str = "pass", **environment: str | None
    ) -> Submitting:
        words = (*words, "--address", address)
        folder = tmp_path / f"client-{len(started)}"
        started.append(Submitting(folder, *words, patch=patch, **head.environment | DEAD_PROXY | environment))
        return started[-1]

    yield submit
    head.open_gate()
    for one in started:
        one._process.kill()
        one._process.wait()


@pytest.fixture(scope="module")
def root(ran, tmp_path_factory) -> Path:
    """A root of the small study whose last step is left to do."""
    root = shutil.copytree(ran.root, tmp_path_factory.mktemp("submitted") / "root")
    (pictures,) = root.glob("pictures-*")
    shutil.rmtree(pictures)
    shutil.rmtree(root / "report")
    return root


def plain(text: str) -> str:
    """Without colours: Ray gives messages of its own processes some, or none, as it passes them on."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.ray
def test_a_study_is_followed_to_its_end_although_the_connection_breaks(head, submit, ran, root):
    wire = Wire(head.port)
    head.shut_gate()
    client = submit(ran.study, "--root", root, address=f"http://127.0.0.1:{wire.port}")
    client.until(lambda: "Running entrypoint" in client.out)
    (job,) = head.jobs(root)
    assert job.id.startswith("small-")
    assert job.metadata == {"study": "small", "root": str(root)}
    assert f"{job.id}: submitted" in client.err

    wire.cut()
    client.until(lambda: "connection lost" in client.err)
    head.open_gate()
    until(lambda: head.jobs(root)[0].status == "SUCCEEDED")
    wire.mend()
    assert client.code() == 0, client.out + client.err
    assert plain(client.out) == plain(head.log(job.id))
    assert "pictures: done in" in client.out
    assert "comparisons hold" in client.out
    assert client.err.splitlines()[-2:] == [f"{job.id}: reconnected", f"{job.id}: succeeded"]
    assert (root / "report" / "index.html").exists()


@pytest.mark.ray
def test_a_running_study_is_followed_and_not_started_again(head, submit, ran, root):
    """By whoever submits it: at the same moment, or later, or once more after Ctrl-C."""
    before = head.jobs(root)
    head.shut_gate()
    wire = Wire(head.port)
    through_wire = {"address": f"http://127.0.0.1:{wire.port}", "patch": "submit.QUIET_SECONDS = 8"}
    clients = [submit(ran.study, "--root", root), submit(ran.study, "--root", f"{root}/", **through_wire)]
    for client in clients:
        client.until(lambda client=client: "Running entrypoint" in client.out)
    (job,) = (one for one in head.jobs(root) if one not in before)
    assert sorted(("submitted to" in client.err, "already working on" in client.err) for client in clients) == [
        (False, True),
        (True, False),
    ]

    interrupted, left_alone = clients
    interrupted.interrupt()
    assert interrupted.code() == 130
    assert f"ray job stop {job.id} --address {head.address}" in interrupted.err
    assert "submit again" in interrupted.err
    assert "Traceback" not in interrupted.err
    detached = submit(ran.study, "--root", root, "--detach")
    assert detached.code() == 0, detached.err
    assert detached.out == f"{job.id}\n"
    assert "already working on" in detached.err
    assert f"ray job stop {job.id} --address {head.address}" in detached.err

    wire.lose()
    head.open_gate()
    assert left_alone.code() == 0, left_alone.out + left_alone.err
    assert plain(left_alone.out) == plain(head.log(job.id))
    assert "nothing left to do" in left_alone.out
    assert [one.id for one in head.jobs(root)] == [*(one.id for one in before), job.id]


@pytest.mark.ray
def test_a_job_that_fails_or_is_stopped(head, submit, study_values, tmp_path):
    study, root = tmp_path / "study.toml", tmp_path / "root"
    study.write_text(to_toml(study_values | {"images": {"train": {"path": "/no/images"}}}))
    fails = submit(study, "--root", root)
    assert fails.code() == 1
    (job,) = head.jobs(root)
    assert "Error: images.train: " in fails.out
    assert f"Error: {job.id} failed: exit code 2" in fails.err

    head.shut_gate()
    stopped = submit(study, "--root", root)
    stopped.until(lambda: "Running entrypoint" in stopped.out)
    (later,) = (one for one in head.jobs(root) if one != job)
    head.stop(later.id)
    assert stopped.code() == 1
    assert f"Error: {later.id} was stopped" in stopped.err


@pytest.mark.ray
@pytest.mark.slow
def test_a_job_whose_supervisor_is_killed_resumes(head, submit, ran, make_plan, tmp_path, record_fault):
    left = shutil.ignore_patterns("sae-*", "fidelity-*", "scores-*", "pictures-*", "report")
    root = shutil.copytree(ran.root, tmp_path / "root", ignore=left)
    plan = make_plan(root)
    client = submit(ran.study, "--root", root)
    client.until(lambda: bool(list(root.glob("sae-*/checkpoints/*.json"))))
    (job,) = head.jobs(root)
    os.kill(head.supervisor(), signal.SIGKILL)
    assert client.code() == 1
    assert f"Error: {job.id} failed" in client.err
    until(lambda: {one.step.status() for one in plan.trains} == {"partial"})

    again = submit(ran.study, "--root", root)
    assert again.code() == 0, again.out + again.err
    assert not differences(plan, make_plan(ran.root))
    assert all(one.step.record()["ran"]["attempts"][-1]["first_step"] > 0 for one in plan.trains)
    record_fault("the supervisor of a job is killed", "train", "same bits, after submitting again")


@pytest.mark.ray
def test_without_the_token_of_the_cluster(head, submit, ran, root):
    before = head.jobs(root)
    refused = {
        "Missing authentication token": submit(ran.study, "--root", root, RAY_AUTH_MODE=None),
        "Invalid authentication token": submit(ran.study, "--root", root, RAY_AUTH_TOKEN="f" * 64),
        "find an authentication token": submit(ran.study, "--root", root, HOME=str(ran.root)),
    }
    for reason, client in refused.items():
        assert client.code() == 1
        assert "Traceback" not in client.err
        assert reason in client.err
        assert head.address in client.err
        for remedy in ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN", "~/.ray/auth_token"):
            assert remedy in client.err
        assert head.token not in client.err
        assert client.out == ""
    assert head.jobs(root) == before


NO_ADDRESS = {"RAY_ADDRESS": None, "RAY_API_SERVER_ADDRESS": None}


def refused(code: int, *words: object) -> str:
    """What `sae-ray submit` says instead of submitting."""
    result = CliRunner().invoke(main, ["submit", *map(str, words)], env=NO_ADDRESS)
    assert result.exit_code == code, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.startswith("Error: ")
    return result.stderr


@pytest.fixture
def study_file(study_values, tmp_path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(to_toml(study_values))
    return path


@pytest.fixture
def closed(tmp_path) -> Iterator[str]:
    """An address where nobody listens, nor will while the test runs."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


class NoDashboard(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """Standard error is that of the command."""


def test_an_address_where_no_cluster_is(study_file, closed):
    said = refused(1, study_file, "--root", "/root", "--address", closed)
    assert closed in said
    assert "check the address" in said
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), NoDashboard) as other:
        threading.Thread(target=other.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{other.server_port}"
        assert address in refused(1, study_file, "--root", "/root", "--address", address)
        other.shutdown()


def test_an_address_of_another_kind(study_file, monkeypatch):
    for address in ("ray://head:10001", "head:6379", "auto"):
        said = refused(2, study_file, "--root", "/root", "--address", address)
        assert f"--address = {address!r}" in said
        assert "http://HOST:8265" in said
    assert "--address: missing" in refused(2, study_file, "--root", "/root")


def test_what_only_this_machine_has_is_refused(study_file, closed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "clip").mkdir(parents=True)
    relative = [
        ("images.train.path", "photos"),
        ("images.train.labels", "../labels.csv"),
        ("images.heldout.path", "./photos"),
        ("encoder.model", "models/clip"),
        ("judge.model", "open_clip:local-dir:models/judge"),
        ("judge.model", "timm:local-dir:models/judge"),
        ("training.init", "./models/sae"),
        ("concepts.vocabulary", "words.txt"),
    ]
    for field, value in relative:
        said = refused(2, study_file, "--root", "/root", "--address", closed, "--set", f"{field}={value}")
        assert said.startswith(f"Error: {field} = {value!r}: a relative path")
    table = ("--set", 'grid.weights=["ms", "ranks.parquet"]')
    said = refused(2, study_file, "--root", "/root", "--address", closed, *table)
    assert said.startswith("Error: grid.weights = 'ranks.parquet': a relative path")
    guided = ("--architecture", "guided_topk", "--set", "architectures.guided_topk.concepts=concepts.csv")
    said = refused(2, study_file, "--root", "/root", "--address", closed, *guided)
    assert said.startswith("Error: architectures.guided_topk.concepts = 'concepts.csv': a relative path")
    said = refused(2, study_file, "--root", "runs/x", "--address", closed)
    assert "--root = 'runs/x'" in said
    assert "s3://" in said
    said = refused(2, study_file, "--address", closed)
    assert "--root: missing" in said
    assert "s3://" in said


@pytest.mark.parametrize(
    "words",
    [
        ["--images", "s3://key:secret@bucket/x?region=eu-west-1", "--labels", "/shared/labels.csv"],
        ["--images", "/no/such/folder", "--heldout", "~/photos", "--encoder", "openai/clip-vit-base-patch32"],
        ["--encoder", "/no/such/model", "--judge", "open_clip:ViT-B-32/openai"],
        ["--encoder", "timm:local-dir:/no/such/model", "--judge", "timm:tf_efficientnet_lite0.in1k"],
    ],
)
def test_what_only_the_cluster_need_reach_is_looked_at_by_nobody_else(study_file, closed, words):
    for root in ("/no/such/root", "s3://bucket/root", "~/root"):
        said = refused(1, study_file, "--root", root, "--address", closed, *words)
        assert closed in said, "everything else was accepted"
        assert "secret" not in said


def test_an_invalid_study_is_refused_before_the_cluster_is_asked(study_file, closed):
    assert "expansion" in refused(2, study_file, "--root", "/root", "--address", closed, "--expansion", "0")
    assert "no study" in refused(2, "--root", "/no/such/root", "--address", closed)


OPTIONS = [
    ["study.toml", "--root", "/root"],
    ["--images", "/a b", "--encoder", "x/'y", "--site", "projection", "--site", "layer3:cls", "--k", "3", "--k", "4"],
    ["study.toml", "--root", "s3://key:s%26cret@bucket/$x?a=b&c=d", "--set", 'name="a; b"', "--set", "seed=1"],
]


@pytest.mark.parametrize("words", OPTIONS)
def test_the_job_is_given_the_options_that_were_given_here(words):
    def options(words: list[str]) -> dict:
        parameters = run.make_context("run", list(words)).params
        return {name: value for name, value in parameters.items() if name not in ("dry_run", "as_json")}

    assert options(arguments(**options(words))) == options(words)


@pytest.fixture
def upload(study_file, tmp_path) -> Callable[..., Path]:
    """Writes what would be uploaded."""

    def write(name: str, *words: str, study: str | Path = study_file) -> Path:
        options = run.make_context("run", [str(study), "--root", "/root", *words]).params
        folder = tmp_path / name
        folder.mkdir()
        write_upload(folder, **{name: value for name, value in options.items() if name not in ("dry_run", "as_json")})
        return folder

    return write


def package(folder: Path, archive: Path) -> str:
    """Packs a working directory as Ray does, and returns its name by its content."""
    create_package(str(folder), archive, include_gitignore=True)
    return get_uri_for_directory(str(folder), include_gitignore=True)


def test_the_upload_is_the_code_that_runs_here_and_the_study(upload, study_file, tmp_path):
    folder = upload("upload")
    sent = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {
        f"{name}/{file.relative_to(REPOSITORY / room).as_posix()}": file
        for room, name in ROOMS.items()
        for kind in ("*.py", "py.typed", "assets/*", "playground/*")
        for file in (REPOSITORY / room).rglob(kind)
    }
    others = {name for name in sent - code.keys() if ".dist-info/" not in name}
    assert others == {"study.toml", "arguments.json"}
    assert all((folder / name).read_bytes() == file.read_bytes() for name, file in code.items())
    assert (folder / "study.toml").read_text() == study_file.read_text()
    shipped = upload("shipped", study="demo") / "study.toml"
    assert shipped.read_text() == (REPOSITORY / "studies" / "demo.toml").read_text()

    shown = "from importlib import metadata, util; print(metadata.version('sae-ray'), *(util.find_spec(name).origin "
    shown += "for name in ('sae_ray', 'sae_ray.jobs.study', 'sae_ray.serve.app')), sep='\\n')"
    environment = os.environ | {"PYTHONPATH": str(folder)}  # as Ray sets it
    command = [sys.executable, "-c", shown]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    version, *files = done.stdout.splitlines()
    assert [Path(file).is_relative_to(folder) for file in files] == [True] * 3
    assert (folder / f"sae_ray-{version}.dist-info" / "METADATA").exists()


def test_the_upload_is_small_and_named_by_its_content(upload, tmp_path):
    archive = tmp_path / "one.zip"
    name = package(upload("one"), archive)
    assert archive.stat().st_size < 2e6
    assert package(upload("two"), tmp_path / "two.zip") == name
    assert package(upload("three", "--set", "seed=1"), tmp_path / "three.zip") != name


def test_what_ray_uploads_of_a_checkout(tmp_path):
    """`ray job submit --working-dir .`"""
    checkout = tmp_path / "checkout"
    shutil.copytree(REPOSITORY, checkout, ignore=shutil.ignore_patterns(".venv", ".git", "__pycache__", "runs"))
    for name in ("runs/demo", ".venv/lib", "sae_ray/__pycache__"):
        (checkout / name).mkdir(parents=True)
        (checkout / name / "large").write_bytes(b"0")
    package(checkout, tmp_path / "checkout.zip")
    shutil.unpack_archive(tmp_path / "checkout.zip", tmp_path / "sent")
    sent = {path.relative_to(tmp_path / "sent").as_posix() for path in (tmp_path / "sent").rglob("*")}
    assert {"sae_ray/world/models/clip/config.json", "jobs/study.py", "serve/app.py", "studies/demo.toml"} <= sent
    assert not {name for name in sent if name.startswith(("tests/", "docs/", "bench/", "tools/", "runs/", ".venv/"))}
    assert not {name for name in sent if "__pycache__" in name}
