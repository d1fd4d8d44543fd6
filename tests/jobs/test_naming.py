"""The naming stage on a real cluster: what it writes, that it resumes, and where names are shown."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pytest
from click.testing import CliRunner
from sae_ray.jobs import asking, naming, study
from sae_ray.jobs.cli import main
from sae_ray.jobs.progress import Progress

from sae_ray.concepts import answered_names
from sae_ray.concepts.image_codes import image_codes
from sae_ray.concepts.naming_by_answers import plain
from sae_ray.sae import load_sae
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.latent_names import LATENT_NAMES_SCHEMA, NAMES
from sae_ray.store.activations import ActivationStore
from sae_ray.study.names import NeuronNames
from sae_ray.study.root import remember
from sae_ray.study.step_plans import NamingPlan


@pytest.fixture
def one(steered, make_steered) -> NamingPlan:
    [plan] = make_steered(steered).namings
    return plan


def test_names_are_counted_from_answers_and_these_are_kept(one):
    names, answers = (one.step.folder.read_parquet(file) for file in (NAMES, "answers.parquet"))
    assert names.schema == LATENT_NAMES_SCHEMA
    latents = names["neuron"].to_pylist()[: names.num_rows // 2]
    assert names["neuron"].to_pylist() == latents * 2
    assert names["method"].to_pylist() == ["vlm"] * len(latents) + ["steering"] * len(latents)
    assert 10 < len(latents) <= one.n_latents

    told = {row["image_index"]: row["answer"] for row in answers.to_pylist() if row["about"] == "train"}
    top = ScoreTables(one.scores.step.folder).top_images.image[latents][:, :16]
    expected = answered_names(top, told)
    assert names["name"].to_pylist()[: len(latents)] == expected.name
    assert names["agreement"].to_pylist()[: len(latents)] == expected.agreement.tolist()
    white = [(row["latent"], row["answer"]) for row in answers.to_pylist() if row["about"] == "white"]
    steered = names["name"].to_pylist()[len(latents) :]
    assert [latent for latent, _ in white] == [None, *latents]
    unsteered = white[0][1]
    assert steered == [None if said == unsteered else said for _, said in white[1:]]

    record = one.step.record()
    assert record["counts"]["rows"] == answers.num_rows
    assert sorted(record["files"]) == ["answers.parquet", NAMES]  # no parts are left


def test_names_are_tried_where_the_latent_fires_and_where_it_does_not(one):
    found = image_codes(load_sae(one.sae.step.folder), ActivationStore(one.heldout.step.folder))
    codes, places = found.codes.toarray(), {index: row for row, index in enumerate(found.image_index.tolist())}
    names, answers = (one.step.folder.read_parquet(file).to_pylist() for file in (NAMES, "answers.parquet"))
    heldout = {row["image_index"]: row["answer"] for row in answers if row["about"] == "heldout"}
    row = next(row for row in names if row["score"] is not None and row["score"] > 0.8)
    fires = {image: codes[places[image], row["neuron"]] for image, said in heldout.items() if said == row["name"]}
    assert np.mean([value > 0 for value in fires.values()]) > np.mean(codes[:, row["neuron"]] > 0)


def test_a_name_by_the_llava_is_better_than_that_of_random_images(one):
    found = one.step.record()["counts"]["methods"]["vlm"]
    assert found["pure"] > 0
    assert found["right"] > 0.8 > found["control_right"]
    assert found["score"] > found["control_score"]


def test_top_images_may_be_shown_in_grids(one, steered, make_steered, tmp_path):
    """The world's LLaVA does not read grids: its names are recorded, whatever they are."""
    root = tmp_path / "root"
    shutil.copytree(steered, root, ignore=shutil.ignore_patterns("naming-*"))
    plan = make_steered(root, **{"naming.images": "grid", "naming.methods": ["vlm"], "naming.n_latents": 5})
    naming.run(plan)
    [grids] = plan.namings
    names, answers = (grids.step.folder.read_parquet(file).to_pylist() for file in (NAMES, "answers.parquet"))
    latents = [row["neuron"] for row in names]
    told = {about: [(row["latent"], row["answer"]) for row in answers if row["about"] == about]
            for about in ("grid", "random grid", "heldout", "train", "white")}  # fmt: skip
    assert [latent for latent, _ in told["grid"]] == [latent for latent, _ in told["random grid"]] == latents
    assert told["train"] == told["white"] == []
    assert [(row["name"], row["control"]) for row in names] == [
        (plain(said) or None, plain(control) or None)
        for (_, said), (_, control) in zip(told["grid"], told["random grid"], strict=True)
    ]
    assert all(row["agreement"] is None and row["n_images"] > 0 for row in names)
    kept = one.step.folder.read_parquet("answers.parquet").to_pylist()
    alone = {row["image_index"]: row["answer"] for row in kept if row["about"] == "heldout"}
    tried = {row["image_index"]: row["answer"] for row in answers if row["about"] == "heldout"}
    assert tried
    assert {image: alone[image] for image in tried} == tried, "names are tried on single images"
    assert grids.step.record()["counts"]["rows"] == len(answers)


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(one, steered, make_steered, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "QUESTIONS_PER_BLOCK", 40)
    root = tmp_path / "root"
    shutil.copytree(steered, root, ignore=shutil.ignore_patterns("naming-*"))

    def stop(self: Progress, amount: int) -> None:
        self.done += amount
        if "heldout" in self.label:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(asking.Progress, "advance", stop)
        with pytest.raises(Interrupted):
            naming.run(make_steered(root))
    plan = make_steered(root, **{"resources.steering.workers": 2})
    [again] = plan.namings
    parts = again.step.folder / "answers" / "train"
    first = min(parts.files())
    told = parts.read_parquet(first)["answer"].to_pylist()
    told[3] = "forged"  # so that it shows whether it is asked again
    parts.write_parquet(first, pa.table({"answer": told}))
    naming.run(plan)
    expected, found = (two.step.folder.read_parquet("answers.parquet").to_pylist() for two in (one, again))
    expected[3]["answer"] = "forged"
    assert found == expected


def test_names_are_shown_by_find_and_in_the_summary(one, steered, make_steered, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(steered, root)
    plan = make_steered(root)
    remember(plan)
    result = CliRunner().invoke(main, ["find", "star", "--json", "-n", "1000", "--root", str(root)])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    named = {row["neuron"]: row for row in one.step.folder.read_parquet(NAMES).to_pylist() if row["method"] == "vlm"}
    for row in rows:
        if row["latent"] in named:
            expected = named[row["latent"]]
            assert (row["name"], row["name_method"], row["name_score"]) == (expected["name"], "vlm", expected["score"])
        else:
            assert row["name_method"] in ("soft_wpmi", "label", None)
    lines = CliRunner().invoke(main, ["find", "star", "-n", "1000", "--root", str(root)]).stdout.splitlines()
    assert lines[0].split()[5] == "name"
    shown = [(row["name"], line) for row, line in zip(rows, lines[1:], strict=False) if row["name_method"] == "vlm"]
    assert shown
    assert all(f"{name} (vlm" in line for name, line in shown)
    text = study.summary_text(plan, study.write_summary(plan))
    assert "Names that the LLaVA gives to latents" in text
    assert len(NeuronNames.read(plan, one.name, []).found) >= len([row for row in named.values() if row["name"]])
