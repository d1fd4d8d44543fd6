"""Activations from elsewhere as a root's own."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from sae_ray import import_activations, monosemanticity
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.vectors import Vectors, write_vectors
from sae_ray.study.config import Study
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import plan_study, recall, recalled_plan, remember
from sae_ray.study.summary import summarise
from tests.small_study import finish_evaluation, finish_score, finish_train

D = 12


@pytest.fixture
def x() -> np.ndarray:
    return np.abs(np.random.default_rng(0).normal(size=(400, D))).astype(np.float32)


def study(**overrides: Any) -> Study:
    values = {"name": "mine", "grid": [{"sites": ["resid"], "expansions": [2], "k": [4]}]}
    return Study.from_dict(values, overrides)


def planned(root: Path, **overrides: Any) -> StudyPlan:
    return StudyPlan(study(**overrides), Folder(root))


def stored(plan: StudyPlan) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """Label, images, tokens and vectors of what was imported."""
    for extract in plan.extracts:
        store = ActivationStore(extract.step.folder)
        index, token, rows = (np.concatenate(parts) for parts in zip(*map(store.read, store.parts), strict=True))
        assert (len(rows), rows.shape[1]) == (extract.rows, extract.width)
        yield extract.step.label, index, token, rows


def test_scores_are_those_of_the_vectors(x: np.ndarray, tmp_path: Path):
    """And everything that a study measures without images is there."""
    train, heldout, judge = x[:250], x[250:], np.random.default_rng(1).normal(size=(150, 5))
    labels = [f"class {row.argmax() % 3}" for row in x]
    given = {"images": {"label": labels[:250]}, "heldout_images": {"label": labels[250:]}, "judge": judge}
    import_activations(tmp_path, "resid", train, heldout, **given)
    plan = planned(tmp_path, concepts={"measures": ["labels"]})
    assert [label for label, *_ in stored(plan)] == [
        "activations-train-resid", "activations-heldout-resid", "embeddings-heldout"
    ]  # fmt: skip
    for (_, index, token, rows), expected in zip(stored(plan), (train, heldout, judge.astype(np.float32)), strict=True):
        assert np.array_equal(rows, expected)
        assert np.array_equal(index, np.arange(len(rows)))
        assert set(token) == {-1}
    for train_plan in plan.trains:
        finish_train(train_plan)
    for one in plan.evaluations:
        finish_evaluation(one)
    for score in plan.scores:
        finish_score(score)
    raw = ScoreTables(plan.scores[0].step.folder).scores.ms
    expected = monosemanticity(torch.from_numpy(heldout), torch.from_numpy(judge))
    assert raw == pytest.approx(expected.numpy(), abs=1e-6)
    assert [row.n_scored for row in summarise(plan)] == [12, 23]
    assert plan.images["heldout"].labels["label_name"].to_pylist() == labels[250:]
    assert all(step.finished for step in plan.steps if step.stage != "concepts")
    with pytest.raises(UsageError, match="pictures: needs images, but only activations were imported"):
        _ = plan.pictures


def test_without_a_judge_there_are_no_scores(x: np.ndarray, tmp_path: Path):
    import_activations(tmp_path, "resid", x, x[:100])
    plan = planned(tmp_path)
    for train_plan in plan.trains:
        finish_train(train_plan)
    for score in plan.scores:
        finish_score(score)
    assert [row.name for row in summarise(plan)] == ["raw-resid", "resid-batch_topk-x2-k4"]
    assert all(row.n_scored == 0 and np.isnan(row.mean_ms) for row in summarise(plan))
    scores = ScoreTables(plan.scores[0].step.folder).scores
    assert scores.max_image == pytest.approx(x[:100].max(0))
    with pytest.raises(UsageError, match=r"grid.weights = 'ms': they come from a judge; import its embeddings"):
        planned(tmp_path, **{"grid.weights": ["ms"]})


def test_a_share_is_held_out_by_image(x: np.ndarray, tmp_path: Path):
    """With its labels, its tokens and the judge's view of it."""
    ids = [f"photo/{row // 4}.jpg" for row in range(400)]
    judge = np.arange(100.0)[:, None] + 1
    images = pa.table({"image_id": ids, "label": [f"{row // 40}" for row in range(400)]})
    pq.write_table(images, tmp_path / "images.parquet")
    imported = import_activations(
        tmp_path / "root", "resid", x, images=tmp_path / "images.parquet", judge=judge, heldout_fraction=0.3
    )
    assert imported.sites["resid"].rows_per_image == 4
    plan = planned(tmp_path / "root")
    found = {label: columns for label, *columns in stored(plan)}
    seen = set()
    for name in ("train", "heldout"):
        manifest, labels = plan.images[name].manifest, plan.images[name].labels
        index, token, rows = found[f"activations-{name}-resid"]
        assert token.tolist() == [0, 1, 2, 3] * len(manifest)
        for place, image_id in enumerate(manifest["image_id"].to_pylist()):
            number = int(image_id.removeprefix("photo/").removesuffix(".jpg"))
            seen.add(number)
            assert np.array_equal(rows[index == place], x[4 * number : 4 * number + 4])
            assert labels["label_name"][place].as_py() == str(number // 10)
            if name == "heldout":
                assert found["embeddings-heldout"][2][place] == number + 1
    assert seen == set(range(100))
    assert 10 < len(plan.images["heldout"].manifest) < 50


def test_any_source_gives_the_same_steps(x: np.ndarray, tmp_path: Path):
    np.save(tmp_path / "x.npy", x)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), D)
    (tmp_path / "parts").mkdir()
    for number in range(2):
        part = pa.table({"v": vectors[number * 200 : number * 200 + 200], "n": [number] * 200})
        pq.write_table(part, tmp_path / "parts" / f"{number}.parquet")
    datasets.Dataset.from_dict({"v": x.tolist()}).save_to_disk(tmp_path / "saved")
    pyarrow.csv.write_csv(pa.table({"label": ["a", ""] * 200}), tmp_path / "labels.csv")
    sources = {"array": x, "npy": tmp_path / "x.npy", "parts": tmp_path / "parts", "saved": str(tmp_path / "saved")}
    names = set()
    for name, source in sources.items():
        images = tmp_path / "labels.csv" if name == "npy" else {"label": ["a", None] * 200}
        import_activations(
            tmp_path / name, "resid", source, images=images, column="v" if name in ("parts", "saved") else None
        )
        names.add(tuple(step.name for step in planned(tmp_path / name).steps))
    assert len(names) == 1


