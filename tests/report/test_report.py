"""The report: what it reads, what it leaves out, and how it comes into its place."""

from __future__ import annotations

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.errors import SaeRayError
from sae_ray.images import decode_image, list_images
from sae_ray.images.rendering import Rendering
from sae_ray.report import album as albums
from sae_ray.report import write_report
from sae_ray.report.album import SIDE, Album, thumbnail_size
from sae_ray.report.heat import HeatCell, HeatMaps, caution, heat_cells, why_none
from sae_ray.report.neighbours import N_NEAREST, nearest_latents
from sae_ray.report.neurons import Neurons, read_neurons, shown_cells
from sae_ray.report.packing import nullable, rounded, write_data
from sae_ray.report.pictures import (
    PicturesJob,
    Shown,
    Sprite,
    finish_pictures,
    make_sprite,
    pictures_job,
    read_heat,
)
from sae_ray.report.plots import (
    POINTS,
    Line,
    Plot,
    curve_plots,
    draw,
    fidelity_plots,
    grid_plots,
    ms_curve,
    training_plots,
)
from sae_ray.report.steering import EXAMPLES, read_steering
from sae_ray.sae import SAE, load_sae
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, hold
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ImagePlan
from sae_ray.study.summary import summarise
from sae_ray.study.survey import SurveyedImages
from tests.report_data import data, unpacked
from tests.small_study import DEAD, HISTORY_STEPS, LABELS, STEERED, make_report

Plan = Callable[..., StudyPlan]
MATRYOSHKA = "layer1.all-matryoshka_batch_topk-x4-k4"


@pytest.fixture(scope="module")
def report(plan: StudyPlan) -> Path:
    """The folder of the report."""
    write_report(plan)
    return Path((plan.root / "report").path)


@pytest.fixture
def copy(small_study: Path, plan_small_study: Plan, tmp_path: Path) -> StudyPlan:
    """The study once more, to be written to."""
    shutil.copytree(small_study, tmp_path / "study")
    shutil.rmtree(tmp_path / "study" / "root" / "report", ignore_errors=True)
    return plan_small_study(tmp_path / "study")


# Neurons


def test_neurons_are_ordered_by_score_where_it_has_support(plan: StudyPlan, plan_small_study: Plan, small_study: Path):
    for cell in read_neurons(plan_small_study(small_study, **{"scoring.min_images": 8})):
        ms, support = cell.columns.ms[cell.order], cell.columns.n_active[cell.order]
        n_supported = int((support >= 8).sum())
        assert (support[:n_supported] >= 8).all()
        for part in (ms[:n_supported], ms[n_supported:]):
            known = part[~np.isnan(part)]
            assert (np.diff(known) <= 0).all()
        silent = set(range(cell.score.neurons)) - set(cell.order.tolist())
        assert all(cell.columns.n_firing[neuron] == 0 for neuron in silent)
        assert (DEAD in silent) == (cell.score.sae is not None)


def test_pictures_come_from_their_own_image_set(plan: StudyPlan, small_study: Path, plan_small_study: Plan):
    heldout = plan_small_study(small_study, **{"scoring.pictures": "heldout", "steering": None, "naming": None})
    for ours, other in zip(read_neurons(plan), read_neurons(heldout), strict=True):
        assert (ours.pictures.name, other.pictures.name) == ("train", "heldout")
        assert np.array_equal(ours.columns.ms, other.columns.ms, equal_nan=True)
        assert not np.array_equal(ours.top_image, other.top_image)
        fires = other.columns.n_firing > 0
        top = other.columns.max_image[fires]
        np.testing.assert_allclose(other.top_activation[fires, 0], top, rtol=1e-6)


# Images


@pytest.fixture
def folders(tmp_path: Path) -> list[ImagePlan]:
    """Two sets of images of one colour each: red tells the set, green the number. Image 2 of the first is none."""
    sets = []
    for red, name in ((50, "train"), (200, "heldout")):
        (tmp_path / name).mkdir()
        for number in range(130):
            path = tmp_path / name / f"{number:03}.png"
            Image.new("RGB", (28, 28), (red, number, 0)).save(path)
        folder, step = Folder(tmp_path / name), Step(Folder(tmp_path), "", "", {})
        sets.append(ImagePlan(name, folder.uri, SurveyedImages.of(list_images(folder)), step, step))
    (tmp_path / "train" / "002.png").write_bytes(b"")
    return sets


