"""Steps: directories named by what determines their content; done once, resumable, and locked while written."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import signal
import socket
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder

SCHEMA_VERSIONS = {
    "manifest": 3,
    "labels": 3,
    "extract": 4,
    "train": 3,
    "evaluate": 3,
    "score": 3,
    "concepts": 1,
    "steering": 4,
    "naming": 1,
    "pictures": 1,
    "report": 3,
    "humans": 1,
    "agreement": 1,
}
"""Of every stage; raised when the format or the meaning of what it writes changes. Steps of the other stages stay."""
RECORD = "step.json"
FAILURE = "failure.json"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 120.0
CLOCK_ERROR_SECONDS = 600.0
"""By which the clocks of machines may differ."""
_HELD: dict[Folder, str] = {}
"""Folders of the steps that this process has locked -> the name of its lock there."""
_TOLD: dict[Folder, dict[str, Any]] = {}
"""Of the same: what their locks tell of the work."""
SCRATCH = ("checkpoints", "calibration", "answers", "parts", "attempts")
"""Folders that are only needed until a step is finished."""

Status = Literal["done", "failed", "running", "partial", "missing", "torn"]


def digest(value: Any) -> str:
    """A hex sha256 of any JSON value; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True)
class Step:
    """One stage applied to one configuration. Its directory is `<label>-<hash of stage, schema version and config>`."""

    root: Folder
    stage: str
    label: str
    config: dict
    """Everything that determines the content: settings, names of the input steps, model revisions, dtypes, seed."""
    defaults: dict = field(default_factory=dict)
    """Values of `config` that are left out of the name: a new setting with a neutral default renames nothing."""

    @property
    def name(self) -> str:
        decisive = {key: value for key, value in self.config.items() if self.defaults.get(key, ...) != value}
        return f"{self.label}-{digest([SCHEMA_VERSIONS[self.stage], self.stage, decisive])[:12]}"

    @property
    def folder(self) -> Folder:
        return self.root / self.name

    def record(self) -> dict | None:
        """The contents of `step.json`; None if the step is not finished.

        Raises SaeRayError if the directory is torn (a file listed in `step.json` is missing or has another size) or was
        written by another schema version.
        """
        found = _record(self.folder)
        return None if found is None else _checked(self.folder, found)

    def status(self) -> Status:
        try:
            record = self.record()
        except SaeRayError:
            return "torn"
        if record is not None:
            return record["status"]
        if _alive(_locks(self.folder)):
            return "running"
        return "partial" if self.folder.exists() else "missing"

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the step is done, or failed permanently."""
        return self.record() is not None

    @property
    def failure(self) -> str | None:
        """The reason for a permanent failure; None if there is none."""
        record = self.record()
        return record["reason"] if record is not None and record["status"] == "failed" else None

    def finish(
        self,
        seconds: float,
        counts: dict[str, Any],
        status: Literal["done", "failed"] = "done",
        reason: str | None = None,
        ran: dict[str, Any] | None = None,
    ) -> None:
        """Writes `step.json` as the last file, then deletes the folders in `SCRATCH` and the note of the last failure.

        Args:
            seconds: the time spent in this process.
            counts: the results to record; NaN and infinity become null.
            ran: what it ran on, such as workers and devices; not part of the name.

        Raises SaeRayError if this process held a lock of the step which has vanished.
        """
        _check_held(self.folder)
        present = self.folder.files(recursive=True)
        files = {name: size for name, size in present.items() if not _is_housekeeping(name)}
        record = {
            "schema_version": SCHEMA_VERSIONS[self.stage],
            "stage": self.stage,
            "status": status,
            "reason": reason,
            "config": self.config,
            "counts": _finite(counts),
            "ran": ran,
            "seconds": round(seconds, 3),
            "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": _versions(),
            "git_commit": _git_commit(),
            "files": files,
        }
        self.folder.write_json(RECORD, record)
        for name in SCRATCH:
            self.folder.delete(name)
        if FAILURE in present:
            self.folder.delete(FAILURE)


def read_record(folder: Folder) -> dict:
    """Reads and checks `step.json` of a finished step.

    Raises SaeRayError if the step is not finished, torn or of another schema version.
    """
    record = _record(folder)
    if record is None:
        raise SaeRayError(f"{folder} is not a finished step: it has no {RECORD}; run its stage to the end first")
    return _checked(folder, record)


def _record(folder: Folder) -> Any:
    try:
        return folder.read_json(RECORD)
    except FileNotFoundError:
        return None


def _checked(folder: Folder, record: Any) -> dict:
    stage, found = (record.get(key) if isinstance(record, dict) else None for key in ("stage", "schema_version"))
    known = SCHEMA_VERSIONS.get(str(stage))
    if found is None or found != known:
        raise SaeRayError(
            f"{folder} was written by schema version {found} of the {stage} stage, but this program reads {known}; "
            "delete the directory and run the stage again"
        )
    present = folder.files(recursive=True)
    for name, size in record["files"].items():
        if present.get(name) != size:
            raise SaeRayError(
                f"{folder} is torn: {name} should have {size} bytes and "
                f"{f'has {present[name]}' if name in present else 'is missing'}; delete the directory and run again"
            )
    return record


@contextmanager
def hold(steps: Sequence[Step]) -> Iterator[None]:
    """Locks these steps against other drivers, with a heartbeat.

    The lock of a dead process is taken over: immediately where processes see one another, otherwise after two minutes
    without a heartbeat, as the store tells the time. A driver whose own lock has vanished was taken for dead; the work
    is interrupted.

    Raises SaeRayError if another live driver holds one of them, or has taken one over.
    """
    lock = f"lock-{uuid.uuid4().hex}.json"
    owner = {**_surroundings(), "pid": os.getpid()}
    stop, lost = threading.Event(), threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            for step in steps:
                with suppress(OSError):  # the lock survives a disk that is temporarily full
                    if not step.folder.exists(lock):
                        lost.set()
                        # A real signal: it ends what the main thread waits for.
                        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                        return
                    progress = _TOLD.get(step.folder)
                    step.folder.write_json(lock, owner | {"time": time.time(), "progress": progress})

    heartbeat = threading.Thread(target=beat, daemon=True)
    held: list[Step] = []
    try:
        for step in steps:
            # Written before checking, so that at least one of two drivers sees the other.
            held.append(step)
            step.folder.write_json(lock, owner | {"time": time.time()})
            _HELD[step.folder] = lock
            found = _locks(step.folder)
            now = max((one.renewed for one in found), default=0.0)  # that of the lock just written
            others = []
            for other in found:
                if not _is_alive(other, now):
                    step.folder.delete(other.name)
                elif other.name != lock:
                    others.append(other.owner)
            if others:
                raise SaeRayError(
                    f"{step.folder} is being written by process {others[0]['pid']} on {others[0]['host']}; "
                    "wait for it, or stop it and try again"
                )
        with _interruptible(lost):
            try:
                heartbeat.start()
                yield
            finally:
                stop.set()
                if heartbeat.is_alive():
                    heartbeat.join()  # it interrupts nothing that comes later
    except KeyboardInterrupt:
        if lost.is_set():
            raise _lost(steps[0].root) from None
        raise
    finally:
        for step in held:
            _HELD.pop(step.folder, None)
            _TOLD.pop(step.folder, None)
            step.folder.delete(lock)
            if not step.folder.files(recursive=True):
                step.root.delete(step.name)


@contextmanager
def _interruptible(lost: threading.Event) -> Iterator[None]:
    """Has SIGINT interrupt the block once `lost` is set, however this process was started: by Ray, which blocks it, or
    in the background of a script, where it is ignored, and stays so otherwise.
    """

    def interrupt(*_: object) -> None:
        if lost.is_set():
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    ignored = is_main and signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, interrupt)
    if is_main:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def _check_held(folder: Folder) -> None:
    lock = _HELD.get(folder)
    if lock is not None and not folder.exists(lock):
        raise _lost(folder)


def _lost(where: Folder) -> SaeRayError:
    return SaeRayError(
        f"a lock of this driver under {where} has vanished: another driver took over, or somebody deleted it; nothing "
        "more is written. Run again once the other driver has ended"
    )


def check_shared(folder: Folder) -> None:
    """Called by a worker before it works on the step in `folder`, whose lock its driver holds.

    Raises SaeRayError where the lock is not seen: what the worker wrote would be on a disk that the driver cannot read.
    """
    if folder.is_local and not any(_is_lock(name) for name in folder.files()):
        raise SaeRayError(
            f"{socket.gethostname()} does not see the files that the driver writes to {folder}; --root must be a "
            "directory that all nodes share, or a URI such as s3://bucket/folder"
        )


def tell(step: Step, progress: dict[str, Any]) -> None:
    """Has the lock that this process holds on a step tell of the work, from its next renewal on. Costs no request."""
    if step.folder in _HELD:
        _TOLD[step.folder] = _finite(progress)


def note_failure(step: Step, reason: str) -> None:
    """Notes in a step that is not finished why the work on it ended. The note stays until the step is finished.

    Raises SaeRayError if this process held a lock of the step which has vanished.
    """
    _check_held(step.folder)
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    step.folder.write_json(FAILURE, {"reason": reason, "time": now, "host": socket.gethostname()})


class Unfinished(NamedTuple):
    """What others see of a step that is not finished."""

    status: Literal["running", "partial"]
    progress: dict[str, Any] | None
    """What the driver's lock told last. Of a driver that died: where it stopped."""
    failure: dict[str, Any] | None
    """`reason`, `time` and `host` of the last failure."""
    files: dict[str, int]
    """Relative path -> size in bytes, without locks and the note of the failure."""


