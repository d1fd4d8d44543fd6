"""`sae-ray doctor`: whether this machine has what sae-ray needs, and what to do where it does not."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import time
import webbrowser
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path
from typing import Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PACKAGE = "sae-ray"
GB = 10**9
LEAST_DISK = GB
"""The embedded world and the demo take half of it."""
LITTLE_DISK = 20 * GB
"""Activations of a hundred thousand images, and a model or two."""
LITTLE_MEMORY = 4 * GB
"""The demo has six processes at once, and each takes half a gigabyte before it holds anything."""
SHARE_OF_STORE = 0.3
"""Of the memory: what Ray's object store takes of /dev/shm, unless that is smaller."""
RAY_SECONDS = 120


class Finding(NamedTuple):
    """What a check found."""

    state: Literal["ok", "note", "missing"]
    """`note`: it works, but not as well as it could. `missing`: nothing works without it."""
    text: str
    remedy: str = ""


def findings() -> dict[str, Finding]:
    """Everything that is looked at, by name. Takes about 15 seconds, in most of which Ray starts."""
    found = {}
    for check in (python, packages, extras, torch, gpus, cpus, memory, shared_memory, disk, hub, ray, browser):
        name = check.__name__.replace("_", " ")
        try:
            found[name] = check()
        except Exception as error:  # whatever is broken is what this command is for
            remedy = f"see what `pip check` says, and install {PACKAGE} anew, best in an environment of its own"
            found[name] = Finding("missing", _reason(error), remedy)
    return found


def lines(found: dict[str, Finding]) -> list[str]:
    """The findings as text, every remedy below what it mends."""
    width = max(map(len, found))
    text = []
    for name, one in found.items():
        text += [f"{one.state:<7}  {name:<{width}}  {one.text}"]
        text += [f"{'':<7}  {'':<{width}}  → {one.remedy}"] if one.remedy else []
    return text


def python() -> Finding:
    wanted = metadata(PACKAGE)["Requires-Python"]
    shown = f"{sys.version.split()[0]} ({sys.executable})"
    if SpecifierSet(wanted).contains(sys.version.split()[0], prereleases=True):
        return Finding("ok", shown)
    return Finding("missing", shown, f"use a Python {wanted}")


def packages() -> Finding:
    needed = _requirements("")
    wrong = [problem for one in needed if (problem := _problem(one))]
    ours = f"{PACKAGE} {version(PACKAGE)}"
    if wrong:
        return Finding("missing", f"{ours}; {'; '.join(wrong)}", f"pip install --upgrade {PACKAGE}")
    shown = ", ".join(f"{name} {version(name)}" for name in ("ray", "transformers", "pyarrow"))
    return Finding("ok", f"{ours}, and the {len(needed)} packages that it needs ({shown} …)")


def extras() -> Finding:
    """What `pip install 'sae-ray[NAME]'` adds; nothing needs it."""
    there, others = [], []
    for extra in metadata(PACKAGE).get_all("Provides-Extra") or []:
        (others if any(map(_problem, _requirements(extra))) else there).append(extra)
    return Finding("ok", f"{', '.join(there) or 'none'} (there are also {', '.join(others)})")


def torch() -> Finding:
    import torch

    build = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "for CPUs"
    return Finding("ok", f"{torch.__version__}, a build {build}")


def gpus() -> Finding:
    import torch

    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        return Finding("ok", ", ".join(f"{one.name} ({one.total_memory / GB:.0f} GB)" for one in properties))
    if not Path("/dev/nvidiactl").exists() and not shutil.which("nvidia-smi"):
        return Finding("ok", "none; CPUs do all the work")
    if torch.version.cuda is None:
        return Finding("note", "this build of torch cannot use them", "install the build of torch for your CUDA")
    remedy = "see whether nvidia-smi lists them; their driver may be older than this build of torch wants"
    return Finding("note", "torch sees none of them", remedy)


def cpus() -> Finding:
    from .cluster import usable_cpus

    usable, there = usable_cpus(), os.cpu_count()
    if usable >= 2:
        return Finding("ok", f"{usable} of {there} may be used")
    return Finding("note", f"{usable} of {there} may be used", "give the container or the job two or more")


def memory() -> Finding:
    from sae_ray.host import free_memory, total_memory

    total, free = total_memory(), free_memory()
    text = f"{total / GB:.0f} GB, of which {free / GB:.0f} GB are free"
    if free >= LITTLE_MEMORY:
        return Finding("ok", text)
    return Finding(
        "note", text, "stop other programs, or give the container more; Ray ends workers when memory runs out"
    )


