"""Results as tables, and neurons as notebooks show them."""

from __future__ import annotations

import base64
import re
import shutil
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from sae_ray import import_activations, open_study
from sae_ray.errors import UsageError
from sae_ray.report.cards import HOT, heated
from sae_ray.report.neurons import read_neurons
from sae_ray.report.results import Results
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember
from sae_ray.study.summary import summarise
from tests.small_study import STEERED, finish_score, finish_train

CELL = "layer1.all-matryoshka_batch_topk-x2-k4"


@pytest.fixture(scope="module")
def results(small_study: Path, plan_small_study: Callable[[Path], StudyPlan], tmp_path_factory) -> Results:
    copy = shutil.copytree(small_study, tmp_path_factory.mktemp("results") / "study")
    remember(plan_small_study(copy))
    return open_study(copy / "root")


def test_a_row_per_cell(results: Results):
    scores, fidelity = results.scores(), results.fidelity()
    rows = summarise(results.plan)
    assert scores["cell"].to_pylist() == [row.name for row in rows] == results.cells
    assert scores["mean_ms"].to_pylist() == [row.mean_ms for row in rows]
    settings = {row["cell"]: (row["architecture"], row["expansion"], row["k"]) for row in scores.to_pylist()}
    assert settings[CELL] == ("matryoshka_batch_topk", 2.0, 4)
    assert settings["raw-pooled"] == (None, None, None)
    assert set(fidelity["cell"].to_pylist()) == {row.name for row in rows if row.grid_cell}
    assert fidelity.to_pandas().set_index("cell").loc[CELL, "r2"] == pytest.approx(0.54)


def test_a_row_per_neuron(results: Results):
    table = results.neurons(CELL)
    [cell] = read_neurons(results.plan, {CELL})
    assert table["neuron"].to_pylist() == list(range(cell.score.neurons))
    assert np.array_equal(table["ms"].to_numpy(), cell.columns.ms, equal_nan=True)
    purity, label = table["purity"].to_numpy(), table["label"].to_pylist()
    assert np.array_equal(purity, cell.purity)
    labels = results.plan.images["train"].labels.to_pylist()
    named = {row["label"]: row["label_name"] for row in labels} | {-1: None}
    assert label == [named[number] for number in cell.label.tolist()]
    assert (table["name_method"][STEERED[0]].as_py(), table["name_score"][STEERED[0]].as_py()) == ("vlm", 0.9)
    assert {"rho", "coherence", "stability"} <= set(table.column_names)  # of the stage of concepts
    assert results.best(3, CELL) == cell.order[:3].tolist()
    assert pl.from_arrow(table).height == cell.score.neurons


def test_a_row_per_top_image(results: Results):
    whole = results.top_images(CELL)
    some = results.top_images(CELL, [7, 3])
    assert some["neuron"].unique().to_pylist() == [7, 3]
    assert results.top_images(CELL, 7).equals(results.top_images(CELL, [7]))
    assert (
        some.slice(0, 3).to_pylist() == whole.filter(pa.array(whole["neuron"].to_numpy() == 7)).slice(0, 3).to_pylist()
    )
    tables = ScoreTables(results.plan.passes(CELL)[1].step.folder)
    manifest = results.plan.images["train"].manifest["image_id"].to_pylist()
    first = some.to_pylist()[0]
    assert first["image_id"] == manifest[tables.top_images.image[7, 0]]
    assert first["image_id"].startswith(f"{first['label']}/")  # its folder
    assert first["activation"] == tables.top_images.activation[7, 0] == whole["activation"].filter(
        pa.array(whole["neuron"].to_numpy() == 7)
    ).to_numpy().max()  # fmt: skip