def test_what_is_imported_again(x: np.ndarray, tmp_path: Path):
    """The same does nothing; more sites of the same images join; other images replace a single site alone."""
    import_activations(tmp_path, "resid", x, images={"label": ["a", "b"] * 200})
    plan = planned(tmp_path)
    before = {step.name: step.folder.modified() for step in plan.steps if step.finished}
    import_activations(tmp_path, "resid", x)  # what is known of labels stays
    assert {step.name: step.folder.modified() for step in planned(tmp_path).steps if step.finished} == before
    import_activations(tmp_path, "mlp", x[:, :5], judge=x)
    both = planned(tmp_path, **{"grid.sites": ["resid", "mlp"]})
    assert [extract.width for extract in both.extracts] == [D, D, 5, 5, D]
    assert set(before) < {step.name for step in both.steps}
    with pytest.raises(UsageError, match="site 'resid' has other images than mlp under"):
        import_activations(tmp_path, "resid", x[:300])
    import_activations(tmp_path / "alone", "resid", x[:300])
    import_activations(tmp_path / "alone", "resid", x)
    assert sum(planned(tmp_path / "alone").images[name].n_images for name in ("train", "heldout")) == 400


def test_a_root_remembers_what_was_imported(x: np.ndarray, tmp_path: Path):
    import_activations(tmp_path, "resid", x, judge=x)
    plan = planned(tmp_path)
    remember(plan)
    names = [step.name for step in plan.steps]
    assert [step.name for step in recalled_plan(str(tmp_path)).steps] == names
    assert [step.name for step in plan_study(study(), Folder(tmp_path), recall(Folder(tmp_path))).steps] == names
    import_activations(tmp_path, "resid", x + 1, judge=x)
    again = plan_study(study(), Folder(tmp_path), recall(Folder(tmp_path)))
    assert {step.label for step in again.steps if step.name not in names} >= {
        "activations-train-resid", "sae-resid-batch_topk-x2-k4", "fidelity-resid-batch_topk-x2-k4"
    }  # fmt: skip
    again.extracts[0].step.folder.delete("step.json")
    with pytest.raises(SaeRayError, match="is not there; import it again by `sae-ray import`"):
        again.check_imported()


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ("a/b", {}, "site is 'a/b'; name imported activations by letters"),
        ("resid", {"heldout": np.ones((5, 3))}, "12 dimensions, 1 row.* in train and 3 dimensions.*they must agree"),
        ("resid", {"images": {"labels": [0]}}, r"images \(--image-table\) has the columns labels; give a .csv"),
        ("resid", {"images": {"label": [0]}}, r"images \(--image-table\) has 1 rows for the 400 of ndarray"),
        ("resid", {"images": {"image_id": [0, 1] * 200}}, "the rows of an image do not stand together"),
        ("resid", {"images": {"image_id": [0] + [1] * 399}}, "image 0 has 1 rows, 1 has 399"),
        ("resid", {"images": {"image_id": [None] * 400}}, "rows without an image_id"),
        ("resid", {"images": {"image_id": [0] * 400, "label": [1] * 399 + [2]}}, "image 0 have several labels"),
        ("resid", {"heldout": np.ones((9, D)), "heldout_images": {"label": [0]}},
         r"heldout_images \(--heldout-image-table\) has 1 rows for the 9 of ndarray"),
        ("resid", {"heldout": np.ones((9, D)), "heldout_images": "a.txt"},
         r"heldout_images \(--heldout-image-table\) = 'a.txt': give a .csv"),
        ("resid", {"judge": pa.table({"a": [[1.0]], "b": [[1.0]]})}, "has several columns; .* or give it alone: a, b"),
        ("resid", {"images": "a.txt"}, r"images \(--image-table\) = 'a.txt': give a .csv"),
        ("resid", {"images": "nowhere.csv"}, r"images \(--image-table\) = 'nowhere.csv' cannot be read"),
        ("resid", {"judge": np.ones((3, 3))}, "are of 3 images, but there are 400"),
        ("resid", {"heldout": np.ones((9, D)), "judge": np.ones((3, 3))}, "are of 3 images, but there are 9"),
        ("resid", {"heldout_fraction": 1.0}, "heldout_fraction = 1.0: make it more than 0 and less than 1"),
        ("resid", {"heldout_fraction": 1e-9}, "it leaves a set without images; .*--heldout"),
        ("resid", {"heldout_images": {"label": []}}, "give heldout"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(x: np.ndarray, site: str, options: dict, message: str, tmp_path: Path):
    with pytest.raises(UsageError, match=message):
        import_activations(tmp_path, site, x, **options)
    assert not list(tmp_path.iterdir()), "nothing is written before all is known to fit"


def test_a_disk_that_is_full_leaves_nothing_half_written(x: np.ndarray, tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    wide = np.tile(x, 40) + np.random.default_rng(0).normal(size=(len(x), 40 * D))
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SaeRayError, match=r"activations-train-resid-\w+ cannot be written \(.*; make room"):
            import_activations(tmp_path, "resid", wide)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not (tmp_path / "imported.json").exists()
    assert [path for path in tmp_path.glob("activations-*/**/*") if path.is_file()] == []
    assert import_activations(tmp_path, "resid", wide).sites["resid"].width == 40 * D


def test_what_vanishes_while_it_is_read_is_named(x: np.ndarray, tmp_path: Path):
    class Vanishing:
        """As a dataset of h5py is once its file has gone."""

        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, rows: slice) -> np.ndarray:
            if rows.start:
                raise OSError("Can't read data")
            return np.resize(x, (len(range(len(self))[rows]), D))

    with pytest.raises(SaeRayError, match=r"Vanishing: row 4096 cannot be read \(Can't read data\)"):
        write_vectors(Vectors(Vanishing()), Folder(tmp_path), "activations")


