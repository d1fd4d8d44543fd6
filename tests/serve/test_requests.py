"""What a request may contain, and what is said about the rest. The API runs in this process; no model is asked."""

from __future__ import annotations

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from sae_ray.serve.conversation import turns
from sae_ray.serve.images import _from_base64
from sae_ray.serve.middleware import answer_errors
from sae_ray.serve.neutral import MessageOfOthers, PartOfOthers
from sae_ray.serve.schemas import (
    ChatRequest,
    ImagePart,
    ImageUrl,
    InspectRequest,
    Message,
    SteerRequest,
    StreamOptions,
    TextPart,
)
from starlette.testclient import TestClient

from . import fields
from .fields import ANYTHING, EFFECTIVE, IGNORED, MESSAGE_IGNORED, MESSAGE_NEUTRAL, NEUTRAL, PAGE, PART_IGNORED, Values

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"type": "text", "text": "What is it?"}
USER = {"role": "user", "content": [IMAGE, TEXT]}
SAID = {"role": "assistant", "content": "a star"}


@pytest.fixture(scope="module")
def http() -> TestClient:
    """Reads requests and says what they contain; errors are those of the API."""
    app = FastAPI()
    answer_errors(app)

    @app.post("/")
    async def read(request: ChatRequest) -> dict[str, Any]:
        return request.model_dump(exclude_unset=True)

    return TestClient(app)


def refusal(http: TestClient, body: Any) -> tuple[str, str]:
    answer = http.post("/", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    return error["param"], error["message"]


def each(table: dict[str, Values], of: str) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in getattr(values, of)]


@pytest.mark.parametrize(
    ("name", "value"),
    [*each(EFFECTIVE, "taken"), *each(NEUTRAL, "taken"), *((name, one) for name in IGNORED for one in ANYTHING)],
)
def test_a_field_passes(http, name, value):
    answer = http.post("/", json={"messages": [USER], name: value})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("name", "value"), [*each(EFFECTIVE, "refused"), *each(NEUTRAL, "refused")])
def test_a_field_is_refused_by_name(http, name, value):
    param, message = refusal(http, {"messages": [USER], name: value})
    assert param.split(".")[0] == name
    assert message.startswith(param)
    if name in NEUTRAL:
        assert "not supported, since" in message


def test_null_is_left_out_everywhere(http):
    message = {"role": "user", "content": [IMAGE | {"uuid": None}, TEXT]} | dict.fromkeys(Message.model_fields)
    message |= {"role": "user", "content": [{**IMAGE, "image_url": {**IMAGE["image_url"], "detail": None}}, TEXT]}
    steering = {"sae": None, "features": [{"index": 1, "strength": 2, "unit": None, "mode": None}], "types": None}
    body = dict.fromkeys(ChatRequest.model_fields) | {"messages": [message], "steering": steering}
    answer = http.post("/", json=body)
    assert answer.status_code == 200, answer.text
    assert set(answer.json()) == {"messages", "steering"}
    assert refusal(http, {"messages": None})[0] == "messages"
    assert InspectRequest.model_validate({"image": "x", "limit": None}).limit == 16
    assert SteerRequest.model_validate({"image": "x", "prompt": "w", "max_tokens": None}).max_tokens == 64


@pytest.mark.parametrize("detail", ["low", "high", "auto", "original", None])
@pytest.mark.parametrize("form", [dict, str])
def test_every_form_of_an_image_url(http, detail, form):
    url = IMAGE["image_url"]["url"]
    part = {"type": "image_url", "image_url": {"url": url, "detail": detail} if form is dict else url}
    request = ChatRequest.model_validate({"messages": [{"role": "user", "content": [TEXT, part]}]})
    assert request.image_urls == [url]
    assert request.image_names == ["messages.0.content.1.image_url.url"]


@pytest.mark.parametrize(
    ("role", "name", "value"),
    [
        *(("assistant", name, value) for name, value in each(MESSAGE_NEUTRAL, "taken")),
        *((role, name, value) for role in ("user", "assistant") for name in MESSAGE_IGNORED for value in ANYTHING),
    ],
)
def test_a_message_with_fields_of_other_servers(http, role, name, value):
    assert http.post("/", json={"messages": [USER, {"role": role, "content": "x", name: value}]}).status_code == 200


@pytest.mark.parametrize(("name", "value"), each(MESSAGE_NEUTRAL, "refused"))
def test_a_message_that_asks_for_more(http, name, value):
    param, message = refusal(http, {"messages": [USER, {"role": "assistant", "content": None, name: value}]})
    assert param == f"messages.1.{name}"
    assert "not supported, since" in message


@pytest.mark.parametrize("name", PART_IGNORED)
def test_a_part_with_fields_of_other_servers(http, name):
    parts = [IMAGE | {name: {"type": "ephemeral"}}, TEXT | {name: {"type": "ephemeral"}}]
    assert http.post("/", json={"messages": [{"role": "user", "content": parts}]}).status_code == 200


def test_every_field_is_in_the_tables_of_the_page():
    assert set(ChatRequest.model_fields) == {*EFFECTIVE, *IGNORED, *NEUTRAL}
    assert set(MessageOfOthers.model_fields) == {*MESSAGE_IGNORED, *MESSAGE_NEUTRAL}
    assert set(PartOfOthers.model_fields) == set(PART_IGNORED)
    page = PAGE.read_text(encoding="utf-8")
    assert fields.filled(page) == page, "run python -m tests.serve.fields"


def test_every_field_of_the_official_client_is_known():
    """A newer client may have more."""
    from openai.types import chat as theirs
    from openai.types.chat import chat_completion_content_part_image_param
    from openai.types.chat import completion_create_params as requests

    def names(*kinds: Any) -> set[str]:
        return {name for kind in kinds for name in (*kind.__annotations__, *getattr(kind, "model_fields", ()))}

    plain, streaming = requests.CompletionCreateParamsNonStreaming, requests.CompletionCreateParamsStreaming
    assert names(requests.CompletionCreateParamsBase, plain, streaming) <= ChatRequest.model_fields.keys()
    assert names(theirs.ChatCompletionStreamOptionsParam) <= StreamOptions.model_fields.keys()
    messages = names(
        theirs.ChatCompletionSystemMessageParam,
        theirs.ChatCompletionDeveloperMessageParam,
        theirs.ChatCompletionUserMessageParam,
        theirs.ChatCompletionAssistantMessageParam,
        theirs.ChatCompletionMessage,
    )
    assert messages <= Message.model_fields.keys()
    assert names(theirs.ChatCompletionContentPartTextParam) <= TextPart.model_fields.keys()
    assert names(theirs.ChatCompletionContentPartImageParam) <= ImagePart.model_fields.keys()
    assert names(chat_completion_content_part_image_param.ImageURL) <= ImageUrl.model_fields.keys()


def of_user(*parts: Any) -> dict[str, Any]:
    return {"messages": [SAID, {"role": "user", "content": list(parts)}]}


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (of_user(TEXT, {"type": "input_audio", "input_audio": {}}), "messages.1.content.1.type", "input_audio"),
        (of_user(TEXT, {"type": "file", "file": {}}), "messages.1.content.1.type", "send text or image_url"),
        (of_user(TEXT, {"type": "video_url"}), "messages.1.content.1.type", "video_url"),
        (of_user({"text": "x"}), "messages.1.content.0.type", "is missing"),
        (of_user("x"), "messages.1.content.0", "must be a JSON object; got 'x'"),
        (of_user({"type": "text", "text": 5}), "messages.1.content.0.text", "string"),
        (of_user({"type": "text"}), "messages.1.content.0.text", "is missing"),
        (of_user({"type": "image_url"}), "messages.1.content.0.image_url", "is missing"),
        (of_user({"type": "image_url", "image_url": {}}), "messages.1.content.0.image_url.url", "is missing"),
        (of_user({"type": "image_url", "image_url": {"url": 1}}), "messages.1.content.0.image_url.url", "string"),
        (of_user({"type": "image_url", "image_url": 1}), "messages.1.content.0.image_url", "must be a JSON object"),
        (of_user(TEXT | {"txt": "x"}), "messages.1.content.0.txt", "unknown field"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "must be a string or a list of parts"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool'"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.tool_call_id", "no tools"),
        ({"messages": [{"content": "x"}]}, "messages.0.role", "is missing"),
        ({"messages": ["x"]}, "messages.0", "must be a JSON object"),
        ({"messages": [{"role": "system", "content": [TEXT, IMAGE]}]}, "messages.0.content.1", "only user messages"),
        ({"messages": [USER, {"role": "assistant", "content": [IMAGE]}]}, "messages.1.content.0", "only user messages"),
        ({"messages": [{"role": "user", "content": "x"}], "steering": {}}, "steering", "no image"),
        ({"messages": [USER], "max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", "max_completion_tokens"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"messages": [USER], "toools": []}, "toools", "unknown field"),
        ({"messages": [USER], "steering": {"features": [{"index": 1, "strength": "a"}]}},
         "steering.features.0.strength", "number"),
        ({}, "messages", "is missing"),
        ([USER], None, "must be a JSON object"),
    ],
)  # fmt: skip
def test_an_error_names_the_part_that_is_wrong(http, body, param, words):
    named, message = refusal(http, body)
    assert named == param
    assert words in message


