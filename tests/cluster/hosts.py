"""Hosts of their own on one machine: Linux namespaces, joined by a bridge.

A host has its own network, hostname, processes, shared memory, `/tmp` and `/home`; of the machine's disk it sees the
rest, read-only. So hosts share no path that can be written, no loopback and no signal. Ending a host's first process
ends all of them at once, as when a machine loses its power.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
from pathlib import Path

from tests.machine import until

NET = "10.213.77"
HOME = "/home/ray"
FIRST_PROCESS = """
trap '' CHLD  # children that nobody waits for leave no trace
set -e
hostname {name}
for folder in /tmp /dev/shm /home; do mount -t tmpfs tmpfs $folder; done
mkdir {home}
printf '127.0.0.1 localhost\\n{address} {name}\\n' >/tmp/hosts
mount --bind /tmp/hosts /etc/hosts
mount -o remount,bind,ro /
exec sleep infinity
"""


def why_not() -> str | None:
    """Why hosts cannot be made here; None where they can."""
    if os.geteuid() != 0:
        return "making network namespaces needs root's rights"
    for tool in ("ip", "unshare", "nsenter"):
        if shutil.which(tool) is None:
            return f"there is no command {tool} here: install iproute2 and util-linux"
    if any(name != "lo" for _, name in socket.if_nameindex()):
        return "this process shares its network with others: run `make cluster-test`"
    return None


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def make_bridge() -> None:
    """Joins hosts to one another and to this process, whose network must be its own."""
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", "bridge", "type", "bridge")
    run("ip", "address", "add", f"{NET}.1/24", "dev", "bridge")
    run("ip", "link", "set", "bridge", "up")


class Host:
    """A host that is up. `number`, from 2, is the last part of its address."""

    def __init__(self, name: str, number: int):
        self.name = name
        self.address = f"{NET}.{number}"
        script = FIRST_PROCESS.format(name=name, home=HOME, address=self.address)
        apart = ["--net", "--uts", "--ipc", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(["unshare", *apart, "sh", "-c", script], stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children")
        until(lambda: bool(children.read_text()))
        self.pid = children.read_text().strip()
        until(lambda: Path(f"/proc/{self.pid}/comm").read_text() == "sleep\n")
        self._link = f"to-{number}"
        run("ip", "link", "add", self._link, "type", "veth", "peer", "name", "eth0", "netns", self.pid)
        run("ip", "link", "set", self._link, "master", "bridge", "up")
        for command in (
            f"address add {self.address}/24 dev eth0",
            "link set eth0 up",
            "link set lo up",
            f"route add default via {NET}.1",
        ):
            run(*self.inside, "ip", *command.split())

    @property
    def inside(self) -> list[str]:
        """Begins a command that runs there."""
        return ["nsenter", "--target", self.pid, "--all", "--wd=/"]

    def path(self, path: str) -> Path:
        """A path of the host, as this process sees it."""
        return Path(f"/proc/{self.pid}/root{path}")

    def vanish(self) -> None:
        """Deletes its link, and ends it: what others wait for never comes, and nothing tells them so."""
        run("ip", "link", "delete", self._link)
        self.end()

    def end(self) -> None:
        """Ends all its processes at once."""
        self._holder.kill()
        self._holder.wait()
