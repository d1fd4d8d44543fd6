"""Submits a study to a Ray cluster, from any machine that reaches the cluster's dashboard, and follows it.

What is uploaded is the job's working directory. It is laid out as a wheel of sae-ray is, whether this runs from a
checkout or is installed, so that every node runs the very code that runs here, under one name:

    sae_ray/                  the package with `sae_ray/jobs` and `sae_ray/serve`, without the models of the world
    sae_ray-….dist-info/      its name and version, which steps and reports record
    study.toml                the study file, if there is one
    arguments.json            the command line of `sae-ray run`: the study, its root, and what overrides fields

The arguments are in a file since keys in a URI would otherwise show in the list of jobs. The same code and study make
the same upload, which Ray names by its content. Nothing is installed when the job starts: the dependencies must be in
the environment of the cluster.

The driver is the job's entry point. It asks for no resources: Ray then runs it on the head node, the last one that is
taken away. It does not depend on the machine that submitted it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import click
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

import sae_ray
from sae_ray.encoders.sources import directory_named
from sae_ray.errors import SaeRayError, UsageError, check
from sae_ray.store.files import address_shown
from sae_ray.study.config import Study
from sae_ray.study.shipped import study_file
from sae_ray.study.survey import concept_paths, named_inputs

from .options import arguments, read_study
from .progress import say

ENTRY_POINT = "python -m sae_ray.jobs.submit"
ARGUMENTS = "arguments.json"
CONNECT_SECONDS = 5
ANSWER_SECONDS = 60
QUIET_SECONDS = 60
"""After so long without a line of the log the connection is made anew: of one that was lost while this machine slept,
nothing is ever heard."""
RETRY_SECONDS = 5


def submit(address: str | None, detach: bool, study: str | None, root: str | None, **options: Any) -> None:
    """Starts a study as a job of a cluster, or finds the job that runs it already, and follows the job to its end.

    Args:
        address: of the cluster's dashboard.
        detach: do not follow; print the job's id.
        study, root, options: those of `study_options`.

    Raises:
        UsageError: the study is invalid or names what only this machine has, or the address is none.
        SaeRayError: the cluster cannot be reached or refuses, or the job failed.
    """
    address = checked_address(address)
    root = checked_root(root)
    loaded, _ = read_study(study, root, **options)
    check_paths(loaded)
    with tempfile.TemporaryDirectory() as folder:
        write_upload(Path(folder), study, root, **options)
        with explained(address):
            client = connect(address)
            job_id, is_new = start(client, Path(folder), loaded.name, address_shown(root))
    if is_new:
        say(f"{job_id}: submitted to {address}")
    else:
        say(f"{job_id}: already working on {address_shown(root)}; later changes are not part of it")
    again = "submit again" + (" without --detach" if detach else "")
    hints = f"To follow it, {again}; to stop it: ray job stop {job_id} --address {address}"
    if detach:
        click.echo(job_id)
        say(hints)
        return
    try:
        job, shown = follow(client, job_id)
    except KeyboardInterrupt:
        say(f"\n{job_id}: keeps running without being followed. {hints}")
        sys.exit(130)
    if job.status == JobStatus.STOPPED:
        raise SaeRayError(f"{job_id} was stopped; finished work is kept: submit again to resume")
    if job.status == JobStatus.FAILED:
        in_log = shown and job.driver_exit_code is not None
        reason = f"exit code {job.driver_exit_code}, see its last lines above" if in_log else job.message
        raise SaeRayError(f"{job_id} failed: {reason}. Finished work is kept: submit again to resume")
    say(f"{job_id}: succeeded")


def checked_address(address: str | None) -> str:
    """Raises UsageError unless it is an HTTP address."""
    example = "such as http://HOST:8265"
    if not address:
        raise UsageError(f"--address: missing; give the address of the cluster's dashboard, {example}")
    check(address.startswith(("http://", "https://")), "--address", address, f"give that of the dashboard, {example}")
    return address.rstrip("/")


def checked_root(root: str | None) -> str:
    """Raises UsageError unless the nodes of a cluster can share it."""
    remedy = "give an absolute path that all nodes of the cluster share, or a URI such as s3://bucket/folder"
    if not root:
        raise UsageError(f"--root: missing; {remedy}")
    check(_is_absolute(root), "--root", root, f"a relative path refers to this machine; {remedy}")
    return root


def check_paths(study: Study) -> None:
    """Reads what a study calls its images, files and models, and looks at none of them: only the cluster must.

    Raises UsageError for a relative path.
    """
    tables, init = named_inputs(study)
    paths = [("grid.weights", table) for table in sorted(tables)]
    paths += [(field if "." in field else f"concepts.{field}", path) for field, path in concept_paths(study).items()]
    sets = {"images.train": study.images.train, "images.heldout": study.images.heldout}
    for field, images in ((field, images) for field, images in sets.items() if images and not study.imported):
        paths += [(f"{field}.path", images.path)]
        paths += [(f"{field}.labels", images.labels)] if images.labels not in ("auto", "none") else []
    for field, path in paths:
        check(_is_absolute(path), field, path,
              "a relative path refers to this machine; give an absolute path that all nodes of the cluster share, or a "
              "URI such as s3://bucket/folder")  # fmt: skip
    models = {"encoder.model": study.encoder.model, "judge.model": study.judge.model}
    models |= {"training.init": init} if init is not None else {}
    if study.steering:
        models |= {"steering.llava": study.steering.llava, "steering.scorer": study.steering.scorer}
    for field, model in models.items():
        path = directory_named(model) or model
        is_path = path != model or path.startswith(".") or Path(path).is_dir()  # else the id of a model on the hub
        check(not is_path or _is_absolute(path), field, model,
              "a relative path refers to this machine; give an absolute path that all nodes of the cluster have, a "
              "URI such as s3://bucket/folder, or the id of a model on the hub")  # fmt: skip


def _is_absolute(path: str) -> bool:
    """`~` is the home of whoever runs Ray on a node."""
    return "://" in path or path.startswith("~") or PurePosixPath(path).is_absolute()


def write_upload(folder: Path, study: str | None, root: str, **options: Any) -> None:
    """Writes the job's working directory. The same code, study and options give the same files."""
    unneeded = shutil.ignore_patterns("__pycache__", ".*", "models")
    shutil.copytree(Path(sae_ray.__file__).parent, folder / "sae_ray", ignore=unneeded)
    for room in ("jobs", "serve"):  # in a checkout beside `sae_ray`, in a wheel inside
        source = Path(__file__).parents[1] / room
        shutil.copytree(source, folder / "sae_ray" / room, ignore=unneeded, dirs_exist_ok=True)
    with suppress(PackageNotFoundError):
        ours = distribution("sae-ray")
        about = folder / f"sae_ray-{ours.version}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: sae-ray\nVersion: {ours.version}\n")
    if study is not None:
        shutil.copyfile(study_file(study), folder / "study.toml")
        study = "study.toml"
    (folder / ARGUMENTS).write_text(json.dumps(arguments(study, root, **options), indent=1))


