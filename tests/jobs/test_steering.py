"""The steering stage on a real cluster: what it writes, that it resumes, and the search for latents."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner
from sae_ray.jobs import asking, status, steering, study
from sae_ray.jobs.cli import main
from sae_ray.jobs.progress import Progress

from sae_ray.encoders import describe_encoder
from sae_ray.errors import SaeRayError, UsageError
from sae_ray.steering.evaluation import rates
from sae_ray.steering.protocol import Question
from sae_ray.store.steps import hold
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import remember

from .conftest import OTHER_PROMPT


@pytest.fixture(scope="module")
def scored(steered, tmp_path_factory) -> Path:
    """A root where all is done but the steering and what follows it; copy it before writing to it."""
    root = tmp_path_factory.mktemp("scored") / "root"
    shutil.copytree(steered, root, ignore=shutil.ignore_patterns("steering-*", "pictures-*", "report", "summary.json"))
    return root


def answers_of(plan: StudyPlan) -> list[dict]:
    return plan.steerings[0].step.folder.read_parquet("answers.parquet").to_pylist()


def test_every_answer_is_a_row_and_rates_are_counted_from_rows(steered, make_steered):
    plan = make_steered(steered)
    [one] = plan.steerings
    rows = answers_of(plan)
    keys = [tuple(row[name] for name in ("kind", "latent", "concept", "image_index", "prompt")) for row in rows]
    assert len(set(keys)) == len(rows)
    assert {row["kind"] for row in rows} >= {
        "unsteered", "reconstruction", "white", "insertion", "neuron", "diffmean_white", "diffmean_insertion",
        "profile_white", "profile_insertion", "profile_suppression",
    }  # fmt: skip
    assert {row["prompt"] for row in rows} == {one.steering.prompt, OTHER_PROMPT}
    labels = plan.images["heldout"].labels["label_name"].to_pylist()
    images = {row["image_index"] for row in rows} - {-1}
    assert len(images) == 20
    assert "blank" not in {labels[image] for image in images}
    for row in rows:
        if row["image_index"] != -1:
            own = row["kind"] in (
                "unsteered",
                "reconstruction",
                "suppression",
                "diffmean_suppression",
                "profile_suppression",
            )
            assert (row["concept"] == labels[row["image_index"]]) == own, row

    record = one.step.record()
    answers, concepts = (one.step.folder.read_parquet(f"{name}.parquet") for name in ("answers", "concepts"))
    assert record["counts"] == {"rows": len(rows), **rates(answers, concepts, one.steering.prompt)}
    assert sorted(record["files"]) == [
        "answers.parquet", "concepts.parquet", "directions.parquet", "profiles.parquet",
    ]  # fmt: skip  # no parts are left
    assert sum(row["is_best"] for row in concepts.to_pylist()) == 3


def test_steering_reaches_the_answers(steered, make_steered):
    kinds = make_steered(steered).steerings[0].step.record()["counts"]["kinds"]
    assert kinds["unsteered"]["rate"] > 0.8
    assert kinds["reconstruction"]["rate"] > 0.4
    assert kinds["diffmean_insertion"]["rate"] > 0.5 > 0.1 > kinds["diffmean_insertion"]["unsteered_rate"]
    assert kinds["diffmean_insertion"]["similarity"] > kinds["diffmean_insertion"]["unsteered_similarity"] + 0.1
    assert kinds["insertion"]["rate"] > kinds["neuron"]["rate"]
    assert kinds["profile_insertion"]["rate"] > 0.5 > 0.1 > kinds["profile_insertion"]["unsteered_rate"]


def test_the_summary_and_the_status_show_it(steered, make_steered, tmp_path):
    plan = make_steered(steered)
    text = study.summary_text(plan, study.write_summary(plan))
    assert "Steering by layer3.random-4-matryoshka_batch_topk-x4-k8: latents set to 4 times their largest" in text
    assert "images of other classes, DiffMean added: names the concept" in text
    [entry] = [entry for entry in status.status(plan) if entry["stage"] == "steering"]
    assert entry["rows"] == len(answers_of(plan))
    [planned] = [entry for entry in status.dry_run(make_steered(tmp_path))["steps"] if entry["stage"] == "steering"]
    assert planned["rows"] >= len(answers_of(plan))


class Interrupted(Exception):
    pass


def test_an_interrupted_run_goes_on_where_it_was(steered, scored, make_steered, tmp_path, monkeypatch):
    monkeypatch.setattr(asking, "QUESTIONS_PER_BLOCK", 40)
    root = tmp_path / "root"
    shutil.copytree(scored, root)

    def stop(self: Progress, amount: int) -> None:
        self.done += amount
        if "answers" in self.label and self.done >= 80:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(asking.Progress, "advance", stop)
        with pytest.raises(Interrupted):
            steering.run(make_steered(root))
    plan = make_steered(root, **{"resources.steering.workers": 2})
    [one] = plan.steerings
    assert one.step.status() == "partial"
    parts = one.step.folder / "answers"
    assert len(parts.files()) >= 2
    first = min(parts.files())
    told = parts.read_parquet(first)["answer"].to_pylist()
    told[4] = "forged"  # so that it shows whether it is asked again
    parts.write_parquet(first, pa.table({"answer": told}))

    steering.run(plan)
    expected, found = answers_of(make_steered(steered)), answers_of(plan)
    assert (expected[4]["kind"], expected[4]["prompt"]) == ("reconstruction", OTHER_PROMPT)
    expected[4] |= {"steered": "forged", "right": False}
    assert found == expected


def test_only_answers_to_the_same_questions_are_taken_over(ray_cluster, scored, make_steered, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(scored, root)
    plan = make_steered(root)
    evaluation = steering.Evaluation(plan.steerings[0], plan.study.seed)
    actors = asking.Actors(evaluation.steering, plan.study.resources.steering)
    prompt = evaluation.steering.prompt
    questions = [Question("unsteered", -1, None, 0.0, image, prompt) for image in evaluation.heldout.usable[::20][:8]]
    parts = evaluation.folder / "answers"

    def answers(asked: list[Question], block: int) -> list[str]:
        monkeypatch.setattr(asking, "QUESTIONS_PER_BLOCK", block)
        return actors.answers(evaluation.plan, "answers", asked, evaluation.heldout)

    with hold([evaluation.plan.step]):
        told = answers(questions, 4)
        assert len(set(told)) > 1
        for file in parts.files():
            parts.write_parquet(file, pa.table({"answer": ["forged"] * 4}))  # so that it shows what is taken over
        assert answers(questions, 4) == ["forged"] * 8
        assert answers(questions[:4], 4) == ["forged"] * 4
        assert answers(questions, 3) == told
        assert answers(questions[::-1], 4) == told[::-1]
        other = [question._replace(kind="reconstruction") for question in questions[:4]]
        assert answers(other + questions[4:], 4)[4:] == ["forged"] * 4
        assert "forged" not in answers(other, 4)


def test_what_is_missing_is_named(scored, make_steered):
    with pytest.raises(SaeRayError, match=r"sae-layer3.* does not exist yet; run the train stage first"):
        steering.run(make_steered(scored, **{"training.steps": 301}))


def test_actors_load_what_the_step_is_named_by(make_steered, world, tmp_path):
    [one] = make_steered(tmp_path).steerings
    assert one.steering.revision == describe_encoder(f"{world}/llava").revision
    assert one.steering.scorer_revision == describe_encoder(f"{world}/clip").revision
    [pinned] = make_steered(tmp_path, **{"steering.revision": one.steering.revision}).steerings
    assert pinned.step.name == one.step.name


def test_a_llava_that_cannot_be_loaded_is_named(ray_cluster, scored, make_steered, world, tmp_path):
    root, llava = tmp_path / "root", tmp_path / "llava"
    shutil.copytree(scored, root)
    shutil.copytree(f"{world}/llava", llava)
    for file in llava.glob("*.safetensors"):
        file.rename(llava / "pytorch_model.bin")
    with pytest.raises(UsageError, match=f"{llava} cannot be loaded: .*safetensors"):
        steering.run(make_steered(root, **{"steering.llava": str(llava)}))


def test_more_actors_than_the_cluster_holds_are_refused(ray_cluster, scored, make_steered, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scored, root)
    with pytest.raises(UsageError, match=r"resources\.steering: 5 at once with cpus = 1 and gpus = 0 each do not fit"):
        steering.run(make_steered(root, **{"resources.steering.workers": 5}))


def test_latents_are_found_by_text(scored, make_steered, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(scored, root)
    remember(make_steered(root))

    def call(*arguments: str):
        return CliRunner().invoke(main, ["find", *arguments, "--root", str(root)])

    result = call("star", "--json", "-n", "1000")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    similarity = [row["similarity"] for row in rows]
    assert similarity == sorted(similarity, reverse=True)
    stars = [row["label"] == "star" and row["purity"] >= 0.5 for row in rows]
    assert any(stars)
    assert stars.index(True) < len(rows) // 4
    lines = call("star", "-n", "3").stdout.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[0] == str(rows[0]["latent"])
    refused = call("star", "--sae", "other")
    assert refused.exit_code == 2
    assert "--sae is 'other', which the study does not have; give --sae one of layer3" in refused.stderr
