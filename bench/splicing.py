"""What a CLIP still knows with an SAE's reconstruction in place of its activations: python -m bench.splicing ROOT

Of a finished study of the embedded world with `splicing` among the measures of its `[concepts]`: what that found.
"""

from __future__ import annotations

import sys

from bench.record import Table, record
from sae_ray.study.root import recalled_plan

SHARES = {
    "spliced_original": "original", "spliced": "reconstruction", "spliced_mean": "mean ablation",
    "spliced_zero": "zeros", "recovered": "recovered",
}  # fmt: skip


def main() -> None:
    plan = recalled_plan(sys.argv[1])
    r2 = {one.sae.grid_cell.name: (one.step.record() or {})["counts"]["r2"] for one in plan.evaluations}
    found = {one.name: (one.step.record() or {})["counts"] for one in plan.concepts if one.readout is not None}
    rows = [
        [f"`{name}`", round(r2[name], 3), *(round(counts[key], 3) for key in SHARES)] for name, counts in found.items()
    ]
    [n_images] = {counts["spliced_images"] for counts in found.values()}
    columns = ["SAE", "R²", *SHARES.values()]
    for row in [columns, *rows]:
        print("  ".join(map(str, row)))
    title = f"Zero-shot accuracy of 16 shapes on {n_images:,} held-out images"
    record("splicing", [Table(title=title, columns=columns, rows=rows)])


if __name__ == "__main__":
    main()
