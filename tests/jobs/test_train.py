import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_ray.jobs import study, train
from sae_ray.jobs.placement import bundles
from sae_ray.jobs.progress import Progress

from sae_ray.sae import CellTrainer, load_sae, train_cells
from sae_ray.sae.calibration import calibrated
from sae_ray.scores.tables import ScoreTables
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.store.sample import Sample
from sae_ray.store.stream import TrainingStream
from sae_ray.study.root import remember
from tests.jobs.struck import claim

SLOW = {"training.steps": 600, "resources.train.checkpoint_every": 25}
"""Long enough to be killed in the middle."""


def weights(folder: Folder) -> dict[str, torch.Tensor]:
    sae = load_sae(folder)
    return {name: getattr(sae, name) for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}


def assert_equal_weights(plan, reference) -> None:
    for one, other in zip(plan.trains, reference.trains, strict=True):
        found, expected = weights(one.step.folder), weights(other.step.folder)
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), (one.grid_cell.name, name)


def checkpoints(root: Path) -> list[Path]:
    return sorted(root.glob("sae-*/checkpoints/*.json"))


def test_a_cell_is_what_it_would_be_alone(finished, make_plan):
    """The bundle's result equals a plain loop over one cell: no Ray, no bundle, no checkpoints."""
    plan = make_plan(finished)
    torch.set_num_threads(1)
    for one in plan.trains:
        store = ActivationStore(one.activations.step.folder)
        scale = store.root_mean_square_norm
        trainer = CellTrainer(one.grid_cell.cell, store.d)
        sample = Sample(store)
        stream = TrainingStream(store, 64, one.stream_seed, plan.study.shuffle_rows, without=sample)
        for _, rows in zip(range(120), stream.batches(), strict=False):
            trainer.step(rows.float() / scale)
        alone = calibrated(trainer.export(scale), torch.from_numpy(sample.kept_out_rows()))
        for name, tensor in weights(one.step.folder).items():
            torch.testing.assert_close(getattr(alone, name), tensor, rtol=1e-5, atol=1e-6)


def test_a_step_says_how_it_was_trained(finished, make_plan):
    for one in make_plan(finished).trains:
        record = one.step.record()
        assert {name: record["counts"][name] for name in ("steps", "d_sae")} == {"steps": 120, "d_sae": one.d_sae}
        assert record["ran"] == {"attempts": [{"first_step": 0, "workers": 1, "shards": 1, "device": "cpu"}]}
        assert one.step.folder.exists("latents.parquet")


