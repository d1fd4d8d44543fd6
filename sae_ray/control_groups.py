"""What Linux's control groups (containers, systemd, schedulers) leave to a process: those of its own group, and of all
around it, of which other libraries see the outermost alone."""

from __future__ import annotations

import math
import sys
from contextlib import suppress
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
    cached: tuple[str, str]
    """Lines of `memory.stat`: files that were read or written, lately or not, which the kernel drops when memory is
    short."""


_NAMES = (
    _Names("memory.max", "memory.current", ("inactive_file", "active_file")),
    _Names("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
)
"""Of version 2, and of version 1."""


def own_groups() -> str:
    """What `/proc/<pid>/cgroup` says of this process; nothing where there is none."""
    file = Path("/proc/self/cgroup")
    return file.read_text() if file.exists() else ""


def cpu_quota(groups: str | None = None, mounted: Path = MOUNTED) -> int | None:
    """The smallest quota, in CPUs, of control groups of version 2. None without one.

    Args:
        groups: of `own_groups`, which is the default.
        mounted: where control groups are.
    """
    quotas = []
    for folder in _around(groups, mounted, "cpu"):
        with suppress(OSError):  # not there, or gone by now
            quotas.append((folder / "cpu.max").read_text().split())
    return min(
        (max(1, math.ceil(int(quota) / int(period))) for quota, period in quotas if quota != "max"), default=None
    )


def memory(groups: str | None = None, mounted: Path = MOUNTED) -> Memory:
    """The smallest limit, and the least that a group has left below its own; very large numbers without one.

    Cached files can be dropped, so they do not count as used. A group that cannot be read is left out.

    Args:
        groups: of `own_groups`, which is the default.
        mounted: where control groups are, of version 1 in a folder for each controller.
    """
    limit = left = sys.maxsize
    for folder in _around(groups, mounted, "memory"):
        for names in _NAMES:
            try:
                text = (folder / names.limit).read_text().strip()
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                used = int((folder / names.used).read_text()) - sum(int(stat.get(name, 0)) for name in names.cached)
            except OSError:  # not there, gone by now, or a sandbox shows a part of it only
                continue
            if text == "max":
                continue
            limit = min(limit, int(text))
            left = min(left, max(0, int(text) - used))
    return Memory(limit, left)


def _around(groups: str | None, mounted: Path, controller: str) -> list[Path]:
    """The folders of the process's groups that may limit this, and of those around them. In a container the outer ones
    may be named, but are not there."""
    found = []
    for line in (own_groups() if groups is None else groups).splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers or controller in controllers.split(","):
            top = mounted / controller if controllers else mounted
            own = top / path.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder.is_relative_to(top)]
    return found
