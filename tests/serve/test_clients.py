"""Other people's clients, unmodified, say what the server says: each runs as a script of tests/serve/clients.

The official client for Python is installed with the tests; `make test-clients` installs the others and runs them, too.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from tests.machine import PATIENCE_S

from .conftest import ONE_WORD, STEERS, chat, data_url, white

SCRIPTS = Path(__file__).parent / "clients"
INSTALLED = Path(__file__).parents[2] / ".venv" / "clients"
OTHERS = ["use_langchain.py", "use_litellm.py", "use_llama_index.py", "openai_node.mjs", "ai_sdk.mjs"]


def square() -> Image.Image:
    image = Image.new("RGB", (56, 56), "white")
    ImageDraw.Draw(image).rectangle((14, 14, 42, 42), fill="red")
    return image


@pytest.fixture(scope="module")
def steering(star) -> dict:
    return {"sae": STEERS, "features": [{"index": star, "strength": 4, "unit": "max"}]}


@pytest.fixture(scope="module")
def expected(http, steering) -> dict[str, str]:
    """What plain requests are answered."""

    def said(body: dict) -> str:
        return http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]

    plain = said(chat(ONE_WORD, white()))
    roles = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": ONE_WORD}]
    answers = {
        "plain": plain,
        "streamed": plain,
        "several": said(chat(ONE_WORD, white(), square())),
        "text": said({"messages": roles, "temperature": 0, "max_tokens": 16}),
        "steered": said(chat(ONE_WORD, white(), steering=steering)),
    }
    assert answers["steered"] == "star" != plain
    return answers


def command(script: str) -> list[str]:
    if script == "use_openai.py":
        return [sys.executable, str(SCRIPTS / script)]
    program = shutil.which("node") if script.endswith(".mjs") else str(INSTALLED / "bin" / "python")
    needed = INSTALLED / ("node_modules" if script.endswith(".mjs") else "bin")
    if program is None or not needed.exists():
        pytest.skip("this client is not installed; make test-clients does that")
    # Node looks for packages where the script lies.
    return [program, shutil.copy(SCRIPTS / script, INSTALLED) if script.endswith(".mjs") else str(SCRIPTS / script)]


@pytest.mark.parametrize("script", ["use_openai.py", *(pytest.param(one, marks=pytest.mark.clients) for one in OTHERS)])
def test_a_client_gets_the_answers_of_the_server(server, steering, expected, script):
    asked = {
        "url": f"{server.url}/v1",
        "key": server.key,
        "model": "llava",
        "images": [data_url(white()), data_url(square())],
        "question": ONE_WORD,
        "steering": steering,
    }
    environment = os.environ | {"ASKED": json.dumps(asked), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    done = subprocess.run(command(script), env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected
