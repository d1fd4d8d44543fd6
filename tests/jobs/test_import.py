"""Activations from elsewhere, from the command line through the stages that need no images."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
from click.testing import CliRunner
from sae_ray.jobs.cli import main


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_study_of_imported_activations(ray_cluster, tmp_path):
    rng = np.random.default_rng(0)
    codes = (rng.random((600, 16)) < 0.2) * rng.random((600, 16))
    np.save(tmp_path / "x.npy", (codes @ rng.normal(size=(16, 8))).astype(np.float16))
    np.save(tmp_path / "judge.npy", codes + 0.01)
    pyarrow.csv.write_csv(pa.table({"label": [f"{row.argmax() % 2}" for row in codes]}), tmp_path / "images.csv")
    root, file = tmp_path / "root", tmp_path / "x.npy"
    given = ("--image-table", tmp_path / "images.csv", "--judge", tmp_path / "judge.npy")
    imported = call("import", file, "--site", "resid", "--root", root, *given)
    assert imported.exit_code == 0, imported.output
    assert "1 row(s) each, 8 wide" in imported.output

    flags = ("--site", "resid", "--expansion", 4, "--k", 3, "--steps", 300, "--set", "training.batch_size=64")
    flags += ("--set", "training.learning_rate=0.01", "--set", "concepts={}")
    ran = call("run", "--root", root, *flags, "--json")
    assert ran.exit_code == 0, ran.output
    summary = json.loads(ran.stdout)
    raw, sae = summary["cells"]
    assert (raw["name"], sae["name"]) == ("raw-resid", "resid-batch_topk-x4-k3")
    assert sae["r2"] > 0.8
    assert sae["mean_ms"] > raw["mean_ms"]
    assert summary["concepts"].keys() == {"raw-resid", "resid-batch_topk-x4-k3"}
    entries = json.loads(call("status", "--root", root, "--json").stdout)
    assert {entry["status"] for entry in entries} == {"done"}
    for command in ("report", "pictures"):
        refused = call(command, "--root", root)
        assert refused.exit_code == 2
        assert f"{command}: needs images, but only activations were imported" in refused.stderr
    assert "nothing left to do" in call("run", "--root", root).stderr
