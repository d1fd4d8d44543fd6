"""docs/tools.md: other tools read our files as the page says."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_ray import train_sae
from sae_ray.report.results import Results
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan

PAGE = (Path(__file__).parents[1] / "docs" / "tools.md").read_text(encoding="utf-8")
CELL = "layer1.all-matryoshka_batch_topk-x2-k4"


def examples(heading: str) -> list[str]:
    [section] = [one for one in PAGE.split("\n## ") if one.startswith(heading)]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def run(small_study: Path, plan_small_study: Callable[[Path], StudyPlan], tmp_path: Path, monkeypatch) -> Callable:
    """Runs the examples of a section on the finished small study; returns what they define."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    plan = plan_small_study(small_study)
    heldout, train = plan.passes(CELL)
    folders = {
        "scores-heldout-…": heldout.step.folder,
        "scores-train-…": train.step.folder,
        "manifest-train-…": train.activations.images.step.folder,
        "activations-heldout-…": heldout.activations.step.folder,
        "pictures-…": plan.pictures.step.folder,
    }

    def run(heading: str) -> dict[str, Any]:
        found: dict[str, Any] = {"study": Results(plan), "store": ActivationStore(heldout.activations.step.folder)}
        for example in examples(heading):
            for name, folder in folders.items():
                example = example.replace(f"runs/demo/{name}", folder.path)
            assert "…" not in example
            exec(example, found)
        return found

    return run


def vectors_of(store: ActivationStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    index, token, rows = (np.concatenate(some) for some in zip(*map(store.read, store.parts), strict=True))
    assert rows.dtype == np.float16
    return index, token, rows


def test_duckdb(run: Callable):
    found = run("DuckDB")
    table = found["study"].neurons(CELL).to_pandas()
    ranked = table[table.ms.notna()].sort_values(["ms", "neuron"], ascending=[False, True])
    top = {row["neuron"]: row for row in found["study"].top_images(CELL).to_pylist() if row["rank"] == 0}
    expected = [
        (n, ms, top[n]["activation"], top[n]["image_id"]) for n, ms in zip(ranked.neuron, ranked.ms, strict=True)
    ]
    assert found["best"] == expected[:10]
    index, token, rows = vectors_of(found["store"])
    first = rows[token == token.min()].astype(np.float32)
    unit = first / np.linalg.norm(first, axis=1, keepdims=True)
    cosine = unit @ unit[0]
    place = np.lexsort((index[token == token.min()], -cosine))[:5]
    assert found["close"][0][0] == 0
    np.testing.assert_allclose([value for _, value in found["close"]], cosine[place], rtol=1e-5)


def test_polars(run: Callable):
    found = run("Polars")
    assert np.array_equal(found["vectors"], vectors_of(found["store"])[2])
    ms = found["study"].neurons(CELL)["ms"].to_numpy()
    assert np.array_equal(found["scores"]["ms"].to_numpy(), -np.sort(-ms[~np.isnan(ms)]))


def test_hugging_face_datasets(run: Callable):
    found = run("Hugging Face")
    dataset, (index, _, rows) = found["dataset"], vectors_of(found["store"])
    assert np.array_equal(found["first"].numpy(), rows[0])
    assert dataset.with_format("numpy")["image_index"][:].tolist() == index.tolist()
    quick = {"k": 2, "expansion": 1, "steps": 5, "batch_size": 8, "progress": False}
    sae, expected = train_sae(dataset, column="activation", **quick), train_sae(rows, **quick)
    assert np.array_equal(sae.W_enc.numpy(), expected.W_enc.numpy())
