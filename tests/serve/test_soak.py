"""Memory stays flat under mixed requests: for seconds here, for ten minutes with `make soak`."""

from __future__ import annotations

import asyncio
import time

import httpx
import psutil
import pytest
from PIL import Image

from tests.machine import PATIENCE_S, actors

from .conftest import ONE_WORD, STEERS, Server, chat, data_url

GROWTH_MB = 60
"""What allocators and caches of any one process may still take after the warm-up."""
LARGE_MB = 12
"""A decoded image of 2000 × 2000 pixels."""
N_LARGE = 2 * GROWTH_MB // LARGE_MB
"""Large images that would show if each were kept."""


def memory_mb() -> dict[str, float]:
    """Private to each process of the application: of the memory they share, Ray's store, each touches all in time."""
    names = {"ServeReplica:sae-ray:Api", "ServeReplica:sae-ray:Tower", "ServeReplica:sae-ray:Language", "ProxyActor"}
    found = [actor for actor in actors() if actor.of in names]
    assert sorted(actor.of for actor in found) == sorted(names)
    return {actor.of: private_mb(psutil.Process(actor.pid).memory_info()) for actor in found}


def private_mb(memory) -> float:
    return (memory.rss - memory.shared) / 2**20


async def visit(server: Server, star: int, seconds: float) -> int:
    """Sixteen clients that ask, stream, steer, look at features, leave early and send rubbish. Counts requests.

    Large images come one at a time: what several take at once, allocators would keep.
    """
    large = Image.new("RGB", (2000, 2000), "white")
    alone, n_large = asyncio.Lock(), 0
    steering = {"sae": STEERS, "features": [{"index": star, "strength": 4.0, "unit": "max"}]}
    until, count = time.monotonic() + seconds, 0
    headers = {"Authorization": f"Bearer {server.key}"}

    async def client(number: int) -> None:
        nonlocal count, n_large
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S) as http:
            while time.monotonic() < until or n_large < N_LARGE:
                match (number + count) % 6:
                    case 0:
                        async with alone:
                            answer = await http.post("/v1/chat/completions", json=chat(ONE_WORD, large))
                            n_large += 1
                    case 1:
                        answer = await http.post("/v1/chat/completions", json=chat(ONE_WORD, steering=steering))
                    case 2:
                        async with alone:
                            answer = await http.post("/v1/features/inspect", json={"image": data_url(large)})
                            n_large += 1
                    case 3:
                        answer = await http.post("/v1/chat/completions", json=chat(n=0))
                        assert answer.status_code == 400
                        answer = await http.get(f"/v1/saes/{STEERS}/features", params={"search": "star"})
                    case 4:
                        request = chat("Describe the image.", temperature=2.0, max_tokens=50, n=2, stream=True)
                        async with http.stream("POST", "/v1/chat/completions", json=request) as answer:
                            await anext(answer.aiter_bytes())  # and goes away
                    case _:
                        answer = await http.get(f"/v1/saes/{STEERS}/features/{star}/images/0")
                assert answer.status_code == 200, answer.text
                count += 1

    await asyncio.gather(*map(client, range(16)))
    return count


@pytest.mark.parametrize("seconds", [8, pytest.param(600, marks=pytest.mark.slow)])
def test_memory_is_flat(server, star, seconds):
    asyncio.run(visit(server, star, 5 + seconds / 10))
    before = memory_mb()
    count = asyncio.run(visit(server, star, seconds))
    after = memory_mb()
    print(f"{count} requests; MB before and after: {before} {after}")
    assert count > seconds
    assert {name: round(after[name] - before[name]) for name in before if after[name] - before[name] > GROWTH_MB} == {}
