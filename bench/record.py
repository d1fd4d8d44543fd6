"""Results of a benchmark as JSON, with the machine that they were measured on."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

RESULTS = Path(__file__).parent / "results"


class Table(TypedDict):
    """One table of the documentation."""

    title: str
    columns: list[str]
    rows: list[list[Any]]
    """As many cells per row as there are columns: strings and numbers."""
    part: NotRequired[str]
    """Where it stands on the page, if not with the others: at `<!-- bench: NAME, PART -->`."""


def record(name: str, tables: Sequence[Table], facts: dict[str, Any] | None = None) -> Path:
    """Writes `bench/results/<name>.json`: the tables, and `facts` beside those of the machine."""
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"tables": list(tables), "facts": {**machine(), **(facts or {})}}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    return {
        "cpu": _cpu(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": round(os.getloadavg()[0], 1),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
