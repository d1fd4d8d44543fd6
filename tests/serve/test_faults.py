"""What the server does when parts of it die, clients go away, SAEs change, and too many come."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import httpx
import pytest

from tests.machine import PATIENCE_S, until

from .conftest import ONE_WORD, OTHER, STEERS, Server, chat


async def post(client: httpx.AsyncClient, body: dict) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=body)


def storm(server: Server, bodies: list[dict], concurrency: int, meanwhile: Callable[[], Awaitable] | None = None):
    """Sends all requests, `concurrency` at a time, and returns the answers in order.

    What is to happen `meanwhile` begins when the first one is answered.
    """

    async def run() -> list[httpx.Response]:
        turn = asyncio.Semaphore(concurrency)
        limits = httpx.Limits(max_connections=concurrency)
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S, limits=limits) as client:

            async def one(body: dict) -> httpx.Response:
                async with turn:
                    return await post(client, body)

            tasks = [asyncio.create_task(one(body)) for body in bodies]
            if meanwhile is not None:
                await tasks[0]
                await meanwhile()
            return await asyncio.gather(*tasks)

    return asyncio.run(run())


def running() -> int:
    """Answers that the language model is generating."""
    from ray import serve

    return serve.get_deployment_handle("Language", "sae-ray").running.remote().result(timeout_s=PATIENCE_S)


def metric(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text.splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"sae_ray_{name} "))


def steered(star: int, sae: str = STEERS) -> dict:
    return {"sae": sae, "features": [{"index": star, "strength": 4.0, "unit": "max"}]}


def test_a_crowd_a_quarter_of_which_is_malformed(server, star):
    bodies = [chat(steering=steered(star)) if number % 2 else chat() for number in range(500)]
    for number in range(0, 500, 4):
        bodies[number] = [{"messages": 3}, chat(steering={"sae": "nobody"}), chat(n=0)][number % 3]
    answers = storm(server, bodies, concurrency=32)
    for number, answer in enumerate(answers):
        assert answer.status_code in ((400, 404) if number % 4 == 0 else (200,)), (number, answer.text)
    said = [answer.json()["choices"][0]["message"]["content"] for answer in answers[1::2]]
    assert set(said) == {"star"}
    assert running() == 0


def test_too_many_are_sent_away_for_a_while(server):
    busy = chat("Describe the image.", temperature=2.0, max_tokens=40, n=4)
    answers = storm(server, [busy] * 80, concurrency=80)
    counts = Counter(answer.status_code for answer in answers)
    assert counts[200] >= 48
    assert counts[429] > 0
    assert counts[200] + counts[429] == 80
    refusal = next(answer for answer in answers if answer.status_code == 429)
    assert int(refusal.headers["retry-after"]) >= 1
    assert refusal.json()["error"]["code"] == "overloaded"
    assert storm(server, [chat()], 1)[0].status_code == 200


def test_a_client_that_goes_away_ends_its_generation(server, openai_client):
    request = chat("Describe the image.", temperature=2.0, seed=1, max_tokens=200, n=16)
    whole = openai_client.chat.completions.create(model="llava", **request)
    before = metric(server, 'tokens_total{kind="completion"}')
    for _ in range(4):
        stream = openai_client.chat.completions.create(model="llava", **request, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: running() == 0)
    until(lambda: metric(server, "requests_present") == 0)
    # Their answers in full would be four times as long.
    assert metric(server, 'tokens_total{kind="completion"}') - before < whole.usage.completion_tokens


@pytest.mark.parametrize("deployment", ["Tower", "Language"])
def test_a_replica_that_dies_costs_only_what_it_worked_on(server, deployment):
    import ray

    def kill() -> None:
        [name] = [
            actor["name"]
            for actor in ray.util.list_named_actors(all_namespaces=True)
            if actor["name"].startswith(f"SERVE_REPLICA::sae-ray#{deployment}#")
        ]
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)

    bodies = [chat("Describe the image.", temperature=2.0, max_tokens=40) for _ in range(200)]
    answers = storm(server, bodies, concurrency=24, meanwhile=lambda: asyncio.to_thread(kill))
    lost = [answer for answer in answers if answer.status_code != 200]
    assert len(lost) <= 32, "at most what was worked on at that time"
    for answer in lost:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "replica_lost"
        assert answer.json()["error"]["request_id"] == answer.headers["x-request-id"]
    assert answers[-1].status_code == 200


def test_other_saes_are_taken_up_without_a_restart(server, star):
    """Under load; the language model stays the same process, and requests end as they began."""
    import ray

    def replicas() -> set[str]:
        names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
        return {name for name in names if name.startswith("SERVE_REPLICA::sae-ray#")}

    async def meanwhile() -> None:
        await asyncio.to_thread(server.deploy, {"root": str(server.root), "saes": [OTHER]})

    before = replicas()
    try:
        answers = storm(server, [chat(steering=steered(star))] * 150, concurrency=16, meanwhile=meanwhile)
        until(lambda: [sae["id"] for sae in server.client().get("/v1/saes").json()["data"]] == [OTHER])
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) <= {200, 404}, "known until it was taken away, unknown then"
        assert statuses[0] == 200
        assert storm(server, [chat(steering=steered(star))], 1)[0].status_code == 404
        assert storm(server, [chat(ONE_WORD, steering={"sae": OTHER})], 1)[0].status_code == 200
    finally:
        server.deploy({"root": str(server.root), "saes": None})
        until(lambda: len(server.client().get("/v1/saes").json()["data"]) == 2)
    assert replicas() == before
