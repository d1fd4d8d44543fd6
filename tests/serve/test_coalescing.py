"""Tokens in handfuls: the first at once, none lost, none late at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sae_ray.serve.coalescing import coalesced
from sae_ray.serve.engine import Scored, Step

LONG = 3600.0


def step(number: int, finish=None) -> Step:
    return Step([number], [Scored(number, -1.0, [(number, -1.0)])], finish)


class Source:
    """An engine's answer of some steps. It waits where it is told to, and knows when it is closed."""

    def __init__(self, *steps: Step | asyncio.Event | Exception):
        self._steps, self.closed = steps, False

    async def generate(self) -> AsyncGenerator[Step, None]:
        try:
            for one in self._steps:
                if isinstance(one, asyncio.Event):
                    await one.wait()
                elif isinstance(one, Exception):
                    raise one
                else:
                    yield one
        finally:
            self.closed = True


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.sampled_from([0.0, LONG]))
def test_no_token_is_lost_or_moved(pauses, seconds):
    async def run() -> list[Step]:
        steps: list[Step | asyncio.Event] = []
        for number, pause in enumerate(pauses):
            if pause:
                steps.append(asyncio.Event())
                asyncio.get_running_loop().call_soon(steps[-1].set)
            steps.append(step(number, "length" if number == len(pauses) - 1 else None))
        return [one async for one in coalesced(Source(*steps).generate(), seconds)]

    found = asyncio.run(run())
    assert [token for one in found for token in one.tokens] == list(range(len(pauses)))
    assert [one.token for part in found for one in part.scored] == list(range(len(pauses)))
    assert [one.finish for one in found] == [None] * (len(found) - 1) + ["length"]
    if seconds:
        assert len(found) == min(2, len(pauses))


def test_the_first_token_does_not_wait_and_the_last_one_ends_the_wait():
    async def run() -> None:
        more, source_ends = asyncio.Event(), asyncio.Event()
        source = Source(step(0), more, step(1), step(2, "stop"), source_ends)
        async with aclosing(coalesced(source.generate(), LONG)) as found:
            assert (await anext(found)).tokens == [0]
            more.set()
            last = await anext(found)
            assert (last.tokens, last.finish) == ([1, 2], "stop")
        assert source.closed

    asyncio.run(run())


def test_what_has_come_is_told_while_the_next_token_takes_its_time():
    async def run() -> None:
        async with aclosing(coalesced(Source(step(0), step(1), asyncio.Event()).generate(), 0.01)) as found:
            assert (await anext(found)).tokens == [0]
            assert (await anext(found)).tokens == [1]

    asyncio.run(run())


def test_leaving_closes_the_engines_answer():
    async def run() -> None:
        waiting, told = Source(step(0), asyncio.Event()), Source(step(0), step(1), asyncio.Event())
        for source in (waiting, told):
            async with aclosing(coalesced(source.generate(), LONG)) as found:
                await anext(found)
                await asyncio.sleep(0)
            assert source.closed
        cancelled = Source(asyncio.Event())
        task = asyncio.ensure_future(anext(coalesced(cancelled.generate(), LONG)))
        await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert cancelled.closed

    asyncio.run(run())


def test_an_answer_that_fails_fails():
    async def run() -> None:
        async with aclosing(coalesced(Source(step(0), RuntimeError("out of memory")).generate(), LONG)) as found:
            await anext(found)
            with pytest.raises(RuntimeError, match="out of memory"):
                await anext(found)

    asyncio.run(run())


def test_what_came_before_a_failure_is_sent():
    found: list[int] = []

    async def run() -> None:
        async for one in coalesced(Source(step(0), step(1), ValueError("the engine is gone")).generate(), LONG):
            found.extend(one.tokens)

    with pytest.raises(ValueError, match="the engine is gone"):
        asyncio.run(run())
    assert found == [0, 1]
