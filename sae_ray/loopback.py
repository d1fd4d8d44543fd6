"""Servers that only this machine reaches: their address, and which requests are meant for them."""

from __future__ import annotations

import re

LOOPBACK = "127.0.0.1"
_HOST = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", re.IGNORECASE)


def names_this_machine(host: str) -> bool:
    """Whether a `Host` header can only mean this machine, or the end of a tunnel to it.

    Others may come from a web page whose name was made to lead here (DNS rebinding).
    """
    return _HOST.fullmatch(host) is not None
