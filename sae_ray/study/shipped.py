"""The studies that sae-ray ships, which need no path: `studies/` of a checkout, `sae_ray/studies` of a wheel."""

from __future__ import annotations

import re
from itertools import takewhile
from pathlib import Path


def shipped_studies() -> dict[str, Path]:
    """Name -> study file."""
    package = Path(__file__).parents[1]
    inside, beside = package / "studies", package.parent / "studies"
    return {file.stem: file for file in sorted((inside if inside.is_dir() else beside).glob("*.toml"))}


def study_file(study: str | Path) -> Path:
    """The file that a user names: a path, or else the name of a shipped study. It need not exist."""
    path = Path(study).expanduser()
    return path if path.is_file() else shipped_studies().get(str(study), path)


def purpose(file: Path) -> str:
    """What the comment that a study file begins with says first."""
    comment = takewhile(lambda line: line.startswith("#"), file.read_text(encoding="utf-8").splitlines())
    return re.split(r"[.:](?: |$)", " ".join(line.lstrip("# ") for line in comment))[0]
