"""What docs/serving.md says runs as it stands, but for address and key."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()


def fence(language: str, server) -> str:
    [example] = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return example.replace("http://127.0.0.1:8000", server.url).replace('"none"', json.dumps(server.key))


def test_the_example_for_curl(server, tmp_path):
    (tmp_path / ".curlrc").write_text(f'header = "Authorization: Bearer {server.key}"\n')
    command = ["bash", "-euc", fence("bash", server)]
    environment = os.environ | {"CURL_HOME": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout)["answers"]
    assert (first["steering_type"], first["text"]) == ("STEERED", "star")
    assert second["text"] != "star"


def test_the_example_for_the_official_client(server, capsys):
    exec(fence("py", server), {})
    lines = capsys.readouterr().out.splitlines()
    assert "STEERED star" in lines
    assert "DEFAULT star" not in lines
