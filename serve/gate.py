"""How many requests are worked on, how many may wait for that, and what happens to one more."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import overloaded


class Gate:
    """Lets `max_running` requests through at a time, in the order they came."""

    def __init__(self, max_running: int, max_waiting: int):
        self._most = max_running + max_waiting
        self._turn = asyncio.Semaphore(max_running)
        self.present = 0
        """Requests that run or wait."""

    @asynccontextmanager
    async def entered(self) -> AsyncIterator[None]:
        """Raises ApiError, a 429, when too many wait already."""
        if self.present >= self._most:
            raise overloaded(f"{self.present} requests are here already; try again later")
        self.present += 1
        try:
            async with self._turn:
                yield
        finally:
            self.present -= 1
