"""Reads what a report hands to its pages."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np


def data(report: Path, name: str) -> Any:
    """What a file of data hands to the page."""
    found = re.fullmatch(r'report\("(.*?)",(.*)\)\n', (report / "data" / f"{name}.js").read_text(), re.DOTALL)
    assert found is not None
    assert found[1] == name
    return json.loads(found[2])


def unpacked(text: str, dtype: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)
