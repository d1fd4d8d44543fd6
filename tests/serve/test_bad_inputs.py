"""A bad request gets an error that says what is wrong, before anything is decoded or computed."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.machine import PATIENCE_S

from .conftest import KEY, STEERS, chat, data_url, white


def huge_png() -> bytes:
    """30 000 × 30 000 pixels in a few bytes."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0")) + block(b"IEND", b"")


def image(url: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "w"}]
    return {"messages": [{"role": "user", "content": parts}]}


def wide() -> Image.Image:
    """The model sees its middle."""
    return Image.new("RGB", (84, 56), "white")


def mask(*inside: int) -> str:
    drawn = Image.new("L", (56, 56))
    if inside:
        drawn.paste(255, inside)
    return data_url(drawn)


def where(image: Image.Image | None = None, **rest: Any) -> dict[str, Any]:
    return chat("w", image or white(), steering={"sae": STEERS, "features": [{"index": 1, "strength": 1.0}]} | rest)


def feature(**rest: Any) -> dict[str, Any]:
    return chat(steering={"sae": STEERS, "features": [{"index": 1, "strength": 1.0} | rest]})


BAD = {
    "steering without an image": (
        {"messages": [{"role": "user", "content": "what?"}], "steering": {"features": []}},
        400,
        "no image",
    ),
    "no messages": ({"messages": []}, 400, "messages"),
    "broken base64": (image("data:image/png;base64,@@@@"), 400, "messages.0.content.0.image_url.url"),
    "no data url": (image("cat.png"), 400, "data URL"),
    "a text file": (image(data_url(b"hello")), 400, "not an image"),
    "a pixel bomb": (image(data_url(huge_png())), 400, "30000x30000"),
    "a web address": (image("http://example.com/cat.png"), 400, "does not fetch images"),
    "half a web address": (image("http://[x/a.png"), 400, "http://[x/a.png"),
    "a metadata service": (image("http://169.254.169.254/latest"), 400, "does not fetch images"),
    "too many images": (chat("w", *[white()] * 9), 400, "9 images"),
    "the image token": (chat("<image> again"), 400, "<image>"),
    "index -1": (feature(index=-1), 400, "steering.features.0.index"),
    "index 65536": (feature(index=65536), 400, "0 to 127"),
    "index 1.5": (feature(index=1.5), 400, "steering.features.0.index"),
    "index a": (feature(index="a"), 400, "steering.features.0.index"),
    "index true": (feature(index=True), 400, "steering.features.0.index"),
    "strength a": (feature(strength="a"), 400, "steering.features.0.strength"),
    "strength missing": (feature(strength=None), 400, "strength"),
    "strength of ablate": (feature(mode="ablate"), 400, "ablate"),
    "unknown mode": (feature(mode="boost"), 400, "steering.features.0.mode"),
    "unknown unit": (feature(unit="metres"), 400, "steering.features.0.unit"),
    "max of scale": (feature(mode="scale", unit="max"), 400, "scale"),
    "unknown field": (feature(strenght=3), 400, "steering.features.0.strenght"),
    "twice the same feature": (
        chat(steering={"features": [{"index": 1, "strength": 1.0}, {"index": 1, "strength": 2.0}]}),
        400,
        "edited twice",
    ),
    "unknown sae": (chat(steering={"sae": "nobody"}), 404, "nobody"),
    "unknown model": (chat(model="gpt-5"), 404, "gpt-5"),
    "unknown top-level field": (chat(toools=[]), 400, "toools"),
    "tools": (chat(tools=[{"type": "function"}]), 400, "calls no tools"),
    "a penalty out of bounds": (chat(frequency_penalty=2.5), 400, "frequency_penalty"),
    "absurd max_tokens": (chat(max_tokens=10**9), 400, "max_tokens"),
    "max_tokens 0": (chat(max_tokens=0), 400, "max_tokens"),
    "too many choices": (chat(n=17), 400, "n times"),
    "temperature 3": (chat(temperature=3), 400, "temperature"),
    "a prompt too long": (chat("cat " * 400), 400, "room"),
    "a prompt far too long": (chat("cat " * 100_000), 400, "characters"),
    "an empty stop": (chat(stop=[""]), 400, "stop"),
    "a region of nothing": (where(region={}), 400, "steering.region: must have rectangles or a mask"),
    "a region of no table": (where(region=[0, 0, 1, 1]), 400, "steering.region"),
    "a rectangle of three": (where(region={"rectangles": [[0, 0, 1]]}), 400, "steering.region.rectangles.0"),
    "a rectangle of pixels": (where(region={"rectangles": [[0, 0, 56, 56]]}), 400, "steering.region.rectangles.0.2"),
    "a rectangle upside down": (where(region={"rectangles": [[0, 1, 1, 0]]}), 400, "top < bottom"),
    "too many rectangles": (where(region={"rectangles": [[0, 0, 1, 1]] * 101}), 400, "steering.region.rectangles"),
    "a rectangle too small": (where(region={"rectangles": [[0, 0, 0.1, 0.1]]}), 400, "by at least half"),
    "a rectangle outside of the crop": (where(wide(), region={"rectangles": [[0, 0, 0.1, 1]]}), 400, "crops images"),
    "a mask that is no image": (where(region={"mask": data_url(b"hello")}), 400, "steering.region.mask"),
    "a mask from elsewhere": (where(region={"mask": "http://example.com/mask.png"}), 400, "steering.region.mask"),
    "an empty mask": (where(region={"mask": mask()}), 400, "the mask of region is empty"),
    "a mask of a speck": (where(region={"mask": mask(3, 3, 5, 5)}), 400, "by at least half"),
    "a mask bomb": (where(region={"mask": data_url(huge_png())}), 400, "30000x30000"),
    "a condition without a feature": (where(when={"above": 1.0}), 400, "steering.when.index"),
    "a condition on no feature": (where(when={"index": 128}), 400, "steering.when.index"),
    "a condition below 0": (where(when={"index": 1, "above": -1}), 400, "steering.when.above"),
    "a condition in metres": (where(when={"index": 1, "unit": "m"}), 400, "steering.when.unit"),
    "strength out of all bounds": (feature(strength=1e17), 400, "steering.features.0.strength"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_what_is_wrong(http, name):
    body, status, words = BAD[name]
    answer = http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, words in error["message"] + str(error["param"])) == (status, True), error
    assert error["request_id"] == answer.headers["x-request-id"]
    assert http.post("/v1/chat/completions", json=body | {"stream": True}).status_code == status


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"image": "x", "prompt": "w", "features": [{"index": 1, "strength": NaN}]}', "strength"),
        (b'{"image": "x", "prompt": "w", "features": [{"index": 1, "strength": Infinity}]}', "strength"),
        (b'{"image": "x", "prompt": ["a", "b"]}', "prompt"),
        (b'{"prompt": "w"}', "image"),
        (b'{"image": "x"', "JSON"),
        (b"[1]", "JSON object"),
        (b"\xff\xfe", "JSON"),
        (b"", "must be a JSON object"),
    ],
)
def test_a_body_that_is_no_request(http, content, words):
    answer = http.post("/v1/steer", content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_a_body_too_large_is_not_read(server, http):
    assert http.post("/v1/steer", content=b"x" * 5_000_000).status_code == 413

    def chunks():
        for _ in range(100):
            yield b" " * 100_000

    assert http.post("/v1/steer", content=chunks()).status_code == 413


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}])
@pytest.mark.parametrize("path", ["/v1/models", "/v1/saes", "/v1/nothing"])
def test_without_the_key_nothing_is_served(server, headers, path):
    answer = httpx.get(f"{server.url}{path}", headers=headers, timeout=PATIENCE_S)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/nothing", 404),
        ("/v1/saes/nobody/features", 404),
        (f"/v1/saes/{STEERS}/features/65536", 404),
        (f"/v1/saes/{STEERS}/features/-1", 400),
        (f"/v1/saes/{STEERS}/features/a", 400),
        (f"/v1/saes/{STEERS}/features/99999999999999999999", 400),
        (f"/v1/saes/{STEERS}/features/1/images/999", 404),
        (f"/v1/saes/{STEERS}/features?limit=0", 400),
        (f"/v1/saes/{STEERS}/features?sort=luck", 400),
        (f"/v1/saes/{STEERS}/features?sort=similarity", 400),
    ],
)
def test_what_is_not_there(http, path, status):
    answer = http.get(path)
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