def test_a_body_that_is_no_json_is_told_where(http):
    error = http.post("/", content=b'{"messages": [}', headers={"Content-Type": "application/json"}).json()["error"]
    assert "not valid JSON" in error["message"]
    assert "character 14" in error["message"]


HALF = "\ud83d"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (of_user(TEXT, {"type": "text", "text": f"a {HALF}"}), "messages.1.content.1.text"),
        ({"messages": [{"role": "user", "content": f"{HALF} b"}]}, "messages.0.content"),
        (of_user({"type": "image_url", "image_url": HALF}), "messages.1.content.0.image_url"),
        ({"messages": [USER], "stop": HALF}, "stop"),
        ({"messages": [USER], "stop": ["a", HALF]}, "stop"),
        ({"messages": [USER], "model": HALF}, "model"),
        ({"messages": [USER], "steering": {"sae": HALF}}, "steering.sae"),
    ],
)
def test_half_of_a_character_is_refused_by_name(http, body, param):
    """As clients send it that cut a text within an emoji."""
    answer = http.post("/", content=json.dumps(body), headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert "half of a character (U+D83D)" in error["message"]


@pytest.mark.parametrize("body", [{"messages": [USER], HALF: 1}, of_user({"type": HALF})])
def test_half_of_a_character_in_a_name_is_refused(http, body):
    answer = http.post("/", content=json.dumps(body), headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize("body", ['{"messages": "ü"}'.encode("latin-1"), b"\x1f\x8b\x08\0", b'{"a":' + b"[" * 5000])
def test_a_body_that_cannot_be_read_is_told_what_is_expected(http, body):
    answer = http.post("/", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "JSON in UTF-8" in answer.json()["error"]["message"] or "not valid JSON" in answer.json()["error"]["message"]


def said(*messages: tuple[str, Any]) -> list[tuple[str, str, int]]:
    return [tuple(turn) for turn in turns([Message(role=role, content=content) for role, content in messages])]


def test_neighbouring_messages_of_one_role_are_one_turn():
    assert said(
        ("system", "a"), ("developer", "b"), ("user", [IMAGE, TEXT]), ("user", [IMAGE, IMAGE]), ("user", "x")
    ) == [
        ("system", "a\nb", 0),
        ("user", "What is it?\nx", 3),
    ]
    assert said(("user", "a"), ("assistant", []), ("user", "b")) == [
        ("user", "a", 0),
        ("assistant", "", 0),
        ("user", "b", 0),
    ]


DATA = bytes(range(256)) * 5


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("wrapped", ["", "\n", "\r\n", " ", "%0A"])
@pytest.mark.parametrize("n", [1, 2, 3, 1280])
def test_base64_as_clients_write_it(padded, encode, wrapped, n):
    text = encode(DATA[:n]).decode()
    if not padded:
        text = text.rstrip("=")
    if "%" in wrapped:
        text = text.replace("+", "%2B").replace("=", "%3D")
    lines = [text[place : place + 76] for place in range(0, len(text), 76)] if "%" not in text else [text]
    assert _from_base64(f"{wrapped}".join([*lines, ""])) == DATA[:n]


def test_a_client_may_send_back_what_it_got():
    from sae_ray.serve.schemas import Reply

    reply = Reply(content="a star").model_dump()
    official = json.loads(json.dumps(reply)) | {"tool_calls": None, "audio": None, "annotations": []}
    for message in (reply, official):
        assert Message.model_validate(message).text == "a star"
    assert SimpleNamespace(**reply).role == "assistant"
