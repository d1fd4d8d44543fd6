"""docs/formats.md says what the code writes."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae_ray.images.manifest import LABELS_SCHEMA, MANIFEST_SCHEMA
from sae_ray.report.pictures import HEAT_SCHEMA
from sae_ray.scores.tables import HISTOGRAM_SCHEMA, SCORES_SCHEMA, TOP_IMAGES_SCHEMA
from sae_ray.steering.evaluation import ANSWERS_SCHEMA, CONCEPTS_SCHEMA
from sae_ray.store.activations import PARTS_SCHEMA, REJECTS_SCHEMA, ActivationStore
from sae_ray.store.files import Folder
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
        ("`steering-*`", ANSWERS_SCHEMA),
        ("`steering-*`", CONCEPTS_SCHEMA),
        ("`pictures-*`", HEAT_SCHEMA),
    ],
)
def test_every_column_is_named(heading: str, schema: pa.Schema):
    [section] = [one for one in PAGE.split("\n### ") if one.startswith(heading)]
    named = set(re.findall(r"`(\w+)[`\s]", section))
    assert set(schema.names) <= named


def test_the_example_reads_a_store(small_study: Path, plan_small_study, monkeypatch: pytest.MonkeyPatch):
    [example] = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    store = ActivationStore(plan_small_study(small_study).extracts[0].step.folder)
    example = example.replace("runs/demo/activations-train-projection-…", store.folder.path)
    assert os.path.isdir(store.folder.path)
    found: dict = {}
    exec(example, found)
    expected = np.concatenate([store.read(number)[2] for number in store.parts])
    assert np.array_equal(found["vectors"], expected)
    assert isinstance(store.folder, Folder)
