"""How a LLaVA is steered on photographs, as rates: python -m bench.photo_steering ROOT ...

Of finished studies like `studies/photos_steering.toml`. Pictures and answers stay in the roots. Similarities are left
out: they need a scorer that knows photographs.
"""

from __future__ import annotations

import json
import string
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.record import Table, record
from sae_ray.steering.config import Steering
from sae_ray.steering.evaluation import DESCRIPTIONS
from sae_ray.study.root import recalled_plan


def tables(roots: Sequence[str]) -> list[Table]:
    """Roots are named A, B, ...; each has one SAE that steers."""
    letters = string.ascii_uppercase[: len(roots)]
    summaries = [json.loads(Path(root, "summary.json").read_text(encoding="utf-8")) for root in roots]
    found = [next(iter(one["steering"].values())) for one in summaries]
    settings = [
        setting(letter, recalled_plan(root).study.steering, summary)
        for letter, root, summary in zip(letters, roots, summaries, strict=True)
    ]
    kinds = [kind for kind in DESCRIPTIONS if kind in found[0]["kinds"]]
    right = [[DESCRIPTIONS[kind], *(counted(one["kinds"][kind]) for one in found)] for kind in kinds]
    right.insert(0, ["white image, not steered", *(shown(one["kinds"]["white"]["unsteered_rate"]) for one in found)])
    unchanged = [
        [DESCRIPTIONS[kind].partition(":")[0], *(shown(one["unchanged"][kind]["rate"]) for one in found)]
        for kind in kinds
        if kind in found[0]["unchanged"]
    ]
    return [
        Table(title="Studies", columns=["", "SAE", "L0", "R²", "a latent is set to", "the SAE's error"], rows=settings),
        Table(title="Answers that do as steered", columns=["", *letters], rows=right),
        Table(title="Answers to another question that stay as they were", columns=["", *letters], rows=unchanged),
    ]


def setting(letter: str, steering: Steering | None, summary: dict[str, Any]) -> list[str]:
    assert steering is not None
    (sae,) = summary["steering"]
    (cell,) = (one for one in summary["cells"] if one["name"] == sae)
    strength = f"{steering.strength:g} × its maximum"
    error = "kept" if steering.error == "keep" else "dropped"
    return [letter, sae, f"{cell['l0']:.1f}", f"{cell['r2']:.3f}", strength, error]


def counted(one: dict[str, Any]) -> str | None:
    return one["rate"] if one["rate"] is None else f"{one['rate']:.1%} ({one['right']:,} of {one['asked']:,})"


def shown(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.1%}"


if __name__ == "__main__":
    record("photo_steering", tables(sys.argv[1:]))