def test_an_album_numbers_images_in_the_order_of_need(folders: list[ImagePlan]):
    album = Album(
        folders, [("heldout", np.array([[7, 3, -1]])), ("train", np.array([7])), ("heldout", np.array([3, 9]))]
    )
    assert len(album) == 4
    assert album.numbers("heldout", np.array([7, 3, 9, -1])).tolist() == [0, 1, 3, -1]
    assert album.numbers("train", np.array([[7], [8]])).tolist() == [[2], [-1]]
    assert [(one.name, index) for one, index in map(album.image, range(4))] == [
        ("heldout", 7),
        ("heldout", 3),
        ("train", 7),
        ("heldout", 9),
    ]
    assert album.captions(0) == [["007.png", None], ["003.png", None], ["007.png", None], ["009.png", None]]


def make_sprites(album: Album, folders: list[ImagePlan], encoder: str, step: Path) -> int:
    """Makes thumbnails of 28 x 28 pixels, and returns how many images could not be read."""
    sources = {images.name: images.folder for images in folders}
    job = PicturesJob(Folder(step), encoder, None, "float32", 0, (28, 28), sources, Rendering(), ())
    for number, images in enumerate(album.sprites):
        make_sprite(job, Sprite(number, [(album.image(one)[0].name, album.name(one)) for one in images], []))
    return sum(json.loads(path.read_text())["missing"] for path in (step / "parts").glob("*.json"))


