"""docs/formats.md says what the code writes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae_ray.concepts.agreeing import AGREEMENT_SCHEMA
from sae_ray.concepts.best_words import NAMES_SCHEMA
from sae_ray.concepts.tables import CONCEPTS_SCHEMA as CONCEPT_SCORES_SCHEMA
from sae_ray.concepts.tables import CORRELATIONS_SCHEMA, NEURONS_SCHEMA
from sae_ray.editing.effects import EDIT_SCHEMA
from sae_ray.images.manifest import LABELS_SCHEMA, MANIFEST_SCHEMA
from sae_ray.report.pictures import HEAT_SCHEMA
from sae_ray.report.rating import PAIRS_SCHEMA
from sae_ray.sae import load_sae
from sae_ray.scores.tables import HISTOGRAM_SCHEMA, SCORES_SCHEMA, TOP_IMAGES_SCHEMA, ScoreTables
from sae_ray.steering.evaluation import ANSWERS_SCHEMA, CONCEPTS_SCHEMA
from sae_ray.steering.latent_names import LATENT_NAMES_SCHEMA, NAMING_ANSWERS_SCHEMA
from sae_ray.store.activations import PARTS_SCHEMA, REJECTS_SCHEMA, ActivationStore
from sae_ray.store.steps import SCHEMA_VERSIONS, SCRATCH
from sae_ray.study.root import LAYOUT

PAGE = (Path(__file__).parents[1] / "docs" / "formats.md").read_text(encoding="utf-8")


def test_versions_are_those_of_the_code():
    assert {name: int(version) for name, version in re.findall(r"^\| `(\w+)` \| (\d+) \|$", PAGE, re.MULTILINE)} == (
        SCHEMA_VERSIONS
    )
    assert f"`layout` is its version, now {LAYOUT})" in PAGE
    assert all(f"`{name}`" in PAGE for name in SCRATCH)


@pytest.mark.parametrize(
    ("heading", "schema"),
    [
        ("`manifest-*`", MANIFEST_SCHEMA),
        ("`manifest-*`", LABELS_SCHEMA),
        ("`activations-*`", PARTS_SCHEMA),
        ("`activations-*`", REJECTS_SCHEMA),
        ("`scores-*`", SCORES_SCHEMA),
        ("`scores-*`", TOP_IMAGES_SCHEMA),
        ("`scores-*`", HISTOGRAM_SCHEMA),
        ("`concepts-*`", NEURONS_SCHEMA),
        ("`concepts-*`", CONCEPT_SCORES_SCHEMA),
        ("`concepts-*`", CORRELATIONS_SCHEMA),
        ("`concepts-*`", NAMES_SCHEMA),
        ("`steering-*`", ANSWERS_SCHEMA),
        ("`steering-*`", CONCEPTS_SCHEMA),
        ("`naming-*`", LATENT_NAMES_SCHEMA),
        ("`naming-*`", NAMING_ANSWERS_SCHEMA),
        ("`pictures-*`", HEAT_SCHEMA),
        ("`humans-*`", PAIRS_SCHEMA),
        ("`agreement-*`", AGREEMENT_SCHEMA),
        ("`edit.parquet`", EDIT_SCHEMA),
    ],
)
def test_every_column_is_named(heading: str, schema: pa.Schema):
    [section] = [one for one in PAGE.split("\n### ") if one.startswith(heading)]
    named = set(re.findall(r"`(\w+)[`\s]", section))
    assert set(schema.names) <= named


def test_the_examples_read_what_the_code_writes(small_study: Path, plan_small_study):
    plan = plan_small_study(small_study)
    train = next(one for one in plan.trains if one.grid_cell.cell.architecture != "topk")
    [score, _] = plan.passes(train.grid_cell.name)
    store = ActivationStore(train.activations.step.folder)
    folders = {
        "activations-train-projection-…": store.folder,
        "sae-projection-…": train.step.folder,
        "scores-heldout-…": score.step.folder,
    }
    found: dict = {}
    for example in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        for name, folder in folders.items():
            example = example.replace(f"runs/demo/{name}", folder.path)
        assert "…" not in example
        exec(example, found)
    assert np.array_equal(found["vectors"], np.concatenate([store.read(number)[2] for number in store.parts]))
    sae, tables = load_sae(train.step.folder), ScoreTables(score.step.folder)
    assert torch.equal(found["codes"], sae.encode(found["x"]))
    np.testing.assert_array_equal(found["scores"]["ms"].to_numpy(), tables.scores.ms)
    images = tables.top_images.image[0]
    assert found["top"]["image_index"].to_pylist() == images[images >= 0].tolist()
