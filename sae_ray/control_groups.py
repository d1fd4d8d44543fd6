"""What Linux's control groups (containers, systemd, schedulers) leave to a process: those of its own group, and of all
around it, of which other libraries see the outermost alone."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

MOUNTED = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """Bytes."""

    limit: int
    left: int


class _Names(NamedTuple):
    limit: str
    used: str
    cached: str
    """A line of `memory.stat`: files that were read or written and not lately used, which the kernel drops first."""


_NAMES = (
    _Names("memory.max", "memory.current", "inactive_file"),
    _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of version 2, and of version 1."""


def own_groups() -> str:
    """What `/proc/<pid>/cgroup` says of this process, which the functions below take; nothing where there is none."""
    file = Path("/proc/self/cgroup")
    return file.read_text() if file.exists() else ""


def cpu_quota(groups: str, mounted: Path = MOUNTED) -> int | None:
    """The smallest quota, in CPUs, of control groups of version 2. None without one.

    Args:
        mounted: where control groups are.
    """
    files = [folder / "cpu.max" for folder in _around(groups, mounted, "cpu")]
    quotas = [file.read_text().split() for file in files if file.is_file()]
    return min(
        (max(1, math.ceil(int(quota) / int(period))) for quota, period in quotas if quota != "max"), default=None
    )


def memory(groups: str, mounted: Path = MOUNTED) -> Memory:
    """The smallest limit, and the least that a group has left below its own; very large numbers without one.

    Cached files can be dropped, so they do not count as used.

    Args:
        mounted: where control groups are, of version 1 in a folder for each controller.
    """
    limit = left = sys.maxsize
    for folder in _around(groups, mounted, "memory"):
        for names in _NAMES:
            if not (folder / names.limit).is_file() or (text := (folder / names.limit).read_text().strip()) == "max":
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            used = int((folder / names.used).read_text()) - int(stat.get(names.cached, 0))
            limit = min(limit, int(text))
            left = min(left, max(0, int(text) - used))
    return Memory(limit, left)


def _around(groups: str, mounted: Path, controller: str) -> list[Path]:
    """The folders of the process's groups that may limit this, and of those around them. In a container the outer ones
    may be named, but are not there."""
    found = []
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = mounted / controller if controllers else mounted
            own = top / path.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found
