"""The API as clients speak it, with a real LLaVA in this process."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from pydantic import ValidationError
from sae_ray.serve.api import create_api
from sae_ray.serve.config import API_KEY, ServeConfig
from sae_ray.serve.conversation import TextStream
from sae_ray.serve.engine import Sampling, Task
from sae_ray.serve.schemas import Message
from sae_ray.serve.service import Service
from sae_ray.serve.transformers_engine import choose, penalised, score
from starlette.testclient import TestClient

from sae_ray.editing import load_patch, make_patch, save_patch
from tests.editing.conftest import random_sae
from tools import http_reference

from .conftest import chat, data_url
from .direct import WORLD_LLAVA, direct_service

DESCRIBE = "Describe the image."
ORIGIN = "https://chat.example.org"


@pytest.fixture(scope="module")
def service() -> Service:
    return direct_service(allowed_origins=(ORIGIN,))


@pytest.fixture
def http(service, monkeypatch) -> TestClient:
    monkeypatch.delenv(API_KEY, raising=False)
    return TestClient(create_api(service), base_url="http://localhost:8000")


@pytest.fixture
def closed(service, monkeypatch) -> TestClient:
    """With a key."""
    monkeypatch.setenv(API_KEY, "a-key")
    return TestClient(create_api(service))


def square() -> Image.Image:
    image = Image.new("RGB", (56, 56), "white")
    ImageDraw.Draw(image).rectangle((14, 14, 42, 42), fill="red")
    return image


def ask(http: TestClient, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def said(http: TestClient, **body: Any) -> str:
    return ask(http, **body)["choices"][0]["message"]["content"]


def test_a_conversation_without_an_image(http, service):
    body = {"messages": [{"role": "user", "content": "Which shape is it?"}], "temperature": 0, "max_tokens": 5}
    first, again = ask(http, **body), ask(http, **body)
    assert first["choices"] == again["choices"]
    assert first["choices"][0]["message"]["content"]
    with_image = ask(http, **chat("Which shape is it?", square(), max_tokens=5))
    more = with_image["usage"]["prompt_tokens"] - first["usage"]["prompt_tokens"]
    assert more == service.tokenizer.n_image_tokens


@pytest.mark.parametrize("detail", ["low", "high", "auto"])
def test_the_detail_of_an_image_changes_nothing(http, detail):
    body = chat(DESCRIBE, square())
    expected = said(http, **body)
    body["messages"][0]["content"][0]["image_url"]["detail"] = detail
    assert said(http, **body) == expected


@pytest.mark.parametrize(
    "prefix",
    [
        *("data:;base64,", "data:application/octet-stream;base64,", "data:image/jpg;charset=utf-8;base64,"),
        *("DATA:image/PNG;BASE64,", " data:image/*;base64, ", "data:text/plain; base64,", "data:base64,"),
        *('data:image/png;name="a, b.png";base64,', f"data:image/png;name={'%E5%9B%BE' * 80}.png;base64,"),
    ],
)
def test_the_bytes_decide_what_an_image_is(http, prefix):
    body = chat(DESCRIBE, square())
    expected = said(http, **body)
    url = body["messages"][0]["content"][0]["image_url"]
    url["url"] = prefix + url["url"].partition(",")[2]
    assert said(http, **body) == expected


def test_the_image_that_is_wrong_is_named(http):
    body = chat(DESCRIBE, square(), square())
    body["messages"][0]["content"][1]["image_url"]["url"] = data_url(b"no image")
    error = http.post("/v1/chat/completions", json=body).json()["error"]
    assert error["param"] == "messages.0.content.1.image_url.url"


def test_neighbours_of_one_role_and_developers(http):
    [user] = chat(DESCRIBE, square())["messages"]
    image, text = user["content"]
    system = {"role": "system", "content": "Be brief."}
    expected = ask(http, messages=[system, user], temperature=0)
    split = [{"role": "developer", "content": "Be brief."}, *({"role": "user", "content": [x]} for x in (image, text))]
    found = ask(http, messages=split, temperature=0)
    assert (found["choices"], found["usage"]) == (expected["choices"], expected["usage"])


def test_a_last_turn_of_the_assistant_goes_on(http):
    body = chat(DESCRIBE, square())
    whole = said(http, **body)
    words = whole.split()
    assert len(words) > 3
    begun = " ".join(words[:2])
    body["messages"].append({"role": "assistant", "content": begun})
    assert begun + said(http, **body) == whole
    lines = [json.loads(line[6:]) for line in streamed(http, body) if line != "data: [DONE]"]
    assert begun + "".join(line["choices"][0]["delta"].get("content", "") for line in lines) == whole
    body["messages"][-1]["content"] = None
    assert said(http, **body) == whole


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
@pytest.mark.parametrize("content", ["", "nothing", " ", []])
def test_one_message_of_any_role_is_a_conversation(http, role, content):
    assert ask(http, messages=[{"role": role, "content": content}], max_tokens=2)["usage"]["completion_tokens"] <= 2


def streamed(http: TestClient, body: dict[str, Any]) -> list[str]:
    with http.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        assert answer.headers["x-accel-buffering"] == "no"
        return [line for line in answer.iter_lines() if line]


def test_logprobs_are_told_for_every_token(http):
    body = chat(DESCRIBE, square(), logprobs=True, top_logprobs=3)
    answer = ask(http, **body)
    [choice], usage = answer["choices"], answer["usage"]
    content = choice["logprobs"]["content"]
    assert len(content) == usage["completion_tokens"]
    assert "".join(one["token"] for one in content).strip() == choice["message"]["content"]
    for one in content:
        assert bytes(one["bytes"]).decode() == one["token"]
        assert len(one["top_logprobs"]) == 3
        assert one["top_logprobs"][0] == {name: one[name] for name in ("token", "logprob", "bytes")}, "greedy"
        values = [other["logprob"] for other in one["top_logprobs"]]
        assert values == sorted(values, reverse=True)
    lines = [json.loads(line[6:]) for line in streamed(http, body) if line != "data: [DONE]"]
    parts = [part for line in lines if (part := line["choices"][0]["logprobs"])]
    assert [one for part in parts for one in part["content"]] == content
    alone = ask(http, **chat(DESCRIBE, square(), logprobs=True))["choices"][0]["logprobs"]["content"]
    assert [one | {"top_logprobs": []} for one in content] == alone


def test_logprobs_do_not_depend_on_how_tokens_are_chosen(http):
    first = ask(http, **chat(DESCRIBE, square(), logprobs=True, max_tokens=1))["choices"][0]["logprobs"]["content"][0]
    rest = {"top_k": 1, "temperature": 2.0, "presence_penalty": 2.0, "repetition_penalty": 1.0, "seed": 3}
    other = ask(http, **chat(DESCRIBE, square(), logprobs=True, max_tokens=1) | rest)["choices"][0]["logprobs"]
    assert other["content"][0] == first


@pytest.mark.parametrize("one", [{"top_k": 1}, {"min_p": 1.0}, {"top_p": 0.0}, {"temperature": 0}])
def test_what_leaves_only_the_likeliest_token_is_greedy(http, one):
    assert said(http, **chat(DESCRIBE, square()) | {"temperature": 2.0} | one) == said(http, **chat(DESCRIBE, square()))


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_any_seed_gives_the_same_answers_again(http, seed):
    body = chat(DESCRIBE, square(), seed=seed, n=4, max_tokens=8) | {"temperature": 2.0}
    answers = [choice["message"]["content"] for choice in ask(http, **body)["choices"]]
    assert answers == [choice["message"]["content"] for choice in ask(http, **body)["choices"]]
    assert len(set(answers)) > 1


def test_the_model_by_its_id(http, service):
    assert http.get(f"/v1/models/{service.model}").json() == http.get("/v1/models").json()["data"][0]
    answer = http.get("/v1/models/somebody/else")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "unknown_model")


def test_the_model_says_what_was_taken_out_of_it(service, http, tmp_path, monkeypatch):
    assert http.get("/v1/models").json()["data"][0]["edit"] is None
    file = str(tmp_path / "p.safetensors")
    save_patch(make_patch(str(WORLD_LLAVA), random_sae(128), 5, sae_name="runs/demo/sae-layer3"), file)
    monkeypatch.setattr(service, "edit", load_patch(file).facts)
    told = {"sae": "sae-layer3", "feature": 5, "mode": "project", "scope": "reader"}
    assert http.get(f"/v1/models/{service.model}").json()["edit"] == told


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/nothing"])
def test_head_is_get_without_a_body(http, path):
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.headers["content-type"]) == (get.status_code, get.headers["content-type"])
    assert head.content == b""


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_browser_of_an_allowed_origin_asks_without_the_key(closed, method):
    asking = {"Origin": ORIGIN, "Access-Control-Request-Method": method}
    asking["Access-Control-Request-Headers"] = "authorization, content-type, x-stainless-lang"
    answer = closed.options("/v1/chat/completions", headers=asking)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-lang" in answer.headers["access-control-allow-headers"]
    refused = closed.get("/v1/models", headers={"Origin": ORIGIN})
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)
    other = closed.options("/v1/models", headers=asking | {"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


@pytest.mark.parametrize("origin", ["https://chat.example.org/", "chat.example.org", "https://a.b/page", ""])
def test_an_origin_that_no_browser_sends_is_refused(origin):
    with pytest.raises(ValidationError, match="allowed_origins"):
        ServeConfig(root="none", allowed_origins=(origin,))


@pytest.mark.parametrize(("given", "status"), [("Bearer", 200), ("bearer", 200), ("BEARER ", 200), ("Basic", 401)])
def test_the_scheme_word_in_any_case(closed, given, status):
    assert closed.get("/v1/models", headers={"Authorization": f"{given} a-key"}).status_code == status


def test_the_documentation_needs_no_network(closed):
    page = closed.get("/docs").text
    addresses = re.findall(r"""(?:src|href)=["']([^"']+)|url: ["']([^"']+)""", page)
    local = {one or other for one, other in addresses}
    assert {"swagger-ui-bundle.js", "swagger-ui.css", "openapi.json"} <= local
    assert not [one for one in local if "//" in one]
    for one in local - {"data:,"}:
        assert closed.get(f"/{one}").status_code == 200


def test_penalties_count_what_they_say():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, -1.0])
    prompt, answer = [0, 1], [2, 2, 4]
    found = penalised(logits, Sampling(1, repetition_penalty=2.0), prompt, answer)
    assert found.tolist() == [1.0, -4.0, 0.5, 0.5, -2.0]
    found = penalised(logits, Sampling(1, frequency_penalty=0.5), prompt, answer)
    assert found.tolist() == [2.0, -2.0, 0.0, 0.5, -1.5]
    found = penalised(logits, Sampling(1, presence_penalty=0.5), prompt, answer)
    assert found.tolist() == [2.0, -2.0, 0.5, 0.5, -1.5]


