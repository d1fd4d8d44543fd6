"""What is written for Neuronpedia fits its tables, and says what the study's own tables say."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_ray import import_activations
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.report.neuronpedia import PATCH, write_neuronpedia
from sae_ray.report.neurons import Neurons, read_neurons
from sae_ray.report.pictures import HEAT
from sae_ray.sae import load_sae, save_sae
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember
from tests.sae.test_formats import make_sae
from tests.small_study import finish_score, finish_train

COLUMNS: dict[str, dict[str, Any]] = {
    "features": {
        **{"modelId": str, "layer": str, "index": str, "sourceSetName": str, "creatorId": str, "maxActApprox": float},
        **{"frac_nonzero": float, "freq_hist_data_bar_heights": list, "freq_hist_data_bar_values": list},
        **{"hasVector": bool, "vector": list, "vectorDefaultSteerStrength": float, "hookName": str},
    },
    "activations": {
        **{"id": str, "modelId": str, "layer": str, "index": str, "tokens": list, "values": list, "maxValue": float},
        **{"maxValueTokenIndex": int, "minValue": float, "dataIndex": str, "dataSource": str, "creatorId": str},
    },
    "explanations": {
        **{"id": str, "modelId": str, "layer": str, "index": str, "description": str, "authorId": str, "notes": str},
    },
    "model": {"id": str, "displayNameShort": str, "displayName": str, "creatorId": str, "layers": int,
              "neuronsPerLayer": int, "owner": str, "visibility": str},
    "release": {"name": str, "description": str, "descriptionShort": str, "urls": list, "creatorName": str,
                "creatorId": str, "visibility": str},
    "sourceset": {"modelId": str, "name": str, "description": str, "type": str, "creatorName": str, "urls": list,
                  "releaseName": str, "hasDashboards": bool, "allowInferenceSearch": bool, "creatorId": str,
                  "visibility": str},
    "source": {"id": str, "modelId": str, "setName": str, "dataset": str, "num_prompts": int,
               "num_tokens_in_prompt": int, "creatorId": str, "visibility": str},
}  # fmt: skip
"""Columns of the tables of hijohnnylin/neuronpedia (apps/webapp/prisma/schema.prisma at 008d504) that are written. They
contain all that have no default there."""


def lines(file: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


@pytest.fixture(scope="module")
def plan(
    small_study: Path, plan_small_study: Callable[..., StudyPlan], tmp_path_factory: pytest.TempPathFactory
) -> StudyPlan:
    """Of a copy of the finished study, whose root remembers it."""
    directory = tmp_path_factory.mktemp("copy") / "study"
    shutil.copytree(small_study, directory)
    plan = plan_small_study(directory)
    remember(plan)
    return plan


@pytest.fixture(scope="module")
def cell(plan: StudyPlan) -> Neurons:
    """One with heat maps."""
    heat = plan.pictures.step.folder.read_parquet(HEAT)
    return read_neurons(plan, [heat["cell"][0].as_py()])[0]


@pytest.fixture(scope="module")
def written(cell: Neurons, tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert cell.score.sae is not None
    out = Folder(tmp_path_factory.mktemp("neuronpedia"))
    return Path(write_neuronpedia(cell.score.sae.step.folder, out).path)


def test_rows_fit_the_tables(written: Path):
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    assert files == [
        *(f"{kind}/batch-0.jsonl.gz" for kind in ("activations", "explanations", "features")),
        *(f"{name}.jsonl" for name in ("model", "release", "source", "sourceset")),
    ]
    for file in files:
        columns, rows = COLUMNS[file.split("/")[0].removesuffix(".jsonl")], lines(written / file)
        for row in rows:
            assert {key: type(value) for key, value in row.items()} == columns, file
    ids = [row["id"] for kind in ("activations", "explanations") for row in lines(written / kind / "batch-0.jsonl.gz")]
    assert len(ids) == len(set(ids))
    [source], [of_set], [model] = (lines(written / f"{name}.jsonl") for name in ("source", "sourceset", "model"))
    assert (written.parent.name, written.name) == (model["id"], source["id"])
    layer, _, name = source["id"].partition("-")
    assert (int(layer) < model["layers"], name) == (True, of_set["name"])
    assert all(row["layer"] == source["id"] for row in lines(written / "features" / "batch-0.jsonl.gz"))


def test_features_are_those_of_the_scores(cell: Neurons, written: Path):
    features = lines(written / "features" / "batch-0.jsonl.gz")
    scores = ScoreTables(cell.score.step.folder)
    assert [int(row["index"]) for row in features] == list(range(len(scores.scores.neuron)))
    assert cell.score.sae is not None
    sae = load_sae(cell.score.sae.step.folder)
    for latent, row in enumerate(features):
        np.testing.assert_allclose(row["vector"], sae.W_dec[latent], rtol=1e-5)
        assert len(row["freq_hist_data_bar_values"]) == len(row["freq_hist_data_bar_heights"])
        assert sum(row["freq_hist_data_bar_heights"]) == scores.scores.n_firing[latent]
        bins = np.searchsorted(HISTOGRAM_EDGES, row["freq_hist_data_bar_values"]) - 1
        assert scores.histogram[latent][bins].tolist() == row["freq_hist_data_bar_heights"]


def test_activations_are_the_top_images_with_their_heat_maps(plan: StudyPlan, cell: Neurons, written: Path):
    rows = lines(written / "activations" / "batch-0.jsonl.gz")
    image_ids = cell.pictures.manifest["image_id"].to_pylist()
    heat = {
        (row["latent"], row["rank"]): row["map"]
        for row in plan.pictures.step.folder.read_parquet(HEAT).to_pylist()
        if row["cell"] == cell.name
    }
    assert heat
    grid_rows, columns = plan.encoder.patch_grid
    expected = [(int(latent), int(rank)) for latent, rank in np.argwhere(cell.top_image >= 0)]
    assert len(rows) == len(expected)
    for (latent, rank), row in zip(expected, rows, strict=True):
        image = int(cell.top_image[latent, rank])
        assert (row["index"], row["dataIndex"]) == (str(latent), str(image))
        assert len(row["tokens"]) == len(row["values"])
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        if (latent, rank) in heat:
            text = "".join(row["tokens"])
            assert text == f"{image_ids[image]}\n" + f"{PATCH * columns}\n" * grid_rows
            np.testing.assert_allclose(row["values"][1:], heat[latent, rank], rtol=1e-5)
        else:
            assert row["tokens"] == [image_ids[image]]
            assert row["values"] == pytest.approx([cell.top_activation[latent, rank]], rel=1e-5)


def test_names_are_those_of_the_study(plan: StudyPlan, cell: Neurons, written: Path):
    [naming] = [one for one in plan.namings if one.name == cell.name]
    named = naming.step.folder.read_parquet("names.parquet").to_pylist()
    rows = lines(written / "explanations" / "batch-0.jsonl.gz")
    live = set(cell.order.tolist())
    for one in named:
        if one["name"] is not None and one["neuron"] in live:
            found = [
                row for row in rows if row["index"] == str(one["neuron"]) and row["notes"].startswith(one["method"])
            ]
            assert [row["description"] for row in found] == [one["name"]]


def test_imported_activations_have_no_heat_maps(tmp_path: Path):
    x = np.abs(np.random.default_rng(0).normal(size=(60, 8))).astype(np.float32)
    import_activations(tmp_path / "root", "resid", x, x)
    grid = {"name": "mine", "grid": [{"sites": ["resid"], "expansions": [2], "k": [4]}]}
    plan = StudyPlan(Study.from_dict(grid), Folder(tmp_path / "root"))
    for train in plan.trains:
        finish_train(train)
    for score in plan.scores:
        finish_score(score)
    remember(plan)
    written = Path(write_neuronpedia(plan.trains[0].step.folder, Folder(tmp_path / "out")).path)
    rows = lines(written / "activations" / "batch-0.jsonl.gz")
    assert rows
    assert {len(row["tokens"]) for row in rows} == {1}, "names alone"


def test_what_is_no_sae_of_a_finished_study_is_refused(tmp_path: Path, plan: StudyPlan):
    save_sae(make_sae("topk"), Folder(tmp_path / "sae"))
    with pytest.raises(UsageError, match="does not lie in the root of a study"):
        write_neuronpedia(Folder(tmp_path / "sae"), Folder(tmp_path / "out"))
    (tmp_path / "study.json").write_bytes(plan.root.read_bytes("study.json"))
    with pytest.raises(UsageError, match="is no SAE of the study that"):
        write_neuronpedia(Folder(tmp_path / "sae"), Folder(tmp_path / "out"))
    train = plan.trains[0].step
    save_sae(load_sae(train.folder), Folder(tmp_path / train.name))
    with pytest.raises(SaeRayError, match="is not scored yet; run the score stage first"):
        write_neuronpedia(Folder(tmp_path / train.name), Folder(tmp_path / "out"))
