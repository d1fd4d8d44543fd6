"""Limits how many requests run and wait at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from .errors import overloaded


class Limiter:
    """Runs at most `max_running` requests at a time, in order of arrival; at most `max_waiting` others wait."""

    def __init__(self, max_running: int, max_waiting: int):
        self._most = max_running + max_waiting
        self._turn = asyncio.Semaphore(max_running)
        self.present = 0
        """Number of requests that run or wait."""

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """Waits for its turn. Raises ApiError (429) if too many requests wait already."""
        if self.present >= self._most:
            raise overloaded(f"{self.present} requests are already running or waiting; try again later")
        self.present += 1
        try:
            async with self._turn:
                yield
        finally:
            self.present -= 1
