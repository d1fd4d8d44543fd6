"""The page on which people compare neurons, and scores against their answers, by the command line."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from sae_ray.jobs.cli import main

from sae_ray.concepts.agreeing import AGREEMENT_SCHEMA, EDGES, agreement, bin_of
from sae_ray.encoders import load_preprocess
from sae_ray.images import decode_image
from sae_ray.scores.tables import ScoreTables
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember
from tests.human_benchmark import write_benchmark

Plan = Callable[..., StudyPlan]
CELL = "layer1.all-matryoshka_batch_topk-x4-k4"
SPARSE = "pooled-batch_topk-x2-k2"


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def study(small_study: Path, plan_small_study: Plan, tmp_path: Path) -> StudyPlan:
    """Of a root that remembers it, to be written to."""
    shutil.copytree(small_study, tmp_path / "study")
    plan = plan_small_study(tmp_path / "study")
    remember(plan)
    return plan


def made(plan: StudyPlan, *options: object) -> Path:
    result = call("humans", "make", "--root", plan.root.path, "--sae", CELL, *options)
    assert result.exit_code == 0, result.output
    return Path(result.stdout.splitlines()[-1])


def facts_of(index: Path) -> dict:
    found = re.search(r'<script id="facts" type="application/json">(.*?)</script>', index.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_the_page_shows_the_16_top_images_of_every_neuron_and_no_scores(study: StudyPlan):
    index = made(study, "--pairs", 12)
    facts = facts_of(index)
    assert set(facts) == {"page", "side", "width", "height", "pairs"}
    assert len(facts["pairs"]) == 12
    score, _ = study.passes(CELL)
    tables = ScoreTables(score.step.folder)
    preprocess = load_preprocess(study.encoder.model, study.encoder.revision)
    for neuron in {neuron for pair in facts["pairs"] for neuron in pair}:
        assert not np.isnan(tables.scores.ms[neuron])
        top = tables.top_images.image[neuron]
        assert (top[:16] >= 0).all()
        shown = np.asarray(Image.open(index.parent / "neurons" / f"{neuron}.jpg"), int)
        assert shown.shape == (4 * 28, 4 * 28, 3)
        for place, image in enumerate(top[:16].tolist()):
            images = score.activations.images
            data = images.folder.read_bytes(images.manifest["image_id"][image].as_py())
            expected = preprocess(decode_image(data)).transpose(1, 2, 0).astype(int)
            row, column = divmod(place, 4)
            found = shown[28 * row : 28 * row + 28, 28 * column : 28 * column + 28]
            assert np.abs(found - expected).mean() < 12
    step = index.parent.parent
    assert step.name == facts["page"]
    record = json.loads((step / "step.json").read_text())
    n_neurons = len(list((index.parent / "neurons").iterdir()))
    assert record["counts"] == {"pairs": 12, "neurons": n_neurons, "missing": 0}
    assert sorted(path.name for path in index.parent.iterdir()) == [
        *("index.html", "neurons", "rating.css", "rating.js", "report.css"),
    ]


def test_a_page_that_is_there_stays_and_other_settings_make_another(study: StudyPlan):
    index = made(study, "--pairs", 3)
    before = {path: path.stat().st_mtime_ns for path in index.parent.parent.rglob("*") if path.is_file()}
    assert made(study, "--pairs", 3) == index
    assert {path: path.stat().st_mtime_ns for path in index.parent.parent.rglob("*") if path.is_file()} == before
    assert made(study, "--pairs", 4) != index
    reseeded = call("humans", "make", "--root", study.root.path, "--sae", CELL, "--pairs", 3, "--set", "seed=1")
    assert reseeded.exit_code == 1, "other seeds train other SAEs, which are not there"


def test_fewer_pairs_than_asked_are_told_of_and_images_that_are_gone_are_grey(study: StudyPlan):
    score, _ = study.passes(CELL)
    images = score.activations.images
    top = ScoreTables(score.step.folder).top_images.image
    for image in range(images.n_images):
        (Path(images.folder.path) / images.manifest["image_id"][image].as_py()).write_bytes(b"")
    result = call("humans", "make", "--root", study.root.path, "--sae", CELL, "--pairs", 5000)
    assert result.exit_code == 0, result.output
    full = (top[:, 15] >= 0) & ~np.isnan(ScoreTables(score.step.folder).scores.ms)
    n = int(full.sum())
    index = Path(result.stdout.splitlines()[-1])
    assert len(facts_of(index)["pairs"]) == min(5000, n * (n - 1) // 2)
    assert f"{16 * n:,} images can no longer be read" in result.stderr
    picture = np.asarray(Image.open(next((index.parent / "neurons").iterdir())))
    assert np.abs(picture.astype(int) - 128).max() <= 2


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--pairs", 0), 2, "--pairs = 0: choose a number from 1 to 5,000"),
        (("--pairs", 5001), 2, "--pairs = 5001"),
        (("--sae", "nonsense"), 2, "--sae is 'nonsense'"),
        (("--set", "scoring.top_images=15"), 2, "scoring.top_images = 15: people compare 16 images"),
        (("--set", "scoring.top_images=17"), 1, "run the score stage first"),
    ],
)
def test_what_cannot_be_made_is_refused(study: StudyPlan, options, code: int, words: str):
    result = call("humans", "make", "--root", study.root.path, "--sae", CELL, *options)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert words in result.stderr
    assert not list(Path(study.root.path).glob("humans-*"))


def test_neurons_with_too_few_images_are_refused(study: StudyPlan):
    result = call("humans", "make", "--root", study.root.path, "--sae", SPARSE)
    tables = ScoreTables(study.passes(SPARSE)[0].step.folder)
    n = int(((tables.top_images.image >= 0).sum(axis=1) >= 16).sum())
    assert n < 2, "the small study has changed"
    assert result.exit_code == 1
    assert f"{SPARSE} has {n} neurons with an MS and 16 top images" in result.stderr


# Scores against the answers


def answers(index: Path, rater: str, choose: Callable[[int, int], int], pairs: range | None = None) -> Path:
    """The file that a rater downloads who chooses between two neurons by a rule."""
    facts = facts_of(index)
    path = index.parents[3] / f"{rater}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["page", "rater", "pair", "left", "right", "choice"])
        for pair in pairs or range(len(facts["pairs"])):
            left, right = facts["pairs"][pair][:: 1 if pair % 2 else -1]
            rows.writerow([facts["page"], rater, pair, left, right, choose(left, right)])
    return path


@pytest.fixture
def index(study: StudyPlan) -> Path:
    return made(study, "--pairs", 40)


@pytest.fixture
def tables(study: StudyPlan) -> ScoreTables:
    return ScoreTables(study.passes(CELL)[0].step.folder)


def compared(study: StudyPlan, *arguments: object) -> dict:
    result = call("humans", "score", "--root", study.root.path, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def rule(values: np.ndarray) -> Callable[[int, int], int]:
    return lambda left, right: left if values[left] > values[right] else right


def test_raters_who_choose_by_a_score_agree_with_it(study: StudyPlan, index: Path, tables: ScoreTables):
    by_ms = [answers(index, rater, rule(tables.scores.ms)) for rater in ("Ann", "Ben")]
    against = answers(index, "Cem", rule(-tables.scores.ms), range(10))
    found = compared(study, *by_ms, against)
    assert (found["headline"], found["pooled"], found["pairs"]) == (1.0, 1.0, 40)
    assert (found["raters"], found["unanswered"], found["divided"]) == (["Ann", "Ben", "Cem"], 0, 0)
    assert found["same_answers"] == pytest.approx((10 + 30) / (30 + 30))
    table = pq.read_table(found["file"])
    assert table.schema.remove_metadata() == AGREEMENT_SCHEMA
    n = len(EDGES)
    apart = np.array([abs(np.subtract(*tables.scores.ms[pair])) for pair in facts_of(index)["pairs"]])
    assert table["n_pairs"].to_pylist() == np.bincount(bin_of(apart, EDGES), minlength=n).tolist()

    divided = compared(study, by_ms[0], against)
    assert (divided["divided"], divided["pooled"]) == (10, pytest.approx(35 / 40))
    assert divided["file"] != found["file"], "other answers, another step"
    text = call("humans", "score", "--root", study.root.path, by_ms[0], against).stdout
    assert f"Agreement of people and ms, {CELL}" in text
    assert "87.5%  all 40 pairs, interval 73.9% – 94.5%" in text
    assert "10 pairs count half, since people are divided." in text
    assert "Two raters gave the same answer in 0.0% of cases; Krippendorff's alpha is -" in text


def test_any_score_is_compared_by_its_name_or_from_a_table(study: StudyPlan, index: Path, tables: ScoreTables):
    file = answers(index, "Ann", rule(tables.scores.frequency), range(5, 40))
    by_name = compared(study, file, "--score", "frequency")
    equal = sum(np.ptp(tables.scores.frequency[pair]) == 0 for pair in facts_of(index)["pairs"][5:])
    assert by_name["pooled"] == pytest.approx((35 - equal / 2) / 35)
    assert by_name["unanswered"] == 5
    assert max(one["pairs"] for one in by_name["bins"]) < 20, "bins hold about equally many pairs"
    path = f"{tables.folder.path}/scores.parquet"
    from_table = compared(study, file, "--score", f"{path}:frequency")
    assert from_table["bins"] == by_name["bins"]

    some = tables.scores.frequency.copy()
    some[facts_of(index)["pairs"][7]] = np.nan
    left_out = sum(np.isnan(some[pair]).any() for pair in facts_of(index)["pairs"][5:])
    pq.write_table(pa.table({"latent": np.arange(len(some)), "mine": some}), index.parent / "mine.parquet")
    found = compared(study, file, "--score", f"{index.parent / 'mine.parquet'}:mine")
    assert (found["unscored"], found["pairs"]) == (left_out, 35 - left_out)


def test_the_released_benchmark_is_compared(study: StudyPlan, tmp_path: Path):
    pairs, ms, _ = write_benchmark(tmp_path / "benchmark", "xy")
    expected = agreement(pairs, ms)
    result = call("humans", "score", tmp_path / "benchmark")
    assert result.exit_code == 0, result.output
    assert f"{expected.headline:.1%}  mean of the bins that have pairs" in result.stdout
    assert "R_user names the chosen neuron by x or y." in result.stdout
    assert "Written" not in result.stdout
    found = compared(study, tmp_path / "benchmark", "--score", "clip")
    assert found["pooled"] == pytest.approx(1 - expected.pooled)
    assert Path(found["file"]).parent.name.startswith("agreement-benchmark-")
    refused = call("humans", "score", tmp_path / "benchmark", "--score", "ms")
    assert refused.exit_code == 2
    assert "choose dino, clip or FILE:COLUMN" in refused.stderr


def test_answers_that_do_not_belong_together_are_refused(study: StudyPlan, index: Path, tables: ScoreTables):
    ann = answers(index, "Ann", rule(tables.scores.ms))
    root = ("--root", study.root.path)
    other = ann.with_name("other.csv")
    other.write_text(ann.read_text().replace(index.parent.parent.name, "humans-another-0123456789ab"))
    outside = ann.with_name("outside.csv")
    outside.write_text(ann.read_text().replace(index.parent.parent.name, "humans-/../../train"))
    pairs = ann.with_name("pairs.csv")
    pairs.write_text(ann.read_text().replace("\r\n", "\n") + f"{index.parent.parent.name},Ann,40,1,2,1\n")
    twice = ann.with_name("twice.csv")
    twice.write_text(ann.read_text())
    photo = ann.with_name("photo.csv")
    photo.write_bytes(b"\x89PNG\r\n\x1a\n\0\xff")
    for arguments, code, words in [
        ((other, *root), 1, "humans-another-0123456789ab"),
        ((outside, *root), 1, "give the --root of the study whose page was rated"),
        ((pairs, *root), 1, "pair 40 is unknown; the page has pairs 0 to 39"),
        ((ann, twice, *root), 1, f"rater 'Ann' is in {ann} and in {twice}"),
        ((ann, photo, *root), 1, f"{photo} cannot be read as CSV"),
        ((ann,), 2, "give the root of the study whose page was rated"),
        ((ann, "--root", index.parent), 1, "does not have"),
        ((ann, index.parent, *root), 2, "give the folder of the benchmark alone"),
        ((index.parent,), 1, "pairs.csv is missing"),
        ((ann, *root, "--score", "beauty"), 2, "choose ms, n_active"),
        ((ann, *root, "--score", "nowhere.parquet:ms"), 2, "nowhere.parquet cannot be read"),
        (
            (ann, *root, "--score", f"{tables.folder.path}/scores.parquet:beauty"),
            2,
            "choose one of the columns neuron, ms",
        ),
        ((ann, *root, "--score", f"{tables.folder.path}/top_images.parquet:rank"), 2, "several rows for a neuron"),
        ((ann, *root, "--score", f"{index.parents[1]}/pairs.parquet:first"), 2, "the table has no column 'neuron'"),
        ((ann.with_name("nobody.csv"), *root), 2, "does not exist"),
    ]:
        result = call("humans", "score", *arguments)
        assert (result.exit_code, words in result.stderr) == (code, True), (arguments, result.output)
    assert not list(Path(study.root.path).glob("agreement-*"))