class Client(JobSubmissionClient):
    """Ray's client with a limit for every request: without one it may wait for an answer for ever."""

    def _do_request(self, *args: Any, **kwargs: Any) -> Any:
        with _access(self._address):
            return super()._do_request(*args, timeout=(CONNECT_SECONDS, ANSWER_SECONDS), **kwargs)


def connect(address: str) -> Client:
    """The client of a cluster that answers. Raises SaeRayError if it wants a token."""
    if urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1"):
        os.environ["no_proxy"] = "*"  # a proxy has a loopback of its own
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise this variable and RAY_ADDRESS override the argument
    for handler in logging.getLogger("ray").handlers:
        handler.setLevel(logging.WARNING)
    with _access(address):  # without a token none is sent
        return Client(address)


@contextmanager
def _access(address: str) -> Iterator[None]:
    try:
        yield
    except AuthenticationError as error:
        reason = str(error).splitlines()[0].partition(". ")[0]
        raise SaeRayError(
            f"no access to the cluster at {address} ({reason}); set RAY_AUTH_MODE=token, and put the cluster's token "
            "into RAY_AUTH_TOKEN or ~/.ray/auth_token"
        ) from error


@contextmanager
def explained(address: str) -> Iterator[None]:
    """Raises SaeRayError for what the client raises if no cluster answers as it should."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise SaeRayError(
            f"no dashboard of a Ray cluster answers at --address {address} ({_last_line(error)}); check the address, "
            "and that this machine reaches it"
        ) from error


def start(client: JobSubmissionClient, folder: Path, name: str, root: str) -> tuple[str, bool]:
    """Submits the job unless one is at work on its root.

    Args:
        folder: the job's working directory.
        name: of the study.
        root: as users read it.

    Returns:
        The job's id, and whether the job is new. The id is `<name>-<hash of the root>-<number>`. The number is the next
        free one, and the cluster takes each id once: so of several that submit at the same time, one starts a job.
    """
    root = root.rstrip("/")
    jobs = [job for job in client.list_jobs() if job.submission_id]
    for job in jobs:
        if (job.metadata or {}).get("root") == root and not job.status.is_terminal():
            return str(job.submission_id), False
    readable = re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII)
    first = f"{readable}-{hashlib.sha256(root.encode()).hexdigest()[:8]}-"
    numbers = [str(job.submission_id).removeprefix(first) for job in jobs]
    job_id = f"{first}{1 + max((int(number) for number in numbers if number.isdecimal()), default=0)}"
    try:
        client.submit_job(
            entrypoint=ENTRY_POINT,
            submission_id=job_id,
            runtime_env={"working_dir": str(folder)},
            metadata={"study": name, "root": root},
        )
    except (OSError, RuntimeError):
        if job_id not in [job.submission_id for job in client.list_jobs()]:
            raise
        return job_id, False
    return job_id, True


def follow(client: JobSubmissionClient, job_id: str) -> tuple[JobDetails, int]:
    """Prints a job's log as it is written, until the job has ended, however often the connection is lost.

    Returns:
        The job, and how many characters of its log were printed.

    Raises:
        SaeRayError: the cluster does not know the job, or no longer accepts the token.
    """
    shown, is_lost = 0, False
    while True:
        shown = asyncio.run(_show_log(client, job_id, shown))
        try:
            job = client.get_job_info(job_id)
        except (OSError, RuntimeError) as error:
            if f"{job_id} does not exist" in str(error):
                raise SaeRayError(f"the cluster no longer knows {job_id}; submit again to resume") from error
            if not is_lost:
                say(f"{job_id}: connection lost ({type(error).__name__}); reconnecting, the job keeps running")
            is_lost = True
            time.sleep(RETRY_SECONDS)
            continue
        if is_lost:
            say(f"{job_id}: reconnected")
        is_lost = False
        if job.status.is_terminal():
            rest = ""
            with suppress(OSError, RuntimeError):  # the node that has the log may be gone
                rest = client.get_job_logs(job_id)[shown:]
            click.echo(rest, nl=False)
            return job, shown + len(rest)
        time.sleep(1)


async def _show_log(client: JobSubmissionClient, job_id: str, shown: int) -> int:
    """Prints a job's log from the character `shown` on, until the log or the connection ends, and returns how many
    characters have been printed in all."""
    position = 0
    chunks = aiter(client.tail_job_logs(job_id))  # always from the beginning
    while True:
        try:
            chunk = await asyncio.wait_for(anext(chunks), QUIET_SECONDS)
        except (StopAsyncIteration, TimeoutError, OSError, RuntimeError, aiohttp.ClientError):
            return shown
        click.echo(chunk[max(0, shown - position) :], nl=False)
        position += len(chunk)
        shown = max(shown, position)


def _last_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__


if __name__ == "__main__":  # as the job, in its working directory
    from .cli import run

    run(json.loads(Path(ARGUMENTS).read_text()))
