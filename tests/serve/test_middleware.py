"""The API in this process: behind a prefix, without a key, and where something is missing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import HTTPException
from pydantic import ValidationError
from sae_ray.serve.api import create_api
from sae_ray.serve.app import Api
from sae_ray.serve.config import API_KEY, Limits, ServeConfig, with_llava
from sae_ray.serve.errors import as_api_error
from sae_ray.serve.service import Service
from starlette.testclient import TestClient

from sae_ray.errors import SaeRayError
from sae_ray.study.root import recalled_plan

from .conftest import KEY, OTHER, STEERS, data_url, white


@pytest.fixture(scope="module")
def service(served_study) -> Service:
    service = Service(with_llava(ServeConfig(root=str(served_study), without_key=True)), None, None)
    service.load_saes(service.config)
    return service


@pytest.fixture
def local(service, monkeypatch) -> TestClient:
    monkeypatch.delenv(API_KEY, raising=False)
    return TestClient(create_api(service), base_url="http://localhost:8000", raise_server_exceptions=False)


def test_behind_a_prefix_the_key_is_asked_for(service, monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    http = TestClient(create_api(service), root_path="/llava")
    for path in ("/v1/saes", "/v1/nothing", "/nothing", "//v1/saes", "/health/"):
        assert http.get(f"/llava{path}").status_code == 401, path
    for path in ("", "/", "/playground.js", "/health", "/metrics", "/docs", "/openapi.json"):
        assert http.get(f"/llava{path}").status_code == 200, path
    http.headers["Authorization"] = f"Bearer {KEY}"
    [best] = http.get(f"/llava/v1/saes/{STEERS}/features?limit=1").json()["data"]
    detail = http.get(f"/llava/v1/saes/{STEERS}/features/{best['index']}").json()
    assert http.get(detail["images"][0]["url"]).headers["content-type"] == "image/png"


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *((host, 200) for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:8000", "127.0.0.2", "[::1]:8000")),
        *((host, 403) for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "")),
    ],
)
def test_without_a_key_other_names_are_refused(local, host, status):
    """Such as one whose address a page in the browser made this machine's."""
    assert local.get("/v1/saes", headers={"Host": host}).status_code == status


def test_a_top_image_that_is_gone(local, service):
    base = f"/v1/saes/{OTHER}/features"
    [best] = local.get(f"{base}?limit=1").json()["data"]
    image = local.get(f"{base}/{best['index']}").json()["images"][-1]
    file = Path(recalled_plan(service.config.root).study.images.train.path) / image["image_id"]
    content = file.read_bytes()
    try:
        file.write_bytes(b"no image")
        assert local.get(image["url"]).status_code == 404
        file.unlink()
        assert local.get(image["url"]).json()["error"]["code"] == "unknown_image"
    finally:
        file.write_bytes(content)
    assert local.get(image["url"]).status_code == 200


def test_what_nobody_expected_is_counted_as_a_failure(local, service, monkeypatch):
    monkeypatch.setattr(service, "saes", None)
    assert local.get("/v1/saes").json()["error"]["code"] == "internal_error"
    assert 'sae_ray_requests_total{route="/v1/saes",status="500"} 1.0' in local.get("/metrics").text


def test_no_key_of_a_store_is_told():
    error = as_api_error(SaeRayError("s3://key:s3cr3t@bucket/root?region=eu cannot be read"))
    assert (error.status_code, error.detail) == (500, "s3://bucket/root cannot be read")


def test_the_images_of_a_request_share_a_limit(service, monkeypatch):
    limits = Limits(image_megapixels=0.005)
    monkeypatch.setattr(service, "config", service.config.model_copy(update={"limits": limits}))
    one = data_url(white())
    assert [image.pixels.shape for image in asyncio.run(service.images([one], ["first"]))] == [(3, 56, 56)]
    with pytest.raises(HTTPException) as caught:
        asyncio.run(service.images([one, one], ["first", "second"]))
    assert "at most 0.0 megapixels" in caught.value.detail
    assert caught.value.param == "second"


@pytest.mark.parametrize("path", ["/v1/steer", "/v1/features/inspect"])
def test_a_wrong_image_of_the_short_form_is_named(local, path):
    body = {"image": data_url(b"no image")} | ({"prompt": "What is it?"} if path == "/v1/steer" else {})
    answer = local.post(path, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "image")


def test_other_saes_are_told_by_known_fields(service, monkeypatch):
    monkeypatch.setattr(service, "saes", {})

    def reconfigure(user_config: dict) -> list[str]:
        asyncio.run(Api.func_or_class.reconfigure(SimpleNamespace(service=service), user_config))
        return list(service.saes)

    with pytest.raises(ValidationError, match="sae\n"):
        reconfigure({"sae": [OTHER]})
    assert reconfigure({"saes": [OTHER]}) == [OTHER]
    assert set(reconfigure({})) == {STEERS, OTHER}