def test_a_file_is_no_root(x: np.ndarray, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--root .*file cannot be (read|written)"):
        import_activations(tmp_path / "file", "resid", x)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"images.train.path": "p"}, "encoder.model = 'imported': name the encoder of these images .*, or leave out"),
        (
            {"encoder.model": "m"},
            r"images.train.path = 'imported': name the images \(a folder of this name as ./imported\), or",
        ),
        ({"judge.dtype": "float16"}, "judge = 'set': imported activations have no encoder"),
        ({"steering.llava": "m"}, "steering = 'set': imported"),
        ({"grid.score_tokens": "cls"}, "imported activations are used as they are"),
        ({"grid.sites": ["other"]}, "grid.sites.*site is 'other', which was not imported; there is resid"),
        ({"grid.monosemanticity": [1.0]}, "grid.monosemanticity = 1.0: it needs the judge's"),
    ],
)
def test_a_study_that_cannot_be_is_refused(x: np.ndarray, overrides: dict, message: str, tmp_path: Path):
    import_activations(tmp_path, "resid", x)
    with pytest.raises(UsageError, match=message):
        planned(tmp_path, **overrides)


def test_a_root_without_imports_is_told(tmp_path: Path):
    with pytest.raises(UsageError, match="images, encoder: missing, and nothing was imported into"):
        planned(tmp_path)