def pictures_of(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', html)
    return [np.asarray(Image.open(BytesIO(base64.b64decode(one)))) for one in found]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as opened:
        return np.asarray(opened.convert("RGB"), float)


def test_a_neuron_shows_its_images_and_where_it_fires(results: Results):
    latent = results.best(1, CELL)[0]
    card = results.neuron(latent, CELL)
    images = card.images
    expected = results.top_images(CELL, [latent])["image_id"].to_pylist()
    assert [one.image_id for one in images] == expected
    assert {one.heat.shape for one in images if one.heat is not None} == {results.plan.encoder.patch_grid}
    html = card._repr_html_()
    assert f"neuron {latent}" in html
    shown = pictures_of(html)
    assert len(shown) == 2 * len(images)  # each as it is, and with where it fires
    folder = Path(results.plan.images["train"].path)
    every = {str(path.relative_to(folder)): pixels(path) for path in folder.glob("*/[0-9]*.png")}
    for one, plain in zip(images, shown[::2], strict=True):
        assert min(every, key=lambda name: np.abs(every[name] - plain).sum()) == one.image_id
    assert "&lt;b&gt;&amp;blue" in "".join(results.neuron(one, CELL)._repr_html_() for one in range(8))
    assert "<b>&blue" not in html


def test_heat_colours_the_patches_that_fire():
    grey = np.full((4, 6, 3), 100, np.uint8)
    shown = heated(grey, np.array([[0.0, 1.0], [0.5, 0.0]]))
    assert (shown[:2, :3] == 100).all()
    assert (shown[:2, 3:] == np.rint(25 + 0.75 * np.array(HOT))).all()
    assert (shown[2:, :3] == np.rint(62.5 + 0.375 * np.array(HOT))).all()


def test_neurons_of_vectors_have_no_pictures(results: Results):
    card = results.neuron(0, "raw-pooled")
    assert all(one.thumbnail is not None and one.heat is None for one in card.images)
    assert len(pictures_of(card._repr_html_())) == len(card.images)


def test_imported_activations_have_tables(tmp_path: Path):
    x = np.abs(np.random.default_rng(0).normal(size=(200, 6)))
    import_activations(tmp_path, "resid", x, images={"image_id": [f"<{row}>" for row in range(200)]}, judge=x)
    study = Study.from_dict({"name": "mine", "grid": [{"sites": ["resid"], "expansions": [2], "k": [3]}]})
    plan = StudyPlan(study, Folder(tmp_path))
    finish_train(plan.trains[0])
    for score in plan.scores:
        finish_score(score)
    remember(plan)
    opened = open_study(tmp_path)
    assert opened.neurons().num_rows == 12  # of the only SAE
    card = opened.neuron(opened.best(1)[0])
    assert card.images[0].thumbnail is None
    assert "&lt;" in card._repr_html_()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda results: results.neurons(), "cell = None: choose one of those that are scored: raw-layer1.all, "),
        (lambda results: results.neurons("x"), "cell = 'x': choose one"),
        (lambda results: results.neuron(999, CELL), f"neuron = 999: {CELL} has neurons 0 to"),
        (lambda results: results.top_images(CELL, [-1]), "neuron = -1"),
        (lambda results: results.top_images(CELL, [1.5]), "neuron = 1.5"),
        (lambda results: results.neuron("7", CELL), "neuron = '7'"),
    ],
)
def test_what_is_not_there_is_named(results: Results, ask: Callable, message: str):
    with pytest.raises(UsageError, match=message):
        ask(results)


def test_the_pages_example_runs(results: Results):
    page = (Path(__file__).parents[2] / "docs" / "notebooks.md").read_text(encoding="utf-8")
    [example] = [one for one in re.findall(r"```py\n(.*?)```", page, re.DOTALL) if "open_study" in one]
    scope: dict = {}
    exec(example.replace("runs/demo", str(results.plan.root)), scope)
    assert scope["study"].cells == results.cells


def test_a_root_without_a_study_is_refused(tmp_path: Path):
    with pytest.raises(UsageError, match=r"has no study.json"):
        open_study(tmp_path)
