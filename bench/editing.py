"""A latent taken out of the weights, beside one that a hook ablates: python -m bench.editing ROOT

Of a finished study of the embedded world with `[steering]`: the best latent of every shape, and the held-out images and
questions of its steering stage, and one more.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sae_ray.jobs.editing import CellTrial

from bench.record import Table, record
from sae_ray.concepts.labelling import image_classes, label_concepts
from sae_ray.editing import make_patch
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering import load_max_token
from sae_ray.steering.protocol import choose_subjects
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recall

DESCRIBE = "Describe the image."
"""A question whose answers name the shape in the middle of a sentence."""
EDITS: dict[str, dict[str, Any]] = {
    "`project`, reader": {},
    "`project`, reader, mean kept": {"keep": "mean"},
    "`rows`, reader": {"mode": "rows"},
    "`project`, writers": {"scope": "writers"},
    "`rows`, writers": {"scope": "writers", "mode": "rows"},
    "`project`, one MLP": {"scope": "mlp"},
    "`rows`, one MLP": {"scope": "mlp", "mode": "rows"},
}
HOOKS = {"hook, error dropped": "drop", "hook, error kept": "keep"}
MEASURES = {
    "own_variance_left": "own variance left",
    "others_relative_change": "other latents' change",
    "n_firing_before": "tokens it fires on",
    "n_firing_after": "after",
    "reliability": "reliability",
    "locality": "locality",
    "generality": "generality",
    "unchanged": "other answers the same",
}
DIGITS = 3


def plan_of(root: str) -> StudyPlan:
    """The study's, with larger batches: the model is so small that a batch takes as long as an answer."""
    memory = recall(Folder(root))
    assert memory is not None, "the root of a finished study"
    study = Study.from_dict(memory.study.to_dict(), {"resources.steering.batch_size": 480})
    return StudyPlan(study, Folder(root), memory.survey)


def best_latents(trial: CellTrial) -> list[int]:
    """Of every shape, as the steering stage chooses them."""
    steering = trial.plan.study.steering
    assert steering is not None, "a study with [steering]"
    tables, max_token = ScoreTables(trial.pictures.step.folder), load_max_token(trial.train.step.folder)
    classes = image_classes(trial.pictures.activations.images.labels, steering.ignore_labels)
    found = label_concepts(tables.scores, tables.top_images.image, classes, max_token.numpy())
    return [one.latent for one in choose_subjects(found, [], steering).best]


def rows_of(trial: CellTrial, latents: Sequence[int]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Kind of edit, and a row per latent."""
    llava = trial.plan.study.steering.llava if trial.plan.study.steering else ""
    for title, settings in EDITS.items():
        patches = [make_patch(llava, trial.sae, latent, sae_name="", **settings) for latent in latents]
        print(title, flush=True)
        yield title, [trial.row(patch) for patch in patches]
    for title, error in HOOKS.items():
        print(title, flush=True)
        yield title, [trial.trial.of_hook(latent, trial.concepts[latent], error) for latent in latents]


def mean(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return rounded(float(np.mean(values))) if values else None


def rounded(value: float | None) -> float | None:
    return value if value is None else 0.0 if abs(value) < 1e-6 else float(f"{value:.{DIGITS}g}")


def main() -> None:
    torch.set_num_threads(1)  # more of them wait for one another
    plan = plan_of(sys.argv[1])
    steering = plan.study.steering
    assert steering is not None, "a study with [steering]"
    trial = CellTrial(plan, plan.steerings[0].sae, [*steering.other_prompts, DESCRIBE], "cpu")
    latents = best_latents(trial)
    found = dict(rows_of(trial, latents))
    columns = ["", *MEASURES.values()]
    summary = [[title, *(mean(rows, key) for key in MEASURES)] for title, rows in found.items()]
    title = f"Means over the best latents of {len(latents)} shapes of `{trial.train.grid_cell.name}`"
    tables = [Table(title=title, columns=columns, rows=summary)]

    single = found["`project`, reader"]
    rows = [[f"{row['concept']} ({row['latent']})", *(rounded(row[key]) for key in MEASURES)] for row in single]
    tables.append(Table(title="`project`, reader: every latent", columns=columns, rows=rows))

    shares = [row["own_share_by_writer"] for row in found["`project`, writers"]]
    rows = [
        [writer, *(rounded(f([one[writer] for one in shares])) for f in (np.mean, min, max))] for writer in shares[0]
    ]
    title = "Who writes along the directions: share of the writers' variances"
    tables.append(Table(title=title, columns=["writer", "mean", "least", "most"], rows=rows))
    for table in tables:
        for row in [table["columns"], *table["rows"]]:
            print("  ".join(map(str, row)))
    record("editing", tables)


if __name__ == "__main__":
    main()