def test_every_thumbnail_is_at_its_place(folders: list[ImagePlan], tiny_clip: str, tmp_path: Path):
    order = np.random.default_rng(0).permutation(130)
    album = Album(folders, [("train", order), ("heldout", order)])
    assert make_sprites(album, folders, tiny_clip, tmp_path) == 1
    assert sorted(path.name for path in (tmp_path / "sprites").iterdir()) == ["0.jpg", "1.jpg", "2.jpg"]
    for number in range(260):
        sprite = Image.open(tmp_path / "sprites" / f"{number // SIDE**2}.jpg")
        place = number % SIDE**2
        pixel = sprite.getpixel((place % SIDE * 28 + 14, place // SIDE * 28 + 14))
        images, index = album.image(number)
        expected = (50 if images.name == "train" else 200, index, 0)
        if (images.name, index) == ("train", 2):
            expected = albums.BLANK
        assert np.abs(np.subtract(pixel, expected)).max() <= 4, (number, pixel, expected)


def test_thumbnails_beyond_the_most_are_left_out(
    folders: list[ImagePlan], tiny_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(albums, "MOST", 101)
    album = Album(folders, [("train", np.arange(130))])
    make_sprites(album, folders, tiny_clip, tmp_path)
    assert album.n_pictured == 101
    assert len(list((tmp_path / "sprites").iterdir())) == 2
    assert album.captions(1)[-1] == ["129.png", None]


@pytest.mark.parametrize(
    ("image_size", "expected"), [((28, 28), (28, 28)), ((336, 336), (112, 112)), ((224, 448), (56, 112))]
)
def test_thumbnails_are_small_and_keep_their_shape(image_size: tuple[int, int], expected: tuple[int, int]):
    assert thumbnail_size(image_size) == expected


# Heat maps and neighbours


def heat_maps(plan: StudyPlan, cells: list[HeatCell], folder: Path, device: str = "cpu") -> dict[str, HeatMaps]:
    step = Step(Folder(folder), "pictures", "pictures", {})
    pictures = replace(plan.pictures, step=step)
    shown = Shown(plan, pictures)
    job, sprites = pictures_job(plan, pictures, shown, cells)
    for sprite in sprites:
        make_sprite(job, sprite, device)
    finish_pictures(pictures, shown.album, 0.0)
    return read_heat(pictures, cells, (plan.study.scoring.top_images, *plan.encoder.patch_grid))


@pytest.mark.parametrize("name", [MATRYOSHKA, "layer0.cls-topk-x2-k4"])
def test_an_sae_whose_latents_never_fire_has_no_heat_maps(plan, cells, name, tmp_path, device):
    [shown] = heat_cells([cells[name]], {})
    found = heat_maps(plan, [replace(shown, latents=())], tmp_path, device)[name]
    assert len(found.latents) == 0


@pytest.mark.parametrize("name", [MATRYOSHKA, "layer0.cls-topk-x2-k4"])
def test_heat_maps_are_the_codes_of_the_patches(
    plan: StudyPlan, cells: dict[str, Neurons], name: str, tmp_path: Path, device: str
):
    cell = cells[name]
    late = int(cell.order[-1])
    found = heat_maps(plan, heat_cells([cell], {name: [late]}), tmp_path, device)[name]
    assert {late, *cell.order[:48].tolist()} == set(found.latents.tolist())

    train = cell.score.sae
    assert train is not None
    encoder = load_encoder(plan.study.encoder.model)
    site = Site("residual", train.grid_cell.site.layer, "all")
    sae = load_sae(train.step.folder)
    near = 1e-4 if device == "cpu" else 1e-3  # float32 in another order; this tower's weights are large
    for row in (0, len(found.latents) - 1):
        latent = found.latents[row]
        for rank, image in enumerate(cell.top_image[latent]):
            if image < 0:
                assert np.isnan(found.maps[row, rank]).all()
                continue
            file = cell.pictures.folder.read_bytes(cell.pictures.manifest["image_id"][int(image)].as_py())
            pixels = torch.tensor(load_preprocess(plan.study.encoder.model)(decode_image(file)))
            tokens = encoder.tap(pixels[None], [site], [""], 0)[site].activation
            expected = sae.encode(tokens)[1:, latent].reshape(4, 4)
            np.testing.assert_allclose(found.maps[row, rank], expected, rtol=near, atol=near)


def test_heat_maps_are_bounded(cells: dict[str, Neurons], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sae_ray.report.heat.MOST", 9)
    found = heat_cells(list(cells.values()), {})
    assert {one.name: len(one.latents) for one in found} == dict.fromkeys(
        ["layer1.all-matryoshka_batch_topk-x2-k4", MATRYOSHKA, "layer0.cls-topk-x2-k4"], 3
    )


def test_what_heat_maps_mean_is_said(cells: dict[str, Neurons]):
    assert why_none(cells[MATRYOSHKA]) is None
    assert caution(cells[MATRYOSHKA]) is None
    assert "trained on CLS tokens only" in str(caution(cells["layer0.cls-topk-x2-k4"]))
    assert "one vector per image" in str(why_none(cells["pooled-batch_topk-x2-k2"]))
    assert "raw neurons" in str(why_none(cells["raw-pooled"]))


def test_neighbours_are_the_nearest_decoder_rows(monkeypatch: pytest.MonkeyPatch, device: str):
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.randn(30, 6, generator=generator) * torch.rand(30, 1, generator=generator)
    sae = SAE("relu", W_dec.T.clone(), W_dec, torch.zeros(30), torch.zeros(6))
    among = np.array([n for n in range(30) if n % 5])
    monkeypatch.setattr("sae_ray.report.neighbours.ENTRIES", 2 * len(among))  # several blocks
    near, cosine = nearest_latents(sae, among[:7], among)
    unit = W_dec / W_dec.norm(dim=1, keepdim=True)
    for latent, mine, values in zip(among[:7], near, cosine, strict=True):
        others = [n for n in among if n != latent]
        expected = sorted(others, key=lambda n: -float(unit[n] @ unit[latent]))[:N_NEAREST]
        assert mine.tolist() == expected
        np.testing.assert_allclose(values, [float(unit[n] @ unit[latent]) for n in expected], rtol=1e-5)


def test_few_latents_have_few_neighbours():
    sae = SAE("relu", torch.eye(3), torch.eye(3), torch.zeros(3), torch.zeros(3))
    near, _ = nearest_latents(sae, np.array([0, 2]), np.array([0, 2]))
    assert near.tolist() == [[2], [0]]


# Plots


@given(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=3 * POINTS))
def test_an_ms_curve_falls_from_the_best_to_the_worst(scores: list[float]):
    x, y = ms_curve(np.array(scores))
    assert len(x) == len(y) == min(len(scores), POINTS)
    assert (y[0], y[-1]) == (max(scores), min(scores))
    assert (np.diff(y) <= 0).all()
    assert x[0] == 0
    assert len(scores) == 1 or x[-1] == 1
    assert (np.diff(x) > 0).all()


def test_plots_hold_the_numbers_of_the_summary(plan: StudyPlan, cells: dict[str, Neurons]):
    rows = {row.name: row for row in summarise(plan)}
    plots = {plot.title: plot for plot in grid_plots(list(rows.values()))}
    lines = {line.name: (line.x, line.y) for line in plots["mean MS"].lines}
    names = [f"layer1.all-matryoshka_batch_topk-x{expansion}-k4" for expansion in (2, 4)]
    family = "layer1.all, matryoshka_batch_topk, K\u00a0=\u00a04"
    assert lines[family] == ([2.0, 4.0], [rows[name].mean_ms for name in names])
    assert "pooled, batch_topk, K\u00a0=\u00a02" in lines

    [fidelity] = fidelity_plots(list(rows.values()))
    pooled = sorted((rows[name].l0, rows[name].r2) for name in ("pooled-batch_topk-x2-k2", "pooled-batch_topk-x2-k4"))
    assert [list(zip(line.x, line.y, strict=True)) for line in fidelity.lines if "pooled" in line.name] == [pooled]

    curves = {plot.title: plot for plot in curve_plots(list(cells.values()), min_images=2)}
    by_width = curves["matryoshka_batch_topk on layer1.all, K\u00a0=\u00a04"]
    assert [(line.name, line.dashed) for line in by_width.lines] == [
        ("×2", False),
        ("×4", False),
        ("raw neurons", True),
    ]
    by_sparsity = curves["batch_topk on pooled, ×2"]
    assert [line.name for line in by_sparsity.lines] == ["K\u00a0=\u00a02", "K\u00a0=\u00a04", "raw neurons"]


def test_training_is_drawn_where_its_history_is_known(plan: StudyPlan):
    plots = {plot.title: plot for plot in training_plots(plan.trains)}
    pooled = [f"batch_topk on pooled, K\u00a0=\u00a0{k}" for k in (2, 4)]
    groups = ["matryoshka_batch_topk on layer1.all, K\u00a0=\u00a04", *pooled]
    assert set(plots) == {f"{name}: {group}" for name in ("loss", "dead latents (share)") for group in groups}
    loss, dead = (plots[f"{name}: {groups[0]}"] for name in ("loss", "dead latents (share)"))
    assert [line.name for line in loss.lines] == ["×2", "×4"]
    for line in loss.lines:
        assert len(line.x) == POINTS
        assert (line.x[0], line.x[-1]) == (0, HISTORY_STEPS - 1)
        assert line.y == pytest.approx([1 / (step + 1) for step in line.x])
    assert [sorted(set(line.y)) for line in dead.lines] == [[0, 0.25], [0, 0.25]]
    assert "<svg" in draw(loss)


def test_seeds_are_one_line_or_curves_of_their_own(plan: StudyPlan, cells: dict[str, Neurons]):
    saes = {row.name: row for row in summarise(plan) if row.grid_cell is not None}
    again = {name: replace(row, grid_cell=replace(row.grid_cell, seed=1), r2=0.5) for name, row in saes.items()}
    rows = [*saes.values(), *again.values()]
    family = "layer1.all, matryoshka_batch_topk, K\u00a0=\u00a04"
    mean_ms, r2 = (
        next(line for plot in grid_plots(rows) if plot.title == title for line in plot.lines if line.name == family)
        for title in ("mean MS", "R²")
    )
    members = [saes[f"layer1.all-matryoshka_batch_topk-x{expansion}-k4"] for expansion in (2, 4)]
    assert (mean_ms.x, mean_ms.y) == ([2.0, 4.0], [row.mean_ms for row in members])
    assert mean_ms.band == (mean_ms.y, mean_ms.y)
    assert r2.y == pytest.approx([(row.r2 + 0.5) / 2 for row in members])
    assert r2.band == ([min(row.r2, 0.5) for row in members], [max(row.r2, 0.5) for row in members])
    assert all(line.band is None for plot in grid_plots(list(saes.values())) for line in plot.lines)
    [fidelity] = fidelity_plots(rows)
    [pooled] = [line for line in fidelity.lines if line.name.startswith("pooled")]
    halves = {(row.l0 + row.l0) / 2: (row.r2 + 0.5) / 2 for name, row in saes.items() if name.startswith("pooled")}
    assert dict(zip(pooled.x, pooled.y, strict=True)) == pytest.approx(halves)

    def of_seed_1(cell: Neurons) -> Neurons:
        train = cell.score.sae
        assert train is not None
        return replace(cell, score=replace(cell.score, sae=replace(train, grid_cell=replace(train.grid_cell, seed=1))))

    of_0 = [cell for cell in cells.values() if cell.score.sae is not None]
    one, both = (curve_plots(shown, min_images=2) for shown in (of_0, [*of_0, *map(of_seed_1, of_0)]))
    assert [(plot.title, plot.lines) for plot in both if not plot.title.endswith("seed 1")] == [
        (plot.title, plot.lines) for plot in one
    ]
    assert {plot.title for plot in both} == {f"{plot.title}{seed}" for plot in one for seed in ("", ", seed 1")}


def test_families_that_are_more_than_colours_have_plots_of_their_site(plan: StudyPlan):
    rows = [row for row in summarise(plan) if row.grid_cell is not None]
    many = []
    for goal, row in product((0.0, 0.1, 0.2, 0.3, 0.4), rows):
        cell = replace(row.grid_cell.cell, monosemanticity=goal)
        many.append(replace(row, grid_cell=replace(row.grid_cell, cell=cell)))
    sites = list(dict.fromkeys(row.site for row in rows))
    for plots, label in ((grid_plots(many), "mean MS"), (fidelity_plots(many), "R² against L0")):
        assert {plot.group for plot in plots} == set(sites)
        shown = {plot.title for plot in plots if plot.title.startswith(f"{label} on")}
        assert shown == {f"{label} on {site}" for site in sites}
        names = {line.name for plot in plots for line in plot.lines}
        assert not any(site in name for name in names for site in sites), "the title says it"
        assert any("MS goal 0.3" in name for name in names)
    assert {plot.group for plot in grid_plots(rows)} == {""}


def test_where_no_neuron_is_scored_there_is_no_curve(cells: dict[str, Neurons]):
    assert curve_plots(list(cells.values()), min_images=10**6) == []


def test_plots_can_stand_on_one_page():
    plots = [Plot(title, "x", "y") for title in ("one", "two")]
    for plot in plots:
        plot.lines.append(Line(plot.title, [1.0, 2.0], [0.5, 0.25]))
    drawn = [draw(plot) for plot in plots]
    ids = [found for svg in drawn for found in re.findall(r'\bid="(.*?)"', svg)]
    assert ids
    assert len(ids) == len(set(ids))
    for svg in drawn:
        ElementTree.fromstring(svg)
        assert "<style" not in svg
        assert "currentColor" in svg
    assert draw(plots[0]) == drawn[0], "the same plot is the same text"


# The whole


def test_data_say_what_the_tables_say(report: Path, cells: dict[str, Neurons]):
    sprites = len(list((report / "data" / "images").iterdir()))
    captions = [caption for sprite in range(sprites) for caption in data(report, f"images/{sprite}")]
    for name, cell in cells.items():
        index = data(report, f"{name}/index")
        order = unpacked(index["neuron"], "<i4")
        assert order.tolist() == cell.order.tolist()
        np.testing.assert_array_equal(unpacked(index["ms"], "<f4"), cell.columns.ms[order].astype("f4"))
        np.testing.assert_array_equal(unpacked(index["support"], "<i4"), cell.columns.n_active[order])

        chunk = data(report, f"{name}/0")
        captions = [
            one
            for sprite in range(len(list((report / "data" / "images").iterdir())))
            for one in data(report, f"images/{sprite}")
        ]
        columns = cell.pictures.manifest["image_id"], cell.pictures.labels["label_name"]
        for place, neuron in enumerate(order[:20]):
            images = [image for image in cell.top_image[neuron] if image >= 0]
            shown = [captions[number] for number in chunk["images"][place]]
            assert shown == [[column[int(i)].as_py() for column in columns] for i in images]
            np.testing.assert_allclose(
                chunk["activations"][place], cell.top_activation[neuron][: len(images)], rtol=1e-3
            )
            counts = cell.histogram[neuron]
            if counts.any():
                first, *rest = chunk["histogram"][place]
                assert rest == counts[first : first + len(rest)].tolist()
                assert sum(rest) == cell.columns.n_firing[neuron]
                assert HISTOGRAM_EDGES[first] <= cell.columns.max_image[neuron]
        assert (report / "data" / name / "heat.js").exists() == (why_none(cell) is None)


def test_heat_maps_reach_the_page(report: Path, plan: StudyPlan, cells: dict[str, Neurons], tmp_path: Path):
    heat = data(report, f"{MATRYOSHKA}/heat")
    assert (heat["rows"], heat["columns"]) == (4, 4)
    expected = heat_maps(plan, heat_cells([cells[MATRYOSHKA]], {}), tmp_path)[MATRYOSHKA]
    latent = expected.latents[0]
    shown = heat["latents"][str(latent)]
    maps = np.stack([unpacked(one, "u1").reshape(4, 4) for one in shown["maps"] if one])
    kept = expected.maps[0][: len(maps)]
    np.testing.assert_allclose(maps / 255 * shown["max"], kept, atol=shown["max"] / 250)
    assert maps.max() == 255
    best_of_steering = set(STEERED[: len(LABELS)])
    assert best_of_steering <= set(map(int, heat["latents"]))


def test_answers_reach_the_page(report: Path, plan: StudyPlan):
    steering = data(report, f"{MATRYOSHKA}/steering")
    groups = {group["kind"]: group for group in steering["examples"][str(STEERED[0])]}
    [white] = groups["white"]["images"]
    assert white == {
        "image": -1,
        "answers": [{"prompt": plan.study.steering.prompt, "before": "nothing", "after": LABELS[0], "right": True}],
    }
    heldout = plan.images["heldout"].labels["label_name"].to_pylist()
    others = [index for index, label in enumerate(heldout) if label != LABELS[0]]
    assert (groups["insertion"]["right"], groups["insertion"]["n"]) == (sum(i % 2 == 0 for i in others), len(others))
    assert len(groups["insertion"]["images"]) == EXAMPLES
    assert all(len(one["answers"]) == 2 for one in groups["insertion"]["images"])
    page = (report / "index.html").read_text()
    results = read_steering(plan)
    assert len(results) == 2
    counts = results[0].counts["kinds"]["insertion"]
    assert f"{counts['right']:,} of {counts['asked']:,}" in page


def test_the_page_is_whole_and_needs_no_network(report: Path, plan: StudyPlan):
    text = "".join(path.read_text() for path in report.rglob("*") if path.suffix in (".html", ".css", ".js"))
    assert set(re.findall(r"https?://[^/]*", text)) <= {"http://www.w3.org"}, "only names of XML namespaces"
    page = (report / "index.html").read_text()
    assert "small &lt;study&gt;" in page
    assert "<study>" not in page
    assert LABELS[2] not in page, "names are escaped"
    for row in summarise(plan):
        assert row.name in page
    assert "not an image" in page
    assert "1 min 02 s" in page, "time per step"
    assert "red/broken.png" in page
    ids = re.findall(r'\bid="(.*?)"', page)
    assert len(ids) == len(set(ids))


def test_a_report_is_made_once(copy: StudyPlan):
    assert write_report(copy)
    place = Path((copy.root / "report").path)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert not write_report(copy)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*")} == before


def test_what_is_missing_is_said(copy: StudyPlan, plan_small_study: Plan):
    assert write_report(copy)
    score = next(score for score in copy.scores if score.name == MATRYOSHKA and score.embeddings is not None)
    failed = next(train for train in copy.trains if train.grid_cell.name == "pooled-batch_topk-x2-k4")
    for step in [score.step, failed.step, *(one.step for one in copy.scores if one.sae is failed)]:
        shutil.rmtree(step.folder.path)
    failed.step.finish(1.0, {}, "failed", "step 7: the loss is nan")
    assert make_report(copy), "another state is another report"
    page = (Path((copy.root / "report").path) / "index.html").read_text()
    assert re.search(r"3 of \d+ steps are not done", page)
    assert score.step.label in page
    assert "pooled-batch_topk-x2-k4 failed: step 7: the loss is nan" in page
    assert not (Path((copy.root / "report").path) / "data" / MATRYOSHKA).exists()


def test_a_report_does_not_wait_for_steering(copy: StudyPlan):
    assert copy.pictures_of(shown_cells(copy)).step.name == copy.pictures.step.name
    for one in copy.steerings:
        shutil.rmtree(one.step.folder.path)
    assert copy.pictures_of(shown_cells(copy)).step.name != copy.pictures.step.name
    assert make_report(copy)
    page = (Path((copy.root / "report").path) / "index.html").read_text()
    assert f"{len(copy.steerings)} of {len(list(copy.steps))} steps are not done" in page


def test_a_study_that_has_not_begun_has_a_report(plan_small_study: Plan, tmp_path: Path):
    plan = plan_small_study(tmp_path / "study")
    assert write_report(plan)
    page = (tmp_path / "study" / "root" / "report" / "index.html").read_text()
    assert "Nothing has been scored yet" in page
    assert "steps are not done" in page


def test_images_that_are_gone_are_said(copy: StudyPlan, tmp_path: Path):
    shutil.rmtree(tmp_path / "study" / "train" / "green")
    shutil.rmtree(copy.pictures.step.folder.path)
    assert make_report(copy)
    report = Path((copy.root / "report").path)
    captions = data(report, "images/0")
    n_gone = sum(image_id.startswith("green/") for image_id, _ in captions)
    said = re.search(r"(\d+) images can no longer be read", (report / "index.html").read_text())
    assert said is not None
    assert 0 < int(said[1]) <= n_gone  # the held-out ones of that name are still there


def test_an_interrupted_report_leaves_the_old_one(copy: StudyPlan, monkeypatch: pytest.MonkeyPatch):
    assert write_report(copy)
    place = Path((copy.root / "report").path)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    shutil.rmtree(copy.scores[0].step.folder.path)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sae_ray.report.write.render", interrupted)
        with pytest.raises(KeyboardInterrupt):
            make_report(copy)
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert [path.name for path in Path(copy.root.path).glob("report*")] == ["report"]
    assert make_report(copy)


def test_what_a_killed_run_left_is_not_in_the_way(copy: StudyPlan):
    assert write_report(copy)
    left = Step(copy.root, "report", "report", {}).folder
    for name in ("old/index.html", "new/index.html"):
        left.write_bytes(name, b"left")
    shutil.rmtree(copy.scores[0].step.folder.path)
    assert make_report(copy)
    assert [path.name for path in Path(copy.root.path).glob("report*")] == ["report"]


def test_two_drivers_do_not_make_one_report(copy: StudyPlan):
    with hold([Step(copy.root, "report", "report", {})]), pytest.raises(SaeRayError, match="is being written"):
        write_report(copy)
    assert not (copy.root / "report").exists()


def test_a_report_is_uploaded_where_nothing_can_be_renamed(copy: StudyPlan, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(copy.root, "is_local", False)
    monkeypatch.setattr(Folder, "is_local", False, raising=False)
    assert write_report(copy)
    place = Path((copy.root / "report").path)
    pages = {"index.html", "concepts.html", "report.css", "concepts.css"}
    files = {*pages, *(f"{name}.js" for name in ("theme", "common", "gallery", "views", "report", "concepts"))}
    assert {*files, "report.json", "data", "sprites"} == {path.name for path in place.iterdir()}
    assert not write_report(copy)


@given(st.lists(st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6), max_size=5))
def test_rounding_keeps_four_digits(values: list[float]):
    assert rounded(np.array(values)) == [pytest.approx(float(f"{value:.4g}"), rel=2e-4) for value in values]


def test_what_is_not_finite_is_missing(tmp_path: Path):
    found = nullable(np.array([[1.5, np.nan], [np.inf, -np.inf]]))
    assert found == [[1.5, None], [None, None]]
    write_data(tmp_path, "one", found)
    assert nullable(np.array([3, -1])) == [3, None]
