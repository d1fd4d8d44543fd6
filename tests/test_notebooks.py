"""The notebooks of docs/examples run in a kernel of Jupyter, and say what their text says."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tools.notebooks import EXAMPLES, executed

pytest.importorskip("nbclient", reason="Jupyter's client is not installed")


def shown(notebook: dict[str, Any]) -> str:
    """All text that the cells put out."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = (output.get("text") or output.get("data", {}).get("text/plain", []) for output in outputs)
    return "\n".join("".join(text) for text in texts)


def test_a_first_sae(tmp_path: Path):
    notebook = executed(EXAMPLES / "first_sae.ipynb", tmp_path)
    text = shown(notebook)
    assert int(re.search(r"(\d+) of 64 directions found", text)[1]) > 60
    assert text.endswith("True"), "the SAE that was saved has the same codes"
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)


@pytest.mark.slow
def test_what_a_neuron_means(tmp_path: Path):
    text = shown(executed(EXAMPLES / "meaning.ipynb", tmp_path))
    latents, raw = map(float, re.search(r"latents ([\d.]+), raw neurons ([\d.]+)", text).groups())
    assert latents > 5 * raw
    probes = [tuple(map(float, row)) for row in re.findall(r"^\w+ +([\d.]+)  ([\d.]+)$", text, re.MULTILINE)]
    assert len(probes) == 17
    assert sum(found > chance for found, chance in probes) >= 16


@pytest.mark.slow
def test_steering(tmp_path: Path):
    text = shown(executed(EXAMPLES / "steering.ipynb", tmp_path))
    assert "unsteered: nothing\nsteered: star\n" in text
    assert re.search(r"^0x: .*cross", text, re.MULTILINE)
    assert re.search(r"^4x: .*star", text, re.MULTILINE)
    assert int(re.search(r"(\d+) of 16 shapes are named", text)[1]) >= 8


@pytest.mark.slow
def test_comparing_encoders(tmp_path: Path):
    text = shown(executed(EXAMPLES / "encoders.ipynb", tmp_path))
    assert len(re.findall(r"^\d +(?:CLIP|other)", text, re.MULTILINE)) == 3
    assert re.search(r"(\d+)% of the former have a partner", text)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda file: file.stem)
def test_what_the_repository_keeps_is_a_whole_run(file: Path):
    """Cells were run once each, in their order, and none failed."""
    cells = [cell for cell in json.loads(file.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]
    assert file.stat().st_size < 200_000