def look(step: Step) -> Unfinished:
    """Looks at a step that has been begun and is not finished: two listings, one read per lock, one of the failure."""
    files = {name: size for name, size in step.folder.files(recursive=True).items() if not name.startswith("lock-")}
    locks = _locks(step.folder)
    alive = _alive(locks)
    failure = None
    if files.pop(FAILURE, None):
        with suppress(FileNotFoundError, SaeRayError):  # finished meanwhile
            failure = step.folder.read_json(FAILURE)
    told = [lock.owner["progress"] for lock in alive or locks if lock.owner.get("progress")]
    return Unfinished("running" if alive else "partial", told[-1] if told else None, failure, files)


class _Lock(NamedTuple):
    name: str
    owner: dict
    renewed: float
    """In seconds, by the clock of the store: the clocks of two drivers may differ by minutes."""


def _locks(folder: Folder) -> list[_Lock]:
    locks = []
    for name, renewed in folder.modified().items():
        if _is_lock(name):
            with suppress(FileNotFoundError, SaeRayError):  # released, or about to be written
                locks.append(_Lock(name, folder.read_json(name), renewed))
    return locks


def _is_lock(name: str) -> bool:
    return name.startswith("lock-") and name.endswith(".json")


def _alive(locks: list[_Lock]) -> list[_Lock]:
    """Those whose owners may be alive, for one who holds none himself: this machine's clock may be wrong."""
    now = time.time() - CLOCK_ERROR_SECONDS
    return [lock for lock in locks if _is_alive(lock, now)]


