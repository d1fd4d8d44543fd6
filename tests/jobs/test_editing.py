"""`sae-ray edit` as users call it, in this process, on a small finished study."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from sae_ray.jobs.cli import main

from sae_ray.editing.operators import direction_of
from sae_ray.encoders.sources import directory_digest
from sae_ray.sae import load_sae
from sae_ray.steering import load_llava
from sae_ray.store.files import Folder
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan, remember
from tests.jobs.test_ask import refused, save_random_sae
from tests.small_study import finish_study, plan_study

LATENT = 5


def call(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stderr == ""
    return result.stdout


@pytest.fixture(scope="module")
def root(small_study, plan_small_study) -> Path:
    remember(plan_small_study(small_study))
    return small_study / "root"


@pytest.fixture(scope="module")
def sae(root) -> Path:
    """Of the layer that the LLaVA reads."""
    return Path(recalled_plan(str(root)).steerings[0].sae.step.folder.path)


@pytest.fixture(scope="module")
def make(tiny_llava, sae, tmp_path_factory):
    """`make(**options)`: the file of a patch."""

    def make(**options: object) -> Path:
        file = tmp_path_factory.mktemp("patches") / "p.safetensors"
        given = {"model": tiny_llava, "sae": sae, "latent": LATENT, "out": file} | options
        told = done("edit", "make", *(part for key, value in given.items() for part in (f"--{key}", value)))
        assert told.startswith(f"{file}: ")
        return file

    return make


def test_make_evaluate_apply_undo(root, sae, make, tiny_llava, tmp_path):
    files = [make(), make(mode="rows"), make(scope="writers"), make(scope="mlp")]
    options = ["--root", root, "--out", tmp_path / "edit.parquet"]
    text = done("edit", "evaluate", *files, *options)
    assert [line.split()[2:4] for line in text.splitlines()[1:]] == [
        ["project", "reader"],
        ["rows", "reader"],
        ["project", "writers"],
        ["project", "mlp"],
    ]
    rows = pq.read_table(tmp_path / "edit.parquet").to_pylist()
    reader, masked, writers, mlp = rows
    assert reader["own_variance_left"] < 1e-10
    assert all(0 < row["own_variance_left"] < 10 for row in (masked, mlp))
    assert len({row["n_firing_before"] for row in rows}) == 1
    assert all(sum(share for _, share in row["own_share_by_writer"]) == pytest.approx(1) for row in rows)
    [stays] = [share for writer, share in writers["own_share_by_writer"] if writer == "embeddings"]
    assert 0 < stays < 1
    assert writers["own_variance_left"] > 0

    plan = recalled_plan(str(root))
    llava, autoencoder, unit = load_llava(tiny_llava), load_sae(sae), direction_of(load_sae(sae), LATENT)
    images = [llava.white()]
    before, after = ([], [])
    copy = done("edit", "apply", files[2], "--out", tmp_path / "copy").strip()
    for model, seen in ((llava, before), (load_llava(copy), after)):
        model.image_embeddings(images, [[lambda x, seen=seen: seen.append(x) or x]])
    own = [torch.cat(one).double() @ unit for one in (before, after)]
    assert not torch.allclose(*own)
    assert autoencoder.d_in == before[0].shape[1]
    done("edit", "undo", copy)
    assert directory_digest(Path(copy)) == directory_digest(Path(tiny_llava)) == plan.survey.models.encoder.revision


def test_answers_to_other_prompts_are_compared(root, make, tiny_llava, tmp_path):
    options = ["--root", root, "--out", tmp_path / "edit.parquet", "--json"]
    [row] = json.loads(done("edit", "evaluate", make(), *options, "--prompt", "w3 w4?"))
    assert (row["latent"], row["mode"], row["scope"], row["keep"]) == (LATENT, "project", "reader", "origin")
    assert 0 <= row["unchanged"] <= 1
    assert row["reliability"] is row["generality"] is None  # a LLaVA of random weights names nothing


def test_ask_shows_the_edited_answer_beside_the_other(make, tiny_llava, sae):
    file = make()
    models = ["--llava", tiny_llava, "--max-new-tokens", 6]
    text = done("ask", "white", "w5", *models, "--edit", file)
    assert text.splitlines()[0].split("  ")[-1] == f"edited: latent {LATENT} out (project, reader)"
    said = json.loads(done("ask", "white", "w5", *models, "--edit", file, "--json"))
    llava = load_llava(tiny_llava)
    assert said["unsteered"] == llava.answer(llava.white(), "w5", max_new_tokens=6)
    assert said["steered"] == []
    assert (said["edit"]["latent"], said["edit"]["patch"]) == (LATENT, str(file))
    copy = file.with_name("copy")
    done("edit", "apply", file, "--out", copy)
    assert said["edited"] == load_llava(str(copy)).answer(llava.white(), "w5", max_new_tokens=6)

    steering = ["--sae", sae, "--latent", "7=400"]
    both = json.loads(done("ask", "white", "w5", *models, *steering, "--edit", file, "--json"))
    plainly = json.loads(done("ask", "white", "w5", "--llava", copy, "--max-new-tokens", 6, *steering, "--json"))
    assert both["steered"] == plainly["steered"]
    assert (both["unsteered"], both["edited"]) == (said["unsteered"], plainly["unsteered"])
    titles = done("ask", "white", "w5", *models, *steering, "--edit", file).splitlines()[0]
    assert [word in titles for word in ("unsteered", "edited: latent 5", "steered: latent 7 set to 400")] == [True] * 3
    rows = done("ask", "white", "w5", *models, "--sae", sae, "--latent", "7", "--sweep", "0,400", "--edit", file)
    assert [line.split("  ")[0].strip() for line in rows.splitlines()] == [
        "strength",
        "unsteered",
        f"edited: latent {LATENT} out (project, reader)",
        "0",
        "400",
    ]


def test_an_edit_needs_no_sae_to_ask_but_latents_do(make, tiny_llava):
    refused(call("ask", "white", "w5", "--llava", tiny_llava, "--latent", "3=4"), "--sae is missing")
    refused(call("ask", "white", "w5", "--llava", tiny_llava, "--edit", make(), "--mode", "ablate"), "no latent")
    refused(call("ask", "white", "w5", "--llava", tiny_llava, "--edit", "none"), "the patch none cannot be read")


def test_patches_that_the_study_cannot_evaluate_are_refused(root, make, tmp_path, tiny_llava, make_llava, sae):
    options = ["--root", root, "--out", tmp_path / "edit.parquet"]
    foreign = make(sae=save_random_sae(tmp_path / "foreign"))
    refused(call("edit", "evaluate", foreign, *options), "the SAE foreign, which is not one of", "root of its study")
    elsewhere = make(scope="writers", layer=0)
    refused(call("edit", "evaluate", elsewhere, *options), "the scope writers of block 0", "site layer1.all")
    other = make(model=make_llava(tmp_path / "other", layer=-1))
    refused(call("edit", "evaluate", other, *options), "the patch was made for", "of the revision")
    refused(call("edit", "evaluate", make(), "--root", tmp_path), "has no study.json")
    blocked = ["--root", root, "--out", foreign / "edit.parquet"]
    refused(call("edit", "evaluate", make(), *blocked), "--out is", "cannot be written")
    refused(call("edit", "apply", make(), "--model", tmp_path / "other", "--out", tmp_path / "x"), "was made for")
    refused(call("edit", "undo", tiny_llava), "is not an edited copy")
    refused(
        call("edit", "make", "--model", tiny_llava, "--sae", sae, "--latent", 99, "--out", tmp_path / "p"),
        "latent is 99",
    )
    assert not Folder(tmp_path / "x").exists()


@pytest.fixture(scope="module")
def clip_study(tiny_llava, tiny_clip, tiny_judge, tmp_path_factory) -> StudyPlan:
    """A study of a CLIP, with an SAE of its embedding and one of an MLP's output."""
    values = {
        "encoder.model": tiny_clip,
        "grid": [{"sites": ["projection", "layer1.mlp:all"], "expansions": [2], "k": [4]}],
        **dict.fromkeys(("concepts", "steering", "naming")),
    }
    plan = finish_study(
        plan_study(tmp_path_factory.mktemp("clip") / "study", tiny_llava, tiny_clip, tiny_judge, **values)
    )
    remember(plan)
    return plan