@pytest.mark.parametrize(
    ("rest", "possible"),
    [
        ({}, {0, 1, 2, 3}),
        ({"top_k": 2}, {0, 1}),
        ({"min_p": 0.4}, {0, 1}),
        ({"top_p": 0.6}, {0, 1}),
        ({"top_k": 3, "min_p": 0.1, "top_p": 0.99}, {0, 1, 2}),
    ],
)
def test_which_tokens_may_be_chosen(rest, possible):
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    random = torch.Generator().manual_seed(0)
    sampling = [Sampling(1, 1.0, **rest), Sampling(1), Sampling(1, 1.0, top_k=1)]
    drawn = [choose(torch.stack([logits, -logits, logits]), sampling, [random] * 3) for _ in range(300)]
    assert {first for first, _, _ in drawn} == possible
    assert {tuple(others) for _, *others in drawn} == {(3, 0)}, "nobody is drawn by the rules of another"


def test_scores_are_log_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log() + 7
    [one] = score(logits, 2, 2)
    assert torch.tensor([one.logprob, *(value for _, value in one.top)]).exp().tolist() == pytest.approx(
        [0.2, 0.5, 0.3]
    )
    assert [token for token, _ in one.top] == [0, 1]
    assert score(logits, 2, None) == []


def test_an_answer_that_goes_on_keeps_its_first_space(service):
    tokenizer = service.tokenizer
    tokens = tokenizer.tokenizer("a red square", add_special_tokens=False)["input_ids"]
    for place in range(1, len(tokens)):
        stream = TextStream(tokenizer, after=tokens[:place])
        text = stream.push(tokens[place:]) + stream.end()
        assert tokenizer.decode(tokens[:place]) + text == tokenizer.decode(tokens)


