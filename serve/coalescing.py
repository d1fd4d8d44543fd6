"""Tokens on their way between deployments, in handfuls: a message per token would keep two event loops busy."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import chain

from .engine import Step


async def coalesced(steps: AsyncGenerator[Step, None], seconds: float) -> AsyncGenerator[Step, None]:
    """The first step at once; from then on, `seconds` after the last one, those that have come meanwhile as one.

    The end of the answer is told at once. Closing this generator closes `steps`.
    """
    clock = asyncio.get_running_loop()
    arrived: list[Step] = []
    due = clock.time()
    async with aclosing(steps):
        coming = asyncio.ensure_future(anext(steps, None))
        try:
            while True:
                await asyncio.wait([coming], timeout=max(0.0, due - clock.time()) if arrived else None)
                ended = False
                if coming.done():
                    if coming.exception() and arrived:
                        yield joined(arrived)
                    step = coming.result()
                    if step is None:
                        break
                    arrived.append(step)
                    ended = step.finish is not None
                    coming = asyncio.ensure_future(anext(steps, None))
                if ended or clock.time() >= due:
                    yield joined(arrived)
                    arrived, due = [], clock.time() + seconds
            if arrived:
                yield joined(arrived)
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


def joined(steps: Sequence[Step]) -> Step:
    """Steps that follow one another as one."""
    tokens, scored = (list(chain(*column)) for column in zip(*((one.tokens, one.scored) for one in steps), strict=True))
    return Step(tokens, scored, steps[-1].finish)