def test_patches_of_an_encoder_are_compared_on_its_activations(clip_study, make, tiny_clip, tmp_path):
    saes = {train.grid_cell.site.name: train.step.folder.path for train in clip_study.trains}
    embedding, of_mlp = saes["projection"], saes["layer1.mlp.all"]
    files = [
        make(model=tiny_clip, sae=embedding),
        make(model=tiny_clip, sae=of_mlp, scope="mlp", layer=1),
        make(model=tiny_clip, sae=of_mlp, mode="vectors", layer=1, kappa=0.3, value=-2.0),
    ]
    options = ["--root", clip_study.root.path, "--out", tmp_path / "edit.parquet", "--json"]
    projected, own_mlp, vectors = json.loads(done("edit", "evaluate", *files, *options))
    assert [row["scope"] for row in (projected, own_mlp, vectors)] == ["projection", "mlp", "mlp"]
    assert projected["own_variance_left"] < 1e-10
    assert own_mlp["own_variance_left"] < 1e-10
    assert vectors["own_variance_left"] > 1e-6
    assert vectors["others_relative_change"] > 0
    [*_, row] = pq.read_table(tmp_path / "edit.parquet").to_pylist()
    assert (row["mode"], row["reliability"], row["own_share_by_writer"]) == ("vectors", None, None)
    misplaced = make(model=tiny_clip, sae=of_mlp, scope="writers", layer=1)
    refused(call("edit", "evaluate", misplaced, *options), "the scope writers of block 1", "site layer1.mlp.all")