def shared_memory() -> Finding:
    from sae_ray.host import total_memory

    place = Path("/dev/shm")
    if not place.is_dir():  # macOS
        return Finding("ok", "there is no /dev/shm, and Ray does not need it here")
    free, wanted = shutil.disk_usage(place).free, SHARE_OF_STORE * total_memory()
    text = f"{free / GB:.1f} GB are free in /dev/shm"
    if free >= wanted:
        return Finding("ok", text)
    remedy = f"start the container with --shm-size={wanted / GB:.0f}g; without it Ray keeps objects on disk, in /tmp"
    return Finding("note", text, remedy)


def disk() -> Finding:
    """Where results, copies of models and activations, and Ray's own files go by default."""
    from sae_ray.store.copies import CACHE, DEFAULT_CACHE

    from .cluster import directory_for_ray

    cache = Path(os.environ.get(CACHE) or DEFAULT_CACHE).expanduser()
    places = {"results": Path.cwd(), f"the cache {cache}": cache, "Ray's files": Path(directory_for_ray())}
    free = {what: _free(_existing(place)) for what, place in places.items()}
    shut = [what for what, place in places.items() if not os.access(_existing(place), os.W_OK | os.X_OK)]
    text = ", ".join(f"{size / GB:.0f} GB for {what}" for what, size in free.items())
    remedy = (
        f"free some space, or use other disks: --root for results, {CACHE} for the cache, RAY_TMPDIR for Ray's files"
    )
    if shut:
        return Finding("missing", f"{text}; not writable: {', '.join(shut)}", remedy)
    if (least := min(free.values())) >= LITTLE_DISK:
        return Finding("ok", text)
    return Finding("missing" if least < LEAST_DISK else "note", text, remedy)


def hub() -> Finding:
    """Only models and data sets that are named by an id come from there."""
    from huggingface_hub import constants, get_token

    from sae_ray.encoders.hub import hub_unreachable

    if problem := hub_unreachable():
        text, _, remedy = problem.partition(". ")
        return Finding("note", text, remedy[:1].lower() + remedy[1:])
    signed_in = "with your token" if get_token() else "without a token, which gated models want: see `hf auth login`"
    return Finding("ok", f"{constants.ENDPOINT} answers, {signed_in}")


def ray() -> Finding:
    """Starts one, or joins that of RAY_ADDRESS, and has a worker answer."""
    import ray

    from .cluster import connect, n_cpus, n_gpus

    began, is_mine = time.monotonic(), not ray.is_initialized()
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        host, _, port = address.rpartition(":")
        if host and port.isdigit():  # Ray would try for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        connect()
        ray.get(ray.remote(num_cpus=1)(_answer).remote(), timeout=RAY_SECONDS)
        seconds = time.monotonic() - began
        counted = f"{n_cpus()} CPUs and {n_gpus()} GPUs by its count"
        return Finding("ok", f"a worker on {address or 'this machine'} answered after {seconds:.0f} s; {counted}")
    except Exception as error:
        remedy = "see the logs in session_latest/logs of Ray's folder (/tmp/ray, or that of RAY_TMPDIR)"
        if address:
            remedy = f"RAY_ADDRESS is {address}: start that cluster, or unset it, and Ray starts on this machine"
        return Finding("missing", f"no worker answered ({_reason(error)})", remedy)
    finally:
        if is_mine:
            ray.shutdown()


def browser() -> Finding:
    """The report is files, and the playground is a page of the server."""
    try:
        webbrowser.get()
    except webbrowser.Error:
        remedy = (
            "sae-ray report --serve shows the report elsewhere; forward the playground's port: "
            "ssh -L 8000:127.0.0.1:8000 HOST"
        )
        return Finding("note", "none here to look at the report and the playground", remedy)
    return Finding("ok", "there is one to look at the report and the playground")


def _requirements(extra: str) -> list[Requirement]:
    """What an extra adds; what is needed without any, if it is empty."""
    found = [Requirement(text) for text in metadata(PACKAGE).get_all("Requires-Dist") or []]
    if extra:
        return [
            one for one in found if one.marker and "extra" in str(one.marker) and one.marker.evaluate({"extra": extra})
        ]
    return [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]


def _problem(requirement: Requirement) -> str | None:
    try:
        there = version(requirement.name)
    except PackageNotFoundError:
        return f"{requirement.name} is not installed"
    fits = requirement.specifier.contains(there, prereleases=True)
    return None if fits else f"{requirement.name} is {there}, not {requirement.specifier}"


def _answer() -> None:
    """What a worker is asked for."""


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}".removesuffix(": ")


def _existing(place: Path) -> Path:
    return next(folder for folder in (place, *place.parents) if folder.exists())


def _free(place: Path) -> int:
    return shutil.disk_usage(place).free
