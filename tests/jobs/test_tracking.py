"""Trackers of a study's SAEs, opened by the workers that train them."""

import shutil

import numpy as np
import pytest
from sae_ray.jobs import train
from sae_ray.jobs.tracking import Trackers, Tracking, tracking_of

from sae_ray.errors import UsageError
from sae_ray.sae import BundleJob, CellJob, StepMetrics
from sae_ray.sae.bundle import CellReport
from sae_ray.sae.history import HISTORY_FILE
from tests.sae.test_trackers import wandb_curve


def test_all_saes_are_tracked(ray_cluster, extracted, make_plan, tmp_path):
    """Whose steps keep their names and their bits."""
    root = tmp_path / "root"
    shutil.copytree(extracted, root)
    plan = make_plan(root, **{"resources.train.trackers": ["wandb"]})
    untracked = make_plan(tmp_path / "other")
    assert [one.step.name for one in plan.trains] == [one.step.name for one in untracked.trains]
    train.run(plan)
    for one in plan.trains:
        history = one.step.folder.read_parquet(HISTORY_FILE)
        expected = [*zip(history["step"].to_pylist(), history["loss"].to_pylist(), strict=True)]
        curve = wandb_curve(root / "trackers" / "wandb", one.step.name, "loss")
        np.testing.assert_allclose(curve, expected, rtol=1e-6)


def test_a_tracker_that_fails_is_left_out(make_plan, tmp_path, monkeypatch, capsys):
    """Training goes on, and so do other trackers."""
    plan = make_plan(tmp_path)
    jobs = tuple(CellJob(one.step, one.grid_cell.cell) for one in plan.trains)
    bundle = BundleJob(plan.root, jobs, 0, 10, 10)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder of its runs should be")
    trackers = Trackers(bundle, Tracking(("wandb",), "mine", blocked))
    one = StepMetrics(0, 1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 3.0, 2, 0.5, 0.1, 1e-3)
    for _ in range(2):
        trackers.tell({jobs[0].step.name: CellReport(one, 8, [one])})
    trackers.close()
    assert capsys.readouterr().err.count(f"Wandb of {jobs[0].step.name} failed and is left out") == 1


def test_trackers_that_write_files_need_a_directory(make_plan, tmp_path, monkeypatch):
    plan = make_plan(tmp_path, **{"resources.train.trackers": ["wandb"]})
    assert tracking_of(plan) == (("wandb",), "small", tmp_path / "trackers")
    remote = make_plan("mock://bucket/root", **{"resources.train.trackers": ["wandb"]})
    assert tracking_of(remote).kinds == ("wandb",)
    monkeypatch.setattr("sae_ray.jobs.tracking.open_tracker", lambda *given, **options: None)
    for kind in ("tensorboard", "mlflow"):
        remote = make_plan("mock://bucket/root", **{"resources.train.trackers": [kind]})
        with pytest.raises(UsageError, match=f"resources.train.trackers = '{kind}': it writes files, and mock://"):
            train.check(remote)
    for one in remote.trains:  # with nothing left to train, no tracker is needed
        one.step.folder.write_bytes("content", b"1")
        one.step.finish(1.0, {})
    train.check(remote)
