"""The API as its clients use it: the official client, scripts, and whoever looks at features."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from PIL import Image

from sae_ray.encoders.loading import load_preprocess
from sae_ray.images import decode_image
from sae_ray.sae import load_sae
from sae_ray.steering import Box, Condition, Intervention, LatentEdit, Llava, Region, load_llava, load_max_token
from sae_ray.store.files import Folder
from sae_ray.study.root import recalled_plan
from tests.machine import PATIENCE_S, until

from .conftest import ONE_WORD, OTHER, STEERS, chat, data_url, stored, white


@pytest.fixture(scope="module")
def llava(server) -> Llava:
    return load_llava(server.llava)


@pytest.fixture(scope="module")
def sae_folder(server) -> Folder:
    root = Folder(server.root)
    return root / next(name for name in root.folders() if name.startswith(f"sae-{STEERS}"))


@pytest.fixture(scope="module")
def shapes(server) -> list[Image.Image]:
    """Held-out images, all different."""
    heldout = recalled_plan(str(server.root)).study.images.heldout
    files = sorted(Path(heldout.path).rglob("*.png"))
    return [Image.open(file).convert("RGB") for file in files[:: len(files) // 12][:12]]


def steered(index: int, strength: float = 4.0, **rest) -> dict:
    return {"sae": STEERS, "features": [{"index": index, "strength": strength, "unit": "max"}]} | rest


def test_a_star_on_a_white_image(openai_client, star):
    request = chat()
    answer = openai_client.chat.completions.create(
        model="llava", **request, extra_body={"steering": steered(star, types=["STEERED", "DEFAULT"])}
    )
    assert [choice.steering_type for choice in answer.choices] == ["STEERED", "DEFAULT"]
    assert answer.choices[0].message.content == "star"
    assert answer.choices[1].message.content != "star"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.id.startswith("chatcmpl-")


def test_a_stream_says_what_the_whole_says(openai_client, star, shapes):
    request = chat("Describe the image.", shapes[0]) | {"n": 2, "seed": 7, "temperature": 1.0, "max_tokens": 12}
    steering = {"steering": steered(star, types=["DEFAULT", "STEERED"])}
    whole = openai_client.chat.completions.create(model="llava", **request, extra_body=steering)
    chunks = list(
        openai_client.chat.completions.create(
            model="llava", **request, stream=True, stream_options={"include_usage": True}, extra_body=steering
        )
    )
    texts, ends = dict.fromkeys(range(4), ""), {}
    for chunk in chunks[:-1]:
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        assert choice.steering_type == whole.choices[choice.index].steering_type
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == {choice.index: choice.message.content for choice in whole.choices}
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert [choice.steering_type for choice in whole.choices] == ["DEFAULT", "DEFAULT", "STEERED", "STEERED"]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_answers_are_those_of_the_llava_itself(server, llava, sae_folder, shapes):
    """Plain and differently steered, one image and several, all at once in one tower: as each gets alone."""
    sae, max_token = load_sae(sae_folder), load_max_token(sae_folder)
    live = [latent for latent in range(sae.d_sae) if max_token[latent] > 0]
    asked, expected = [], []
    for number in range(40):
        images = [shapes[number % 12]] if number % 5 else [shapes[number % 12], shapes[(number + 3) % 12]]
        prompt = ("What colour is it?", ONE_WORD, "What is the background?")[number % 3]
        request, chain = chat(prompt, *images, max_tokens=12), ()
        if number % 4:
            error, isolate, latent = ("drop", "keep")[number % 2], number % 8 == 1, live[17 * number % len(live)]
            request["steering"] = steered(latent, float(number % 6), error=error, isolate=isolate)
            edit = LatentEdit(latent, "set", float(number % 6), "max")
            chain = (Intervention(sae, (edit,), error=error, isolate=isolate, max_token=max_token),)
        asked.append(request)
        embeddings = llava.image_embeddings(images, [chain] * len(images))
        expected += llava.generate([embeddings], [prompt], 12)

    async def all_at_once() -> list[str]:
        headers = {"Authorization": f"Bearer {server.key}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, timeout=PATIENCE_S) as client:
            answers = await asyncio.gather(*(client.post("/v1/chat/completions", json=one) for one in asked))
        return [answer.json()["choices"][0]["message"]["content"] for answer in answers]

    assert asyncio.run(all_at_once()) == expected
    assert len(set(expected)) > 5


def test_a_part_of_each_image_is_edited(http, llava, sae_folder, star, shapes):
    """Of a wide and a tall one at once, by rectangles, by a mask and where a feature fires; as the library does it."""
    sae, max_token = load_sae(sae_folder), load_max_token(sae_folder)
    images = [Image.new("RGB", size, "white") for size in ((84, 56), (56, 84))]
    for image, shape in zip(images, shapes, strict=False):
        image.paste(shape, (14, 0) if image.width > image.height else (0, 14))
    drawn = np.zeros((20, 30), dtype=bool)
    drawn[2:, 14:] = True
    tokens: list[torch.Tensor] = []
    plain = llava.image_embeddings(images, [[lambda x: tokens.append(x) or x]] * 2)
    firing = (sae.encode(torch.cat(tokens)) > 0).double().mean(0)
    feature = int((firing - 0.5).abs().argmin())  # on about half of the tokens
    condition = {"index": feature, "above": 0.01, "unit": "max"}
    boxes = [[0.2, 0.0, 0.45, 0.6], [0.0, 0.5, 1.0, 1.0]]
    ways = {
        "rectangles": ({"region": {"rectangles": boxes}}, {"region": Region(tuple(Box(*box) for box in boxes))}),
        "mask": ({"region": {"mask": data_url(Image.fromarray(drawn))}}, {"region": Region(mask=drawn)}),
        "when": ({"when": condition}, {"when": Condition(feature, 0.01, "max")}),
        "all of them": (
            {"region": {"rectangles": boxes[:1], "mask": data_url(Image.fromarray(drawn))}, "when": condition},
            {"region": Region((Box(*boxes[0]),), drawn), "when": Condition(feature, 0.01, "max")},
        ),
    }
    edits = (LatentEdit(star, "set", 4.0, "max"),)
    everywhere = llava.image_embeddings(images, [[Intervention(sae, edits, max_token=max_token)]] * 2)
    for name, (asked, where) in ways.items():
        request = chat("Describe the image.", *images, max_tokens=12, steering=steered(star, **asked))
        embeddings = llava.image_embeddings(images, [[Intervention(sae, edits, max_token=max_token, **where)]] * 2)
        for other in (everywhere, plain):
            assert not torch.equal(torch.stack(embeddings), torch.stack(other)), name
        answer = http.post("/v1/chat/completions", json=request).json()
        said = [choice["message"]["content"] for choice in answer["choices"]]
        assert said == llava.generate([embeddings], ["Describe the image."], 12), name


def test_a_region_is_one_of_the_upright_image(http, star):
    """In a file of any EXIF orientation, and in a mask of any."""
    upright = Image.new("RGB", (84, 56), "white")
    upright.paste((215, 35, 40), (45, 5, 65, 25))
    drawn = Image.new("L", (84, 56))
    drawn.paste(255, (42, 0, 84, 42))

    def answer(image: bytes, region: dict) -> str:
        request = {"image": data_url(image), "prompt": "Describe the image.", **steered(star, region=region)}
        done = http.post("/v1/steer", json=request)
        assert done.status_code == 200, done.text
        return done.json()["answers"][0]["text"]

    box = {"rectangles": [[0.5, 0.0, 1.0, 0.75]]}
    expected = answer(stored(upright, 1, "PNG"), box)
    for orientation in range(1, 9):
        assert answer(stored(upright, orientation, "PNG"), box) == expected
        assert answer(stored(upright, 1, "PNG"), {"mask": data_url(stored(drawn, orientation, "PNG"))}) == expected
        outside = {"rectangles": [[0.0, 0.0, 0.16, 1.0]]}
        request = {"image": data_url(stored(upright, orientation, "PNG")), "prompt": "w", "region": outside}
        refused = http.post("/v1/steer", json=request)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steering.region")


def test_a_conversation_goes_on(http):
    messages = chat()["messages"]
    turns = [*messages, {"role": "assistant", "content": "nothing"}, {"role": "user", "content": "What colour is it?"}]
    first, second = (
        http.post("/v1/chat/completions", json={"messages": some, "temperature": 0}).json()
        for some in (messages, turns)
    )
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]
    assert second["choices"][0]["steering_type"] == "DEFAULT"


def test_sampling_follows_its_seed(http, shapes):
    def answers(**rest) -> list[str]:
        request = chat("Describe the image.", shapes[1]) | {"temperature": 2.0, "n": 4, "max_tokens": 8} | rest
        choices = http.post("/v1/chat/completions", json=request).json()["choices"]
        return [choice["message"]["content"] for choice in choices]

    assert answers(seed=5) == answers(seed=5)
    assert answers(seed=5)[1:] == answers(seed=6)[:3]
    assert len(set(answers(seed=5))) > 1
    assert set(answers(seed=5, top_p=1e-6)) == set(answers(temperature=0)) == set(answers(temperature=1e-40))


def test_stop_and_length_end_an_answer(http, shapes):
    def choice(**rest) -> dict:
        request = chat("Describe the image.", shapes[2]) | {"temperature": 2.0, "seed": 1, "max_tokens": 12} | rest
        return http.post("/v1/chat/completions", json=request).json()["choices"][0]

    words = choice()["message"]["content"].split()
    assert len(words) > 2, "another seed says more"
    cut = choice(stop=[words[1]])
    assert cut["message"]["content"] == words[0]
    assert cut["finish_reason"] == "stop"
    short = choice(max_tokens=1)
    assert short["message"]["content"] == words[0]
    assert short["finish_reason"] == "length"


def test_the_short_form(http, star):
    request = {"image": data_url(white()), "prompt": ONE_WORD, **steered(star, types=["STEERED", "DEFAULT"])}
    answer = http.post("/v1/steer", json=request).json()
    assert [one["steering_type"] for one in answer["answers"]] == ["STEERED", "DEFAULT"]
    assert answer["answers"][0]["text"] == "star"
    halved = http.post("/v1/steer", json=request | {"strength_multiplier": 0.0}).json()
    assert halved["answers"][0]["text"] != "star"


def test_models_and_saes(openai_client, http):
    assert [model.id for model in openai_client.models.list()] == ["llava"]
    saes = http.get("/v1/saes").json()["data"]
    assert {(sae["id"], sae["n_features"], sae["layer"]) for sae in saes} == {(STEERS, 128, 3), (OTHER, 256, 3)}


def test_features_are_found_sorted_and_shown(http, star):
    base = f"/v1/saes/{STEERS}/features"
    found = http.get(base, params={"search": "star", "sort": "similarity"}).json()["data"]
    assert found[0]["name"] == "star"
    assert [one["similarity"] for one in found] == sorted((one["similarity"] for one in found), reverse=True)
    scores = [one["ms"] for one in http.get(base, params={"sort": "ms", "limit": 20}).json()["data"]]
    assert scores == sorted(scores, reverse=True)
    pages = [http.get(base, params={"sort": "index", "limit": 5, "offset": offset}).json() for offset in (0, 5)]
    indices = [one["index"] for page in pages for one in page["data"]]
    assert indices == sorted(set(indices))
    assert len(indices) == 10

    detail = http.get(f"{base}/{star}").json()
    assert detail["n_images"] == len(detail["images"]) > 0
    assert sum(one["n_images"] for one in detail["histogram"]) > 0
    assert [one["rank"] for one in detail["images"]] == list(range(len(detail["images"])))
    picture = http.get(detail["images"][0]["url"])
    assert picture.headers["content-type"] == "image/png"
    assert Image.open(io.BytesIO(picture.content)).size == (56, 56)


def test_inspection_agrees_with_the_sae(http, llava, sae_folder, shapes):
    image = shapes[3]
    tokens = []
    llava.image_embeddings([image], [[lambda x: tokens.append(x) or x]])
    codes = load_sae(sae_folder).encode(tokens[0][1:])
    strongest = codes.amax(0)
    n_firing = int((strongest > 0).sum())
    assert n_firing >= 3
    asked = {"image": data_url(image), "sae": STEERS}
    assert len(http.post("/v1/features/inspect", json=asked | {"limit": n_firing - 1}).json()["data"]) == n_firing - 1
    answer = http.post("/v1/features/inspect", json=asked | {"limit": n_firing + 1}).json()
    assert answer["sae"] == STEERS
    assert len(answer["data"]) == n_firing
    for one in answer["data"]:
        assert one["strongest"] == pytest.approx(float(strongest[one["index"]]), rel=1e-4)
        assert [value for row in one["heat"] for value in row] == pytest.approx(
            codes[:, one["index"]].tolist(), rel=1e-3, abs=1e-4
        )
    assert answer["data"][0]["strongest"] == pytest.approx(float(strongest.max()), rel=1e-4)


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "PNG", "TIFF", "WEBP"])
def test_heat_maps_fit_the_image_whatever_the_orientation_of_the_file(server, http, shapes, kind):
    upright = Image.new("RGB", (84, 56), "white")
    upright.paste(shapes[3].resize((28, 28)), (40, 4))
    for orientation in range(1, 9):
        data = stored(upright, orientation, kind)
        decoded = decode_image(data)
        assert decoded.size == upright.size
        assert np.abs(np.asarray(decoded, int) - np.asarray(upright, int)).mean() < 6
        plain, answer = (
            http.post("/v1/features/inspect", json={"image": data_url(one), "sae": STEERS, "limit": 3}).json()
            for one in (decoded, data)
        )
        assert answer == plain
        shown = Image.open(io.BytesIO(base64.b64decode(answer["image"].split(",")[1])))
        assert np.array_equal(np.asarray(shown), load_preprocess(server.llava)(decoded).transpose(1, 2, 0))
        assert len(answer["data"][0]["heat"]) == len(answer["data"][0]["heat"][0]) == 4


def test_transparent_images_lie_on_white(http, shapes):
    """What is behind the transparent pixels makes no difference."""
    answers = []
    for behind in ("black", "red", "white"):
        image = Image.new("RGBA", (56, 56), behind)
        image.putalpha(0)
        image.paste(shapes[0].crop((10, 10, 40, 40)), (10, 10))
        answers.append(http.post("/v1/features/inspect", json={"image": data_url(image), "sae": STEERS}).json())
    assert answers[0] == answers[1] == answers[2]


def test_operations(server, http):
    for path in ("/health", "/ready", "/metrics", "/openapi.json", "/docs", "/"):
        assert httpx.get(f"{server.url}{path}", timeout=PATIENCE_S).status_code == 200, path
    http.post("/v1/chat/completions", json=chat())
    until(lambda: "sae_ray_requests_present 0.0" in httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text)
    metrics = httpx.get(f"{server.url}/metrics", timeout=PATIENCE_S).text
    assert 'sae_ray_requests_total{route="/v1/chat/completions",status="200"}' in metrics


def test_logs_are_json_and_hold_no_content(http):
    import ray

    answer = http.post("/v1/chat/completions", json=chat("Where is the purple elephant?"))
    request_id = answer.headers["x-request-id"]
    logs = Path(ray._private.worker._global_node.get_session_dir_path()) / "logs" / "serve"

    def lines() -> list[str]:
        return [line for file in logs.glob("replica_sae-ray_*") for line in file.read_text().splitlines()]

    def of_request() -> list[dict]:
        return [record for record in map(json.loads, lines()) if record.get("request_id") == request_id]

    # Their handlers write when they get to it.
    until(lambda: {one["deployment"] for one in of_request()} == {f"sae-ray_{x}" for x in ("Api", "Tower", "Language")})
    assert any(record["message"] == "completion" and record["images"] == 1 for record in of_request())
    assert not any("elephant" in line or "base64" in line for line in lines())