def _surroundings() -> dict[str, Any]:
    """Where a process number means what it means here: this host since its last start, and this container."""
    boot, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    known = boot.exists() and namespace.is_symlink()  # on Linux
    return {
        "host": socket.gethostname(),
        "boot": boot.read_text().strip() if known else None,
        "pid_namespace": os.readlink(namespace) if known else None,
    }


def _is_alive(lock: _Lock, now: float) -> bool:
    """`now`: by the clock of the store."""
    owner = lock.owner
    if now - lock.renewed > STALE_SECONDS:
        return False
    if any(owner.get(name) != value for name, value in _surroundings().items()):
        return True
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_housekeeping(name: str) -> bool:
    parent, unfinished = name.split("/")[0], name.endswith(".tmp") or name.rpartition("/")[2].startswith(".tmp")
    return name in (RECORD, FAILURE) or name.startswith("lock-") or unfinished or parent in SCRATCH


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("sae-ray", "torch", "transformers", "open_clip_torch", "ray", "pyarrow", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _git_commit() -> str | None:
    """Of the checkout that this program runs from; None for an installed one, whatever repository it may lie in."""
    checkout = Path(__file__).resolve().parents[2]

    def git(*command: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(checkout), *command], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() or None

    top = git("rev-parse", "--show-toplevel")
    return git("rev-parse", "HEAD") if top and Path(top).resolve() == checkout else None