def test_bundling_changes_nothing(ray_cluster, extracted, finished, make_plan, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    plan = make_plan(root, **{"resources.train.cells_per_bundle": 1, "resources.train.bundles": 2})
    train.run(plan)
    assert_equal_weights(plan, make_plan(finished))


def test_a_killed_driver_and_workers_that_are_killed_or_fail_resume_to_equal_weights(
    ray_cluster, extracted, make_plan, kill_driver_when, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    shutil.copytree(extracted, whole)
    reference = make_plan(whole, **SLOW)
    torch.set_num_threads(1)
    [bundle] = bundles(reference, reference.trains, 1, "cpu")
    train_cells(bundle)

    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    plan = make_plan(root, **SLOW)
    remember(plan)
    kill_driver_when(["train", "--root", str(root)], lambda: len(checkpoints(root)) >= 2)
    left = {path.stem for path in checkpoints(root)}
    assert left, "a checkpoint survives"
    assert not any(one.step.finished for one in plan.trains)

    board_of, marks = Progress.board, tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setattr(Progress, "board", lambda progress: BoardWithFaults(board_of(progress), marks, root, left))
    train.run(plan)
    assert {"killed", "failed"} <= {path.name for path in marks.iterdir()}, "a worker was not struck"
    assert_equal_weights(plan, reference)


class BoardWithFaults:
    """Once there are newer checkpoints than those, the first worker who reports is killed, and the next one finds that
    its disk fails."""

    def __init__(self, board: Any, marks: Path, root: Path, old: set[str]):
        self.board, self.marks, self.root, self.old = board, marks, root, old

    def set(self, *told: Any) -> None:
        self.board.set(*told)
        if not {path.stem for path in checkpoints(self.root)} - self.old:
            return
        if claim(self.marks / "killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if claim(self.marks / "failed"):
            raise OSError("Input/output error")


def test_guided_cells_learn_the_classes_of_their_images(ray_cluster, extracted, finished, make_plan, tmp_path):
    """Through the whole study, beside a cell that is not guided, which stays what it was."""
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    kinds = ["guided_topk", "guided_batch_topk", "batch_topk"]
    plan = make_plan(root, **{"grid.architectures": kinds, "training.learning_rate": 1e-2, "training.steps": 400})
    plain = make_plan(root, **{"training.learning_rate": 1e-2, "training.steps": 400})
    summary = study.run(plan)
    assert {one.grid_cell.name for one in plan.trains} < {row["name"] for row in summary["cells"]}
    assert {one.step.name for one in plain.trains} & {one.step.name for one in plan.trains}
    classes = sorted(set(plan.images["train"].labels["label_name"].to_pylist()))
    for one in plan.evaluations:
        counts, sae = one.step.record()["counts"], load_sae(one.sae.step.folder)
        if not one.sae.grid_cell.cell.guided:
            assert "concepts" not in counts
            continue
        assert list(sae.concepts) == list(counts["concepts"]) == classes
        n = one.activations.rows
        assert {found["rows"] for found in counts["concepts"].values()} == {n}
        assert sum(found["positive"] for found in counts["concepts"].values()) == n
        wrong = sum(1 - found["accuracy"] for found in counts["concepts"].values())
        assert wrong < 0.5, "to say of every image that it shows nothing is wrong once"
        assert 0 < counts["bce"] < 3
        for step in (one.step, one.sae.step):
            named = step.folder.read_parquet("latents.parquet")["concept"].to_pylist()
            assert named == classes + [None] * (sae.d_sae - len(classes))


def test_a_cell_that_diverges_is_reported_and_the_others_go_on(ray_cluster, extracted, make_plan, finished, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    overrides = {"grid.architectures": ["batch_topk", "relu"], "grid.sparsity": [1e38]}
    plan = make_plan(root, **overrides)
    train.run(plan)
    records = {one.grid_cell.cell.architecture: one.step.record() for one in plan.trains}
    assert records["batch_topk"]["status"] == "done"
    assert records["relu"]["status"] == "failed"
    assert "loss" in records["relu"]["reason"]
    healthy = next(one for one in plan.trains if one.grid_cell.cell.architecture == "batch_topk")
    same = next(one for one in make_plan(finished).trains if one.step.name == healthy.step.name)
    assert torch.equal(weights(healthy.step.folder)["W_enc"], weights(same.step.folder)["W_enc"])


def test_raw_neurons_are_scored_before_they_weigh_dimensions(
    ray_cluster, extracted, make_plan, finished, tmp_path, capsys
):
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    plan = make_plan(root, **{"grid.architectures": ["batch_topk"], "grid.weights": ["uniform", "ms"]})
    train.run(plan)
    uniform, weighted = plan.trains
    same = next(one for one in make_plan(finished).trains if one.step.name == uniform.step.name)
    assert torch.equal(weights(uniform.step.folder)["W_enc"], weights(same.step.folder)["W_enc"])
    [raw] = plan.scores_for_training
    table = weighted.step.folder.read_parquet("weights.parquet")
    assert table["s"].to_pylist() == ScoreTables(raw.step.folder).scores.ms.tolist()
    ratio = weighted.step.record()["counts"]["gamma_ratio"]
    assert ratio == max(table["gamma"].to_pylist()) / min(table["gamma"].to_pylist())
    assert f"{weighted.grid_cell.name}: max γ / min γ = {ratio:.4g}" in capsys.readouterr().err


@pytest.mark.parametrize("by", ["workers", "shards"])
def test_two_ranks_train_the_sae_of_one(ray_cluster, extracted, make_plan, tmp_path, by):
    """A few steps only: sums over ranks round differently, and Adam enlarges rounding where a gradient is 0."""
    few = {"training.steps": 12, "training.threshold_start_step": 5, "grid.architectures": ["batch_topk"]}
    trained = []
    for ranks in (1, 2):
        root = tmp_path / str(ranks)
        shutil.copytree(extracted, root)
        plan = make_plan(root, **few, **{f"resources.train.{by}": ranks})
        if ranks == 1:
            [bundle] = bundles(plan, plan.trains, 1, "cpu")
            train_cells(bundle)
        else:
            train.run(plan)
        (one,) = plan.trains
        record = one.step.record()
        expected = {"workers": 1, "shards": 1} | {by: ranks}
        assert record["ran"]["attempts"] == [{"first_step": 0, **expected, "device": "cpu"}]
        trained.append((one.step.name, record["counts"]["d_sae"], weights(one.step.folder)))
    (name, d_sae, expected), (found_name, found_d_sae, found) = trained
    assert (found_name, found_d_sae) == (name, d_sae)
    for one, tensor in expected.items():
        torch.testing.assert_close(found[one], tensor, rtol=1e-4, atol=1e-5)