def test_a_crowd_gets_the_answers_that_each_gets_alone(service):
    """Whoever comes, stays or goes meanwhile: with images and without, short and long, greedy and drawn by a seed."""
    engine, dice = service.language._engine, random.Random(0)
    tokenizer, llava = service.tokenizer, service.tower._llava
    shown = [one.numpy() for one in llava.image_embeddings([square(), Image.new("RGB", (56, 56), "black")], [()] * 2)]
    tasks = []
    for number in range(24):
        images = tuple(shown[: number % 3])
        parts = [{"type": "image_url", "image_url": "x"} for _ in images]
        text = ("What colour is it?", DESCRIBE, "What is the background? " * (1 + number % 4))[number % 5 % 3]
        prompt = tokenizer.prompt([Message(role="user", content=[*parts, {"type": "text", "text": text}])])
        drawn = {"temperature": 1.5, "seed": number} if number % 4 == 0 else {}
        sampling = Sampling(2 + number % 9, n_top_logprobs=2, repetition_penalty=(1.0, 1.3)[number % 2], **drawn)
        tasks.append(Task(prompt.tokens, images, sampling))

    async def answer(task: Task, leaves_after: int | None = None) -> tuple[list[int], list[float], str | None]:
        tokens, logprobs, finish = [], [], None
        async with aclosing(engine.generate(task)) as steps:
            async for step in steps:
                tokens += step.tokens
                logprobs += [one.logprob for one in step.scored]
                finish = step.finish
                if len(tokens) == leaves_after:
                    break
        return tokens, logprobs, finish

    async def later(task: Task, leaves_after: int | None) -> tuple[list[int], list[float], str | None]:
        await asyncio.sleep(dice.random() / 10)
        return await answer(task, leaves_after)

    async def run() -> None:
        alone = [await answer(task) for task in tasks]
        leaving = [2 if number % 6 == 5 else None for number in range(24)]
        crowd = await asyncio.gather(*map(later, tasks, leaving))
        for mine, theirs, early in zip(crowd, alone, leaving, strict=True):
            assert mine[0] == theirs[0][:early]
            assert mine[1] == pytest.approx(theirs[1][:early], abs=1e-4)
            assert early or mine[2] == theirs[2]
        with pytest.raises(ValueError, match="do not fit into the cache"):
            await answer(replace(tasks[0], sampling=Sampling(100_000)))
        while engine._batch.answers or engine._waiting:
            await asyncio.sleep(0.01)

    asyncio.run(run())


def test_the_page_of_paths_and_fields_is_up_to_date(service: Service):
    page = http_reference.page(create_api(service).openapi())
    assert http_reference.PAGE.read_text(encoding="utf-8") == page, "run python -m tools.http_reference"
    assert "| `steering` | [Steering](#steering) |" in page
