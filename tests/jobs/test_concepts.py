"""The stage of concepts on the small world: what it writes, whatever runs it, and what is not there to measure."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from sae_ray.jobs import concepts
from sae_ray.jobs.cli import main

from sae_ray.concepts import Concepts, label_correlation
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.tables import CONCEPTS, CORRELATIONS, NAMES, NEURONS, ConceptTables
from sae_ray.errors import UsageError
from sae_ray.sae import load_sae
from sae_ray.store.activations import ActivationStore
from sae_ray.world.render import SHAPES

ASKED = {"concepts": {"min_images": 10, "ignore_labels": ["blank"]}}


@pytest.fixture
def root(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "root")


def files(plan) -> list[bytes]:
    return [
        one.step.folder.read_bytes(name) for one in plan.concepts for name in (NEURONS, CONCEPTS, CORRELATIONS, NAMES)
    ]


def test_bits_do_not_depend_on_the_workers_and_finished_work_stays(ray_cluster, root, make_plan, tmp_path):
    plan = make_plan(root, **ASKED, **{"resources.concepts.workers": 1})
    concepts.run(plan)
    assert [one.name for one in plan.concepts] == ["raw-projection", *(one.grid_cell.name for one in plan.trains)]
    first = files(plan)
    raw, kept, lost = (one.step for one in plan.concepts)
    written = (root / kept.name / "step.json").stat().st_mtime_ns
    for one in (raw, lost):  # as if the driver had been killed there
        shutil.rmtree(root / one.name)
    again = make_plan(root, **ASKED, **{"resources.concepts.workers": 4})
    concepts.run(again)
    assert files(again) == first
    assert (root / kept.name / "step.json").stat().st_mtime_ns == written


def test_the_tables_are_those_of_the_labels_of_the_image_list(ray_cluster, root, make_plan):
    plan = make_plan(root, **ASKED)
    concepts.run(plan)
    one = plan.concepts[1]
    tables, counts = ConceptTables(one.step.folder), one.step.record()["counts"]
    store = ActivationStore(one.activations.step.folder)
    parts = [store.read(number) for number in store.parts]
    index, x = (np.concatenate([part[column] for part in parts]) for column in (0, 2))
    import torch

    codes = load_sae(one.sae.step.folder).encode(torch.from_numpy(x).float())
    labels = Labels.of_table(plan.images["heldout"].labels, ["blank"]).take(index)
    shown = labels.n_positive >= 10
    assert tables.concepts.concept.tolist() == [
        name for name, enough in zip(labels.names, shown, strict=True) if enough
    ]
    rho = label_correlation(codes, labels)[:, shown]
    measured = ~np.isnan(tables.neurons.rho)
    assert measured.any()
    np.testing.assert_allclose(tables.neurons.rho[measured], rho[measured].max(axis=1), rtol=1e-6)
    assert counts["labelled"] == labels.labelled.sum() < counts["images"]
    words = {name for name in tables.neurons.name if name is not None}
    assert words
    assert words <= set(labels.names)
    assert set(tables.names["method"].to_pylist()) == {"soft_wpmi", "decoder_cosine"}


def test_labels_may_come_from_a_file_and_names_from_a_vocabulary(ray_cluster, root, make_plan, tmp_path):
    ids = make_plan(root).images["heldout"].manifest["image_id"].to_pylist()
    file, vocabulary = tmp_path / "concepts.csv", tmp_path / "words.txt"
    with file.open("w", newline="") as opened:
        rows = csv.writer(opened)
        rows.writerow(["image_id", "even", "third"])
        rows.writerows([image, int(place % 2 == 0), "" if place % 5 == 0 else int(place % 3 == 0)]
                       for place, image in enumerate(ids))  # fmt: skip
    vocabulary.write_text("star\nring\nbar\n")
    asked = {"concepts.file": str(file), "concepts.vocabulary": str(vocabulary)}
    plan = make_plan(root, **asked)
    concepts.run(plan)
    tables = ConceptTables(plan.concepts[1].step.folder)
    assert tables.concepts.concept.tolist() == ["even", "third"]
    assert tables.concepts.n_known[1] < tables.concepts.n_known[0] == len(ids)
    assert set(tables.neurons.name) - {None} <= {"star", "ring", "bar"}
    file.write_text("image_id,even\nno such image,1\n")
    with pytest.raises(UsageError, match="changed since the root was planned"):
        concepts.check(plan)
    with pytest.raises(UsageError, match=r"concepts\.file = .*has no row for"):
        concepts.check(make_plan(root, **asked))


def test_depths_and_accuracies_are_measured_if_asked_for(ray_cluster, root, make_plan, tmp_path):
    taxonomy = tmp_path / "taxonomy.csv"
    shapes = sorted(SHAPES)
    taxonomy.write_text("\n".join(["label_name,path", *(f"{name},thing > {name[0]} > {name}" for name in shapes)]))
    asked = {"concepts.ignore_labels": ["blank"], "concepts.measures": ["splicing"], "concepts.taxonomy": str(taxonomy)}
    plan = make_plan(root, **asked)
    concepts.check(plan)
    concepts.run(plan)
    raw, *saes = plan.concepts
    assert "spliced" not in raw.step.record()["counts"]
    for one in saes:
        counts, hierarchy = one.step.record()["counts"], ConceptTables(one.step.folder).hierarchy
        assert hierarchy is not None
        assert len(counts["depths"]) == len(one.group_sizes) == hierarchy.group.max() + 1
        assert (hierarchy.group == np.repeat(np.arange(len(one.group_sizes)), one.group_sizes)).all()
        known = ~np.isnan(hierarchy.lca_mean)
        assert known.any()
        assert (hierarchy.lca_mean[known] >= 1).all()
        assert counts["depth"] == pytest.approx(hierarchy.lca_mean[known].mean())
        assert counts["spliced_by"] == "zero_shot"
        assert counts["spliced_images"] == Labels.of_table(plan.images["heldout"].labels, ["blank"]).labelled.sum()
        assert counts["spliced_original"] > 0.8 > 0.3 > counts["spliced_mean"]
        lost = counts["spliced_original"] - counts["spliced_mean"]
        assert counts["recovered"] == pytest.approx((counts["spliced"] - counts["spliced_mean"]) / lost)
    texts = "\n".join(concepts.lines(plan))
    assert "depth in the taxonomy: " in texts
    assert "accuracy (zero-shot) with the reconstruction in place: " in texts
    assert "share of the accuracy recovered" in texts
    taxonomy.write_text(f"label_name,path\n{shapes[0]},thing\n")
    with pytest.raises(UsageError, match=r"concepts\.taxonomy = .*: the taxonomy has no path for 15 labels"):
        concepts.check(make_plan(root, **asked))


def test_reconstructions_are_spliced_into_layers_whatever_runs_it(ray_cluster, steered, make_steered, tmp_path):
    root = shutil.copytree(steered, tmp_path / "root")
    found = []
    for workers in (1, 2):
        plan = make_steered(root, **{"concepts.measures": ["splicing"], "resources.concepts.workers": workers})
        concepts.run(plan)
        _, one = plan.concepts
        assert one.readout is not None
        found.append(one.step.record()["counts"])
        one.step.folder.delete("step.json")
    assert found[0] == found[1]
    counts = found[0]
    assert counts["spliced_original"] > 0.8 > 0.3 > counts["spliced_mean"]
    assert counts["spliced"] > counts["spliced_mean"]


def test_without_labels_and_texts_the_rest_is_measured(ray_cluster, root, make_plan, capfd):
    none = {"images.train.labels": "none", "images.heldout.labels": "none"}
    asked = {"measures": [*Concepts().measures, "splicing"], "taxonomy": "inaturalist"}
    plan = make_plan(root, concepts=asked, **none)
    plan.root.delete(plan.images["heldout"].labels_step.name)
    for images in plan.images.values():
        images.labels_step.folder.write_parquet("labels.parquet", images.labels)
        images.labels_step.finish(0.0, {})
    concepts.check(plan)
    said = capfd.readouterr().err
    assert "0 concept(s) of held-out images, none with 10 images that show it" in said
    assert "there are no names of classes to choose among: give concepts.vocabulary" in said
    assert "fewer than two classes of held-out images: no accuracy with reconstructions in place" in said
    concepts.run(plan)
    one = plan.concepts[1]
    tables, counts = ConceptTables(one.step.folder), one.step.record()["counts"]
    assert len(tables.concepts.concept) == 0
    assert "rho" not in counts
    assert counts["overlap_pairs"] > 0
    assert counts["coherence"] > 0
    assert counts["depth"] is None
    assert "spliced" not in counts


def test_a_study_is_measured_when_it_is_asked_for(ray_cluster, root, tmp_path):
    """The study that the root remembers has no `[concepts]`, and keeps none that cannot be measured."""
    wrong, remembered = tmp_path / "wrong.csv", (root / "study.json").read_bytes()
    wrong.write_text("image_id,even\nno such image,1\n")
    refused = CliRunner().invoke(main, ["concepts", "--root", str(root), "--set", f"concepts.file={wrong}"])
    assert (refused.exit_code, "has no row for" in refused.output) == (2, True)
    assert (root / "study.json").read_bytes() == remembered
    done = CliRunner().invoke(main, ["concepts", "--root", str(root), "--set", 'concepts.measures=["labels", "names"]'])
    assert done.exit_code == 0, done.output
    assert "measure" in done.stdout
    assert "raw neurons" in done.stdout
    assert "projection-batch_topk-x2-k4: " in done.stdout
    again = CliRunner().invoke(main, ["concepts", "--root", str(root), "--json"])
    found = json.loads(again.stdout)
    assert set(found) == {"raw-projection", "projection-batch_topk-x2-k4", "projection-matryoshka_batch_topk-x2-k4"}
    assert found["raw-projection"]["shuffled"]["n_measured"] > 0
