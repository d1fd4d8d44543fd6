"""How a LLaVA is steered on photographs, as rates: python -m bench.photo_steering ROOT ...

Of finished studies like `studies/photos_steering.toml`. Pictures and answers stay in the roots. Similarities are left
out: they need a scorer that knows photographs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from bench.record import Table, record
from sae_ray.steering.evaluation import DESCRIPTIONS
from sae_ray.study.root import recalled_plan


def table(root: str) -> Table:
    """Rates of the study's only SAE that steers."""
    settings, summary = recalled_plan(root).study.steering, json.loads(Path(root, "summary.json").read_text())
    assert settings is not None
    ((sae, found),) = summary["steering"].items()
    (cell,) = (one for one in summary["cells"] if one["name"] == sae)
    rows = []
    for kind, one in found["kinds"].items():
        unchanged = found["unchanged"].get(kind, {"rate": None})
        rows.append([DESCRIPTIONS[kind], f"{one['right']:,} of {one['asked']:,}", shown(one["rate"]),
                     shown(one["unsteered_rate"]), shown(unchanged["rate"])])  # fmt: skip
    title = (
        f"{sae}: L0 {cell['l0']:.1f}, R² {cell['r2']:.3f}; latents at {settings.strength:g} × their maximum, "
        f"the SAE's error {'kept' if settings.error == 'keep' else 'dropped'}"
    )
    return Table(title=title, columns=["", "right", "rate", "unsteered", "other answers kept"], rows=rows)


def shown(rate: float | None) -> str | None:
    return None if rate is None else f"{rate:.1%}"


if __name__ == "__main__":
    record("photo_steering", [table(root) for root in sys.argv[1:]])
