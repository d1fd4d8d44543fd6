"""Studies: files that are read or refused with the remedy, and the plan of steps that they amount to."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE, TrainingConfig, save_sae
from sae_ray.sae.architectures import ARCHITECTURES, ArchitectureSettings
from sae_ray.steering.config import Steering
from sae_ray.steering.info import LlavaInfo
from sae_ray.store.files import Folder
from sae_ray.study.config import Study
from sae_ray.study.fields import field_help
from sae_ray.study.guidance import targets_of
from sae_ray.study.models import models_needed
from sae_ray.study.plan import StudyPlan, images_per_part
from sae_ray.study.root import skipped_lines
from sae_ray.study.survey import Survey, survey_models
from sae_ray.study.trained import cautions
from sae_ray.study.weights import significance, weights_ratio

STUDIES = Path(__file__).resolve().parents[2] / "studies"
WITH_SETTINGS = [name for name, kind in ARCHITECTURES.items() if dataclasses.fields(kind.Settings)]
MINIMAL = {
    "name": "s",
    "images": {"train": {"path": "/images"}},
    "encoder": {"model": "/clip"},
    "grid": [{"sites": ["projection"]}],
}


def study(overrides: dict[str, Any] | None = None, **values: Any) -> Study:
    return Study.from_dict(MINIMAL | values, overrides)


def refusal(overrides: dict[str, Any] | None = None, **values: Any) -> str:
    with pytest.raises(UsageError) as raised:
        study(overrides, **values)
    return str(raised.value)


def test_the_papers_study_is_read():
    paper = Study.load(STUDIES / "pach2025.toml")
    cells = paper.cells()
    # The defaults are the paper's settings, but for the threshold.
    training = TrainingConfig(threshold="average")
    defaults = dataclasses.replace(paper, training=training, architectures=ArchitectureSettings())
    assert [cell.cell.identity() for cell in cells] == [cell.cell.identity() for cell in defaults.cells()]
    assert (paper.judge.model, paper.judge.point) == ("facebook/dinov2-base", "pooled")
    assert paper.scoring.min_images == 2
    assert paper.steering == Steering("llava-hf/llava-1.5-7b-hf", dtype="bfloat16")  # the defaults again
    # Five sites, two kinds, six widths; four sparsities at two widths, two of which are there already; the steered one.
    assert len(cells) == 5 * 2 * 6 + (4 * 2 - 2) + 1
    assert {cell.site.name for cell in cells} == {
        "layer11.cls", "layer17.cls", "layer22.cls", "layer23.cls", "projection", "layer22.random-2",
    }  # fmt: skip
    assert {cell.cell.k for cell in cells} == {1, 10, 20, 50}
    assert {cell.cell.expansion for cell in cells} == {1, 2, 4, 8, 16, 64}
    names = [cell.name for cell in cells]
    assert len(set(names)) == len(names)
    assert names[0] == "layer11.cls-batch_topk-x1-k20"
    assert names[-1] == "layer22.random-2-matryoshka_batch_topk-x64-k20"
    assert "layer23.cls-matryoshka_batch_topk-x16-k1" in names


def test_the_demo_is_read():
    demo = Study.load(STUDIES / "demo.toml")
    *projection, steered = demo.cells()
    assert [cell.name for cell in projection] == [
        f"projection-batch_topk-x{expansion}-k{k}" for expansion in (1, 4, 16) for k in (5, 20)
    ]
    assert (steered.site.name, steered.cell.architecture) == ("layer3.random-4", "matryoshka_batch_topk")
    assert demo.steering is not None
    assert (demo.steering.strength, demo.steering.unit, demo.scoring.pictures) == (4, "max", "train")
    assert demo.training.steps == 1500
    assert (demo.resources.extract.workers, demo.resources.train.checkpoint_every) == (2, 500)


@pytest.mark.parametrize("name", ["frontier", "photos_frontier"])
def test_the_frontier_has_seeds_and_the_papers_two_over_a_wider_range(name: str):
    cells = Study.load(STUDIES / f"{name}.toml").cells()
    assert set(Counter(cell.recipe for cell in cells).values()) == {2}
    assert {cell.cell.expansion for cell in cells} == {4}
    of_method = defaultdict(set)
    for one in (cell.cell for cell in cells if cell.cell.k is not None):
        of_method[one.architecture, one.weights, one.monosemanticity].add(one.k)
    paper = [of_method.pop((kind, "uniform", 0)) for kind in ("batch_topk", "matryoshka_batch_topk")]
    for ks in of_method.values():
        assert all(min(one) < min(ks) and max(ks) < max(one) for one in paper)


@pytest.mark.parametrize("name", [path.name for path in STUDIES.glob("*.toml")])
def test_a_study_comes_back_from_plain_values(name: str):
    one = Study.load(STUDIES / name)
    assert Study.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert Study.from_dict(one.to_dict(), {"seed": 5}) == dataclasses.replace(one, seed=5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 1}, "sed: unknown key; did you mean 'seed'?"),
        ({"encoder": {"model": "m", "dtyp": "float32"}}, "encoder.dtyp: unknown key; did you mean 'dtype'?"),
        (
            {"images": {"train": {"path": "p", "lables": "none"}}},
            "images.train.lables: unknown key; did you mean 'labels'?",
        ),
        (
            {"images": {"train": {"path": "p"}, "heldout": {"pth": "p", "path": "q"}}},
            "images.heldout.pth: unknown key; did you mean 'path'?",
        ),
        (
            {"grid": [{"sites": ["projection"]}, {"sites": ["projection"], "expanion": [1]}]},
            "grid.1.expanion: unknown key; did you mean 'expansions'?",
        ),
        ({"training": {"stepz": 1}}, "training.stepz: unknown key; did you mean 'steps'?"),
        (
            {"training": {"group_fractions": [1]}},
            "training.group_fractions: unknown key; write architectures.matryoshka_batch_topk.group_fractions",
        ),
        (
            {"training": {"jumprelu_bandwidth": 1}},
            "training.jumprelu_bandwidth: unknown key; write architectures.jumprelu.bandwidth",
        ),
        (
            {"training": {"jumprelu_initial_threshold": 1}},
            "training.jumprelu_initial_threshold: unknown key; write architectures.jumprelu.initial_threshold",
        ),
        (
            {"architectures": {"jumprelu": {"bandwith": 1}}},
            "architectures.jumprelu.bandwith: unknown key; did you mean 'bandwidth'?",
        ),
        ({"architectures": {"jumprel": {}}}, "architectures.jumprel: unknown key; did you mean 'jumprelu'?"),
        (
            {"architectures": {"topk": {}}},
            f"architectures.topk: unknown key; known keys: {', '.join(WITH_SETTINGS)}",
        ),
        (
            {"resources": {"train": {"cell_per_bundle": 1}}},
            "resources.train.cell_per_bundle: unknown key; did you mean 'cells_per_bundle'?",
        ),
        (
            {"extraction": {"zzz": 1}},
            "extraction.zzz: unknown key; known keys: store_dtype, images_per_part, pixels",
        ),
        ({"steering": {"llava": "m", "strenght": 4}}, "steering.strenght: unknown key; did you mean 'strength'?"),
    ],
)
def test_an_unknown_key_is_told_from_the_nearest_known_one(values: dict, message: str):
    assert refusal(**values) == message


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": {}}, "encoder.model: missing; add it: A hub id, `open_clip:<architecture>/<pretrained tag>`"),
        ({"images": {"train": {}}}, "images.train.path: missing; add it: The folder: a local path"),
        ({"images": {}}, "images.train: missing; add it: The training images."),
        ({"steering": {}}, "steering.llava: missing; add it: The LLaVA whose vision tower is the encoder: a hub id or"),
        (
            {"grid": [{"k": [1]}]},
            "grid.0.sites: missing; add it: Where activations are taken from the encoder",
        ),
    ],
)
def test_a_missing_key_is_explained(values: dict, message: str):
    assert refusal(**values).startswith(message)


def test_all_problems_are_told_at_once():
    lines = refusal(seed="x", sed=1, encoder={}).splitlines()
    assert [line.split(":")[0].split(" ")[0] for line in lines] == ["encoder.model", "seed", "sed"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"name": 5}, "name = 5: Input should be a valid string"),
        ({"name": ""}, "name = '': give a name without slashes"),
        ({"name": "a/b"}, "name = 'a/b': give a name without slashes"),
        ({"seed": "x"}, "seed = 'x': Input should be a valid integer"),
        ({"seed": -1}, "seed = -1: Input should be greater than or equal"),
        ({"encoder.dtype": "int8"}, "encoder.dtype = 'int8': Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"encoder": "clip"}, "encoder = 'clip': Input should be a dictionary"),
        ({"grid": {"sites": ["projection"]}}, "grid = {'sites': ['projection']}: Input should be a list"),
        ({"grid": []}, "grid = []: add a [[grid]] with at least one site"),
        ({"grid.sites": "projection"}, "grid.0.sites = 'projection': Input should be a list"),
        ({"grid.sites": []}, "grid.sites = []: name at least one"),
        ({"grid.sites": ["layer3"]}, "site is 'layer3'; write layer<number>:<tokens>"),
        ({"grid.sites": ["layer3:none"]}, "tokens is 'none'; for a residual site it must be cls, mean"),
        ({"grid.expansions": [4, 0]}, "cell.expansion = 0.0: make it a number above 0"),
        ({"grid.expansions": []}, "grid.expansions = []: name at least one"),
        ({"grid.k": [4, 0]}, "cell.k = 0: make it at least 1 for batch_topk"),
        ({"grid.k": [2.5]}, "grid.0.k.0 = 2.5: Input should be a valid integer"),
        ({"grid.k": []}, "grid.k = []: batch_topk: name at least one"),
        ({"grid.weights": []}, "grid.weights = []: name at least one"),
        ({"grid.weights": "ms"}, "grid.0.weights = 'ms': Input should be a list"),
        ({"grid.monosemanticity": [-1]}, "grid.0.monosemanticity.0 = -1: Input should be greater than or equal to 0"),
        (
            {"grid.architectures": ["relu"], "grid.sparsity": [0.1], "grid.monosemanticity": [1]},
            "cell.monosemanticity = 1.0: make it 0 for relu, which does not select latents",
        ),
        ({"grid.alpha": -1}, "grid.0.alpha = -1: Input should be greater than or equal to 0"),
        ({"architectures.jumprelu.init": "random"}, "architectures.jumprelu.init = 'random': Input should be"),
        ({"grid.architectures": ["topkk"]}, "grid.architectures = 'topkk': unknown architecture; did you mean 'topk'?"),
        ({"grid.architectures": ["gated"]}, "grid.architectures = 'gated': unknown architecture; known here: "),
        ({"grid.architectures": ["relu"]}, "grid.sparsity = []: relu: name at least one coefficient"),
        # Not left out in silence because other cells are fine.
        ({"grid.architectures": ["topk", "relu"]}, "grid.sparsity = []: relu: name at least one coefficient"),
        ({"grid.sparsity": [0.1]}, "grid.sparsity = [0.1]: batch_topk has no sparsity coefficient; leave it out"),
        ({"grid.score_tokens": "cls"}, "tokens is 'cls'; a projection site has one vector per image: leave it out"),
        ({"images.heldout_fraction": 1}, "images.heldout_fraction = 1: Input should be less than 1"),
        ({"images.background": "whitish"}, "images.background = 'whitish': give a colour, such as white or #808080"),
        ({"images.background": "#ffffff80"}, "images.background = '#ffffff80': give a colour"),
        ({"images.white": 0}, "images.white = 0: Input should be greater than or equal to 1"),
        ({"images.max_bad_fraction": -0.1}, "images.max_bad_fraction = -0.1: Input should be greater than or equal"),
        ({"extraction.images_per_part": 0}, "extraction.images_per_part = 0: Input should be greater than or equal"),
        ({"scoring.min_images": 1}, "scoring.min_images = 1: Input should be greater than or equal"),
        ({"training.batch_size": 0}, "training.batch_size = 0: make it at least 1"),
        (
            {"training.steps": 500, "training.warmup_steps": 1000},
            "training.warmup_steps = 1000: make it between 0 and steps (500)",
        ),
        ({"architectures.jumprelu.bandwidth": 0}, "architectures.jumprelu.bandwidth = 0.0: make it a number above 0"),
        ({"architectures.jumprelu": 3}, "architectures.jumprelu = 3: Input should be a dictionary"),
        ({"resources.train.workers": 3}, "resources.train.workers = 3: choose a divisor of training.batch_size = 4096"),
        (
            {"resources.train.workers": 4, "resources.train.shards": 2},
            "resources.train.shards = 2: make it 1, or set resources.train.workers = 4 to 1: one bundle has workers or",
        ),
        ({"resources.train.shards": 0}, "resources.train.shards = 0: Input should be greater than or equal"),
        ({"resources.extract.workers": 0}, "resources.extract.workers = 0: Input should be greater than or equal"),
        ({"resources.score.gpus": -1}, "resources.score.gpus = -1: Input should be greater than or equal"),
        ({"resources.steering.batch_size": 0}, "resources.steering.batch_size = 0: Input should be"),
        ({"steering.llava": "m"}, "scoring.pictures = 'heldout': steering takes its concepts from training images"),
        ({"steering": {"llava": "m", "strength": math.inf}}, "steering.strength = inf: choose a finite number"),
        (
            {"concepts": {"file": "f", "ignore_labels": ["blank"]}},
            "concepts.ignore_labels = ['blank']: these are classes of images, and concepts.file replaces those",
        ),
        ({"steering": {"llava": "m", "min_purity": 0}}, "steering.min_purity = 0: Input should be greater than 0"),
        ({"steering": {"llava": "m", "n_images": 0}}, "steering.n_images = 0: Input should be greater than or equal"),
        ({"steering": {"llava": "m", "unit": "x"}}, "steering.unit = 'x': Input should be 'absolute' or 'max'"),
        (
            {"steering": {"llava": "m", "prompt": "a?", "other_prompts": ["a?"]}},
            "steering.other_prompts = 'a?': this is already steering.prompt; remove it",
        ),
        (
            {"resources.train.trackers": ["wandb", "aim"]},
            "resources.train.trackers = 'aim': choose among tensorboard, wandb, mlflow, trackio",
        ),
        ({"trainig.steps": 5}, "trainig: unknown key; did you mean 'training'?"),
        ({"training.step": 5}, "training.step: unknown key; did you mean 'steps'?"),
        ({"name.first": 5}, "name.first: name is not a table of the study file"),
        ({"images.train.path.x": 5}, "images.train.path.x: path is not a table of the study file"),
        ({"grid.k.first": 5}, "grid.k.first: k is not a table of the study file"),
        ({"grid.0.k": [5]}, "grid.0.k: 0 is not a table of the study file; write grid.<field>, which sets"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_with_field_value_and_remedy(overrides: dict, message: str):
    assert refusal(overrides).startswith(message)


def test_two_cells_are_not_taken_for_one():
    grid = {"sites": ["layer1:all"], "expansions": [2], "k": [4]}
    assert len(study(grid=[grid, grid]).cells()) == 1
    assert refusal(grid=[grid, grid | {"score_tokens": "cls"}]).startswith("grid = 'layer1.all-batch_topk-x2-k4': two")
    assert refusal({"grid.expansions": [1, 1.0000001]}).startswith("grid = 'projection-batch_topk-x1-k20': two cells")


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    with pytest.raises(UsageError, match=r"nowhere\.toml cannot be read \(No such file.*that sae-ray ships: demo,"):
        Study.load(tmp_path / "nowhere.toml")
    with pytest.raises(UsageError, match=r"cannot be read \(Is a directory\)"):
        Study.load(tmp_path)
    for content in (b"name = ", b"\xff\xfe"):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.toml is not TOML: "):
            Study.load(tmp_path / "bad.toml")
    (tmp_path / "dated.toml").write_text("seed = 2025-01-01\n")
    with pytest.raises(UsageError, match="seed = '2025-01-01': Input should be a valid integer"):
        Study.load(tmp_path / "dated.toml")


def test_overrides_are_put_over_the_file(tmp_path: Path):
    (tmp_path / "s.toml").write_text(
        'name = "s"\nimages.train.path = "a"\nencoder.model = "m"\n[[grid]]\nsites = ["projection"]\nk = [1]\n'
        '[[grid]]\nsites = ["pooled"]\nk = [2]\n[training]\nbatch_size = 8\n'
    )
    one = Study.load(
        tmp_path / "s.toml",
        {
            "images.train.path": "b",
            "images.heldout.path": "c",
            "grid.expansions": [2, 4],
            "training.steps": 2000,
            "resources.train.cpus": 2,
            "seed": 3,
        },
    )
    assert (one.images.train.path, one.seed, one.resources.train.cpus) == ("b", 3, 2)
    assert one.images.heldout is not None
    assert one.images.heldout.path == "c"
    assert (one.training.batch_size, one.training.steps) == (8, 2000)
    assert [(grid.sites, grid.k, grid.expansions) for grid in one.grid] == [
        (("projection",), (1,), (2, 4)),
        (("pooled",), (2,), (2, 4)),
    ]


def test_overrides_alone_make_a_study():
    values = {"images.train.path": "i", "encoder.model": "m", "grid.sites": ["pooled"], "grid.k": [3]}
    assert [cell.name for cell in Study.from_dict({"name": "s"}, values).cells()] == ["pooled-batch_topk-x8-k3"]


def test_overrides_leave_the_given_values_alone():
    before = json.dumps(MINIMAL)
    study({"grid.k": [3], "images.train.path": "elsewhere"})
    assert json.dumps(MINIMAL) == before


def test_a_field_left_out_before_can_be_overridden():
    remembered = study().to_dict()
    assert remembered["images"]["heldout"] is None
    assert Study.from_dict(remembered, {"images.heldout.path": "h"}).images.heldout is not None


def test_a_cells_seed_comes_from_its_name_alone():
    def seeds(grid: list[dict], seed: int = 0) -> dict[str, int]:
        return {cell.name: cell.cell.seed for cell in study(grid=grid, seed=seed).cells()}

    one = {"sites": ["projection"], "expansions": [1, 2], "k": [2, 4]}
    more = [
        {"sites": ["layer0:cls"], "architectures": ["topk"]},
        one | {"k": [1, 2, 4], "architectures": ["matryoshka_batch_topk", "batch_topk"]},
    ]
    assert seeds([one]).items() <= seeds(more).items()
    assert len(seeds(more)) == 1 + 12
    assert len(set(seeds(more).values())) == 13
    assert set(seeds([one], seed=1).values()).isdisjoint(seeds([one]).values())


def test_baselines_stand_in_a_grid_beside_what_is_compared_with_them():
    """With several seeds, each of which is another draw of their directions and another order of the data."""
    kinds = ["batch_topk", "frozen_decoder", "random"]
    cells = study(grid=[{"sites": ["projection"], "architectures": kinds, "k": [4], "seeds": [0, 1]}]).cells()
    assert [cell.name for cell in cells] == [
        f"projection-{kind}-x8-k4{seed}" for seed in ("", "-seed1") for kind in kinds
    ]
    assert len({cell.cell.seed for cell in cells}) == 6


@pytest.mark.parametrize(
    ("training", "cautious"),
    [
        ({"steps": 1000, "batch_size": 100}, True),
        ({"steps": 1000, "batch_size": 100, "dead_after_samples": 10_000}, False),
        ({"steps": 1000, "batch_size": 100, "auxk_weight": 0}, False),
        ({}, False),
    ],
)
def test_training_that_is_too_short_for_dead_latents_is_told(training: dict, cautious: bool):
    found = cautions(study(training=training))
    assert len(found) == cautious
    for line in found:
        assert "training.dead_after_samples = 10,000,000 is more than the 100,000 samples" in line
    assert cautions(study(training=training, grid=[{"sites": ["projection"], "architectures": ["random"]}])) == []


def test_weights_are_a_dimension_of_the_grid():
    grid = {"sites": ["projection"], "weights": ["uniform", "ms", "inverse_variance", "/tables/ranks.parquet"]}
    cells = {cell.name: cell.cell for cell in study(grid=[grid, grid | {"weights": ["ms"], "alpha": 1}]).cells()}
    base = "projection-batch_topk-x8-k20"
    assert list(cells) == [
        base,
        *(f"{base}-weights.{of}" for of in ("ms", "inverse_variance", "ranks", "ms.1")),
    ]
    [unweighted] = study(grid=[{"sites": ["projection"], "alpha": 2}]).cells()
    assert unweighted.cell.identity() == cells[base].identity()
    identities = [cell.identity()["weights"] for cell in list(cells.values())[1:]]
    assert [one["source"] for one in identities] == ["ms", "inverse_variance", "table", "ms"]
    assert [one["alpha"] for one in identities] == [0.5, 0.5, 0.5, 1.0]
    tables = grid | {"weights": ["/a/ranks.parquet", "/b/ranks.parquet"]}
    assert refusal(grid=[tables]).startswith(f"grid = '{base}-weights.ranks': two cells of this name differ")


def test_help_is_the_docstring_of_the_field():
    assert field_help("encoder.revision") == "Commit, tag or branch of what is on the hub."
    assert field_help("images.heldout.path").startswith("The folder: a local path (`~` is your home)")
    assert field_help("grid.k") == "Average number of active latents per row, for the TopK family."
    assert field_help("training.steps") == "Optimiser steps."
    assert field_help("architectures.guided_batch_topk.concept_weight").startswith("Weight of the loss of concepts")
    assert field_help("architectures.jumprelu.initial_threshold").startswith("The threshold before the first step")
    assert field_help("resources.score.gpus") == "GPUs per task. Default: 1 if the cluster has GPUs."


# Plans


MakePlan = Callable[..., StudyPlan]


@pytest.fixture
def make_plan(tmp_path: Path, tiny_clip: str, tiny_judge: str) -> MakePlan:
    """The plan of a small study of two sites over a folder of 40 files, which planning never opens."""
    images = tmp_path / "images"
    images.mkdir()
    for number in range(40):
        (images / f"{number:02d}.png").touch()

    def make(overrides: dict[str, Any] | None = None, root: Path = tmp_path / "root") -> StudyPlan:
        values = {
            "name": "s",
            "images": {"train": {"path": str(images)}, "heldout_fraction": 0.25},
            "encoder": {"model": tiny_clip},
            "judge": {"model": tiny_judge, "point": "projection"},
            "grid": [{"sites": ["projection", "layer1:random:2"], "expansions": [2], "k": [4]}],
        }
        return StudyPlan(Study.from_dict(values, overrides), Folder(root))

    return make


def names(plan: StudyPlan) -> dict[str, str]:
    """Label -> name of every step."""
    steps = list(plan.steps)
    assert len({step.label for step in steps}) == len(steps)
    return {step.label: step.name for step in steps}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {label for label in before if before[label] != after[label]}


MANIFESTS = {"manifest-train", "manifest-heldout"}
LABELS = {"labels-train", "labels-heldout"}
PROJECTION = {"activations-train-projection", "activations-heldout-projection"}
RANDOM = {"activations-train-layer1.random-2", "activations-heldout-layer1.random-2"}
EMBEDDINGS = {"embeddings-heldout"}
SAES = {"sae-projection-batch_topk-x2-k4", "sae-layer1.random-2-batch_topk-x2-k4"}
FIDELITY = {label.replace("sae-", "fidelity-", 1) for label in SAES}
SAE_SCORES = {label.replace("sae-", "scores-heldout-", 1) for label in SAES}
RAW_SCORES = {"scores-heldout-raw-projection", "scores-heldout-raw-layer1.random-2"}
RAW_RANDOM = {"scores-heldout-raw-layer1.random-2"}
PICTURES = {"pictures"}
TRAINED = SAES | FIDELITY | SAE_SCORES | PICTURES
JUDGED = FIDELITY | SAE_SCORES | RAW_SCORES | PICTURES
SCORES = SAE_SCORES | RAW_SCORES | PICTURES
ACTIVATIONS = PROJECTION | RANDOM


def test_a_plan_lists_the_steps_in_the_order_of_work(make_plan: MakePlan, tmp_path: Path):
    plan = make_plan()
    steps = list(plan.steps)
    assert {step.label for step in steps} == MANIFESTS | LABELS | ACTIVATIONS | EMBEDDINGS | SAES | FIDELITY | SCORES
    stages = [step.stage for step in steps if step.stage not in ("manifest", "labels")]
    assert stages == sorted(stages, key=["extract", "train", "evaluate", "score", "pictures"].index)
    known: set[str] = set()
    for step in steps:
        read = {value for value in step.config.values() if isinstance(value, str)} & {other.name for other in steps}
        assert read <= known  # what a step reads comes before it
        known.add(step.name)
    assert not (tmp_path / "root").exists()  # nothing is written
    heldout, train = (plan.images[name].n_images for name in ("heldout", "train"))
    assert (heldout + train, 0 < heldout < 20) == (40, True)
    sizes = {extract.step.label: (extract.rows, extract.width) for extract in plan.extracts}
    assert sizes["activations-heldout-projection"] == (heldout, 16)
    assert sizes["activations-train-layer1.random-2"] == (2 * train, 32)
    assert [train.d_sae for train in plan.trains] == [32, 64]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"training.steps": 50_000}, TRAINED),
        ({"training.gradient_clip": 2.0}, TRAINED),
        ({"training.threshold": "average"}, TRAINED),
        ({"training.threshold": "calibrated"}, set()),
        ({"training.centre": False}, set()),
        ({"training.centre": True}, TRAINED),
        ({"training.warmup_steps": 1000}, set()),  # as it stands anyway
        ({"training.sparsity_warmup_steps": 5}, set()),
        ({"architectures.jumprelu.bandwidth": 0.1}, set()),
        ({"architectures.jumprelu.init": "aip"}, set()),
        ({"grid.weights": ["uniform"], "grid.alpha": 1.0}, set()),
        ({"grid.monosemanticity": [0]}, set()),
        ({"shuffle_rows": 1000}, TRAINED),
        ({"seed": 1}, TRAINED | RANDOM | RAW_RANDOM),
        ({"encoder.dtype": "bfloat16"}, ACTIVATIONS | TRAINED | RAW_SCORES),
        ({"encoder.compile": False}, set()),
        ({"encoder.compile": True}, ACTIVATIONS | TRAINED | RAW_SCORES),
        ({"judge.compile": True}, EMBEDDINGS | SCORES),
        ({"judge.dtype": "bfloat16"}, EMBEDDINGS | SCORES),
        ({"judge.point": "pooled"}, EMBEDDINGS | SCORES),
        ({"extraction.store_dtype": "float32"}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"extraction.pixels": "fast"}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"extraction.pixels": "gpu"}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"extraction.images_per_part": 7}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"images.heldout_fraction": 0.5}, MANIFESTS | LABELS | ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"scoring.top_images": 4}, SCORES),
        ({"scoring.min_images": 10}, PICTURES),
        ({"images.max_bad_fraction": 0.5}, set()),
        ({"images.background": "white"}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"images.white": 4095}, ACTIVATIONS | EMBEDDINGS | TRAINED | RAW_SCORES),
        ({"name": "other"}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_a_setting_changes_the_steps_that_it_decides(make_plan: MakePlan, overrides: dict, expected: set[str]):
    assert changed(names(make_plan()), names(make_plan(overrides))) == expected


@pytest.mark.parametrize(
    ("n_images", "expected"), [(1, 16), (256, 16), (500, 32), (1000, 64), (1025, 128), (6000, 384), (1_281_167, 512)]
)
def test_small_sets_have_small_parts(n_images: int, expected: int):
    """Some 16 of them, in whole batches where there are images enough."""
    assert images_per_part(512, n_images) == expected
    assert images_per_part(50, n_images) == min(50, expected)


def test_weights_of_dimensions_add_steps_and_change_none(make_plan: MakePlan):
    """But for the pictures. Raw neurons that weigh dimensions are scored before the SAEs are trained."""
    before = names(make_plan())
    del before["pictures"]
    plan = make_plan({"grid.weights": ["uniform", "ms", "variance"]})
    assert before.items() < names(plan).items()
    steps = list(plan.steps)
    [first, *_] = (place for place, step in enumerate(steps) if step.stage == "train")
    assert {step.label for step in steps[:first] if step.stage == "score"} == RAW_SCORES
    by_ms = [train for train in plan.trains if train.raw_scores]
    assert [train.grid_cell.cell.weights for train in by_ms] == ["ms"] * 2
    assert all(step in steps[: steps.index(train.step)] for train in plan.trains for step in train.inputs)
    rejudged = names(make_plan({"grid.weights": ["uniform", "ms", "variance"], "judge.dtype": "bfloat16"}))
    saes = {label for label in changed(names(plan), rejudged) if label.startswith("sae-")}
    assert saes == {train.step.label for train in by_ms}, "their weights are other ones"


def test_monosemanticity_as_a_goal_needs_the_judge_on_training_images(make_plan: MakePlan):
    before = names(make_plan())
    del before["pictures"]
    plan = make_plan({"grid.monosemanticity": [0, 0.1]})
    after = names(plan)
    assert before.items() < after.items()
    goals = {label + "-mono0.1" for label in SAES | FIDELITY | SAE_SCORES}
    assert after.keys() - before.keys() == goals | {"embeddings-train"} | PICTURES
    steps = list(plan.steps)
    for train in plan.trains:
        assert [step.label for step in train.inputs][1:] == ["embeddings-train"] * bool(
            train.grid_cell.cell.monosemanticity
        )
        assert all(step in steps[: steps.index(train.step)] for step in train.inputs)
    rejudged = names(make_plan({"grid.monosemanticity": [0, 0.1], "judge.dtype": "bfloat16"}))
    retrained = {label for label in changed(after, rejudged) if label.startswith("sae-")}
    assert retrained == {f"{label}-mono0.1" for label in SAES}


def test_a_table_of_weights_counts_by_its_values(make_plan: MakePlan, tmp_path: Path):
    def given(place: str, s: list[float]) -> dict[str, Any]:
        path = tmp_path / place / "mine.parquet"
        path.parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"dimension": range(len(s)), "s": s}), path)
        return {"grid.sites": ["projection"], "grid.weights": [str(path)]}

    ones = [1.0] * 16
    before = names(make_plan(given("here", ones)))
    assert names(make_plan(given("there", ones))) == before
    weighted = {"sae-projection-batch_topk-x2-k4-weights.mine"}
    assert weighted < changed(before, names(make_plan(given("here", [2.0, *ones[1:]]))))
    with pytest.raises(
        UsageError, match=r"grid\.weights = .*: it has 3 dimensions, but the activations of projection h"
    ):
        make_plan(given("here", [1.0, 2.0, 3.0]))
    with pytest.raises(UsageError, match=r"grid\.weights = .*: has other values; give a parquet table"):
        make_plan(given("here", [-1.0, *ones[1:]]))
    plan = make_plan(given("here", [2.0, *ones[1:]]))
    recalled = Survey.from_dict(json.loads(json.dumps(plan.survey.to_dict())))
    assert names(StudyPlan(plan.study, plan.root, recalled)) == names(plan)
    [train] = plan.trains
    assert weights_ratio(train) == pytest.approx(2**0.5)
    given("here", ones)
    with pytest.raises(SaeRayError, match="the table has changed since the study was planned"):
        significance(train)


def test_an_sae_to_start_from_counts_by_its_weights(make_plan: MakePlan, tmp_path: Path):
    def start(place: str, architecture: str = "relu", d_in: int = 16, value: float = 0.0) -> dict[str, Any]:
        W_enc = torch.eye(d_in, 32) + value
        sae = SAE(architecture, W_enc, W_enc.T.clone(), torch.zeros(32), torch.zeros(d_in), k=4)
        save_sae(sae, Folder(tmp_path / place))
        return {
            "grid.sites": ["projection"], "grid.architectures": ["relu"], "grid.sparsity": [0.1],
            "training.init": str(tmp_path / place),
        }  # fmt: skip

    overrides = start("here")
    before, plan = names(make_plan(overrides)), make_plan(overrides)
    assert names(make_plan(start("there"))) == before
    assert "sae-projection-relu-x2-s0.1" in changed(before, names(make_plan(start("other", value=0.5))))
    assert "sae-projection-relu-x2-s0.1" in changed(before, names(make_plan(overrides | {"training.init": None})))
    recalled = Survey.from_dict(json.loads(json.dumps(plan.survey.to_dict())))
    assert names(StudyPlan(plan.study, plan.root, recalled)) == before
    for wrong in (start("topk", "topk"), start("wide", d_in=24), overrides | {"grid.expansions": [4]}):
        with pytest.raises(
            UsageError, match=r"training\.init = .*: it is a .* SAE with d_in = .*, but projection-relu-x"
        ):
            make_plan(wrong)
    with pytest.raises(UsageError, match=r"training\.init = '/nowhere'"):
        make_plan({"training.init": "/nowhere"})


def test_a_second_moment_needs_rows(make_plan: MakePlan):
    overrides = {"grid.architectures": ["jumprelu"], "grid.sparsity": [0.1], "architectures.jumprelu.init": "aip"}
    with pytest.raises(
        UsageError, match=r'jumprelu\.init = "aip": projection has \d+ training activations, but .* 320'
    ):
        make_plan(overrides)


def test_what_is_skipped_changes_no_step_and_is_told(make_plan: MakePlan, tmp_path: Path):
    before = make_plan()
    assert skipped_lines(before) == []
    (tmp_path / "images" / "README.md").touch()
    (tmp_path / "images" / "@eaDir").mkdir()
    (tmp_path / "images" / "@eaDir" / "01.png").touch()
    plan = make_plan()
    assert names(plan) == names(before)
    where = f"skipped in {tmp_path / 'images'}, since their names are not those of images"
    assert skipped_lines(plan) == [f"images.train: {where}: 1 × .md, 1 × @eaDir/"], "once for a folder that is split"
    remembered = json.loads(json.dumps(plan.survey.to_dict()))
    assert Survey.from_dict(remembered).images["train"].skipped == {".md": 1, "@eaDir/": 1}
    for images in remembered["images"].values():
        del images["skipped"]
    assert Survey.from_dict(remembered) == plan.survey, "an older root does not tell"


def test_labels_change_only_what_reads_them(make_steered: MakePlan, tmp_path: Path):
    """A label file, and then one label in it: activations, SAEs, fidelity and scores stay."""
    before = names(make_steered())
    file = tmp_path / "labels.csv"
    rows = [f"{number:02d}.png,{('cat', 'dog')[number % 2]}" for number in range(40)]
    file.write_text("\n".join(["image_id,label", *rows]))
    labelled = names(make_steered({"images.train.labels": str(file)}))
    assert changed(before, labelled) == LABELS | STEERING | PICTURES
    file.write_text("\n".join(["image_id,label", *rows[:-1], "39.png,fish"]))
    [side] = changed(labelled, names(make_steered({"images.train.labels": str(file)}))) - STEERING - PICTURES
    assert side in LABELS


GUIDED = {"grid.architectures": ["guided_batch_topk", "batch_topk"], "grid.sites": ["projection"]}
LEARNT = {"sae-projection-guided_batch_topk-x2-k4", "fidelity-projection-guided_batch_topk-x2-k4"}


def test_labels_and_their_loss_are_what_guided_cells_alone_depend_on(make_plan: MakePlan, tmp_path: Path):
    plan = make_plan(GUIDED)
    before, of_guided = names(plan), LEARNT | {"scores-heldout-projection-guided_batch_topk-x2-k4"} | PICTURES
    plain = names(make_plan({"grid.sites": ["projection"]}))
    assert {label: before[label] for label in plain.keys() - PICTURES} == {
        label: name for label, name in plain.items() if label not in PICTURES
    }
    known: set[str] = set()
    for train in plan.trains:
        assert len(train.inputs) == (3 if train.grid_cell.cell.guided else 1)
    for step in plan.steps:
        read = {value for value in step.config.values() if isinstance(value, str)} & set(before.values())
        assert read <= known
        known.add(step.name)
    weighted = names(make_plan(GUIDED | {"architectures.guided_batch_topk.positive_weight": 3.0}))
    assert changed(before, weighted) == of_guided
    assert names(make_plan(GUIDED | {"architectures.guided_topk.positive_weight": 3.0})) == before

    file = tmp_path / "labels.csv"
    rows = [f"{number:02d}.png,{('cat', 'dog')[number % 2]}" for number in range(40)]
    file.write_text("\n".join(["image_id,label", *rows]))
    labels = GUIDED | {"images.train.labels": str(file)}
    labelled = names(make_plan(labels))
    assert changed(before, labelled) == LABELS | of_guided
    without = {"architectures.guided_batch_topk.concept_weight": 0.0}
    assert changed(names(make_plan(GUIDED | without)), names(make_plan(labels | without))) == LABELS


def test_what_guided_cells_learn_is_what_is_in_their_file(make_plan: MakePlan, tmp_path: Path):
    file, other = tmp_path / "one.csv", tmp_path / "other.csv"
    file.write_text("\n".join(["image_id,wet,fish", *(f"{number:02d}.png,{number % 2},.25" for number in range(40))]))
    shutil.copy(file, other)
    field = "architectures.guided_batch_topk.concepts"
    plan = make_plan(GUIDED | {field: str(file)})
    before = names(plan)
    assert names(make_plan(GUIDED | {field: str(other)})) == before
    for images in plan.images.values():
        targets = targets_of(plan, plan.trains, images)[str(file)]
        assert targets.concepts == ("fish", "wet")
        numbers = [int(image_id[:2]) for image_id in images.manifest["image_id"].to_pylist()]
        assert targets.values.tolist() == [[0.25, number % 2] for number in numbers]
    remembered = Survey.from_dict(json.loads(json.dumps(plan.survey.to_dict())))
    assert remembered.files == plan.survey.files

    other.write_text(file.read_text().replace(".25", ".5"))
    assert changed(before, names(make_plan(GUIDED | {field: str(other)}))) >= LEARNT
    file.write_text(file.read_text().replace(".25", "2"))
    with pytest.raises(UsageError, match=r"one\.csv: changed since the root was planned; use"):
        targets_of(plan, plan.trains, plan.images["train"])
    bad = make_plan(GUIDED | {field: str(file)})
    with pytest.raises(UsageError, match=rf"^{field} = .*fish is '2'; give a number from 0 to 1 or nothing"):
        targets_of(bad, bad.trains, bad.images["train"])
    file.unlink()
    with pytest.raises(UsageError, match=f"{field} .*cannot be read"):
        make_plan(GUIDED | {field: str(file)})


def test_guided_cells_need_a_label_and_a_latent_for_each_concept(make_plan: MakePlan, tmp_path: Path):
    plan = make_plan(GUIDED)
    with pytest.raises(UsageError, match=r"\.guided_batch_topk\.concepts = 'labels': no training image has a label"):
        targets_of(plan, plan.trains, plan.images["train"])
    assert targets_of(plan, plan.trains, plan.images["heldout"])["labels"].concepts == ()
    file = tmp_path / "labels.csv"
    file.write_text("\n".join(["image_id,label", *(f"{number:02d}.png,class {number:02d}" for number in range(40))]))
    few = make_plan(GUIDED | {"images.train.labels": str(file), "grid.expansions": [1]})
    with pytest.raises(UsageError, match=r"cell\.expansion = 1\.0: make it at least \d+/16: each of \d+ concepts"):
        targets_of(few, few.trains, few.images["train"])
    nothing = {"images.train.labels": "none", "grid.architectures": ["guided_topk"]}
    assert refusal(nothing).startswith("images.train.labels = 'none': guided_topk learns the labels of images; give")


def test_resources_and_root_change_no_step(make_plan: MakePlan, tmp_path: Path):
    before = names(make_plan())
    resources = study().to_dict()["resources"]
    overrides = {
        f"resources.{stage}.{name}": 2 if value is None else value * 2
        for stage, fields in resources.items()
        for name, value in fields.items()
    }
    assert len(overrides) == 30
    overrides["resources.train.trackers"] = ["wandb"]
    shards = {"resources.train.shards": overrides.pop("resources.train.shards")}  # never beside several workers
    assert names(make_plan(overrides)) == names(make_plan(shards)) == before
    assert names(make_plan(root=tmp_path / "elsewhere")) == before


def test_a_new_image_changes_what_is_made_of_its_set(make_plan: MakePlan, tmp_path: Path):
    heldout = tmp_path / "heldout"
    heldout.mkdir()
    (heldout / "a.png").touch()
    overrides = {"images.heldout.path": str(heldout)}
    before = names(make_plan(overrides))
    (tmp_path / "images" / "more.png").touch()
    of_train = {label for label in MANIFESTS | LABELS | ACTIVATIONS if "-train" in label}
    assert changed(before, names(make_plan(overrides))) == of_train | TRAINED
    before = names(make_plan(overrides))
    (heldout / "b.png").touch()
    of_heldout = {label for label in MANIFESTS | LABELS | ACTIVATIONS if "-heldout" in label}
    assert changed(before, names(make_plan(overrides))) == of_heldout | EMBEDDINGS | JUDGED


def test_an_encoder_is_its_files_wherever_they_lie(
    make_plan: MakePlan, make_clip: Callable[..., str], tiny_clip: str, tmp_path: Path
):
    before = names(make_plan())
    copied = shutil.copytree(tiny_clip, tmp_path / "copied")
    assert names(make_plan({"encoder.model": str(copied)})) == before
    other = make_clip(tmp_path / "other", seed=2)
    assert changed(before, names(make_plan({"encoder.model": other}))) == ACTIVATIONS | TRAINED | RAW_SCORES
    assert changed(before, names(make_plan({"judge.model": other}))) == EMBEDDINGS | SCORES


def test_more_cells_and_pictures_add_steps_and_change_none(make_plan: MakePlan):
    """But for the pictures, which are those of all cells."""
    before = names(make_plan())
    del before["pictures"]
    more = names(make_plan({"grid.k": [2, 4], "grid.sites": ["layer0:cls", "projection", "layer1:random:2"]}))
    assert before.items() < more.items()
    pictures = names(make_plan({"scoring.pictures": "train"}))
    assert before.items() < pictures.items()
    assert pictures.keys() - before.keys() == {label.replace("-heldout-", "-train-") for label in SCORES}


SAE_CONCEPTS = {label.replace("sae-", "concepts-", 1) for label in SAES}
RAW_CONCEPTS = {"concepts-raw-projection", "concepts-raw-layer1.random-2"}
CONCEPTS = SAE_CONCEPTS | RAW_CONCEPTS


def test_concepts_add_steps_and_change_none(make_plan: MakePlan):
    before, plan = names(make_plan()), make_plan({"concepts": {}})
    after = names(plan)
    assert after.keys() - before.keys() == CONCEPTS
    assert changed(before, {label: after[label] for label in before}) == set()
    known: set[str] = set()
    for step in plan.steps:
        one = next((one for one in plan.concepts if one.step is step), None)
        assert one is None or {read.name for read in one.inputs} <= known
        known.add(step.name)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"concepts.max_concepts": 100}, set()),  # as it stands anyway
        ({"concepts.max_concepts": 7}, CONCEPTS),
        ({"concepts.measures": ["fms"]}, CONCEPTS),
        ({"concepts.ignore_labels": ["blank"]}, CONCEPTS),
        ({"concepts.taxonomy": "inaturalist"}, CONCEPTS),
        ({"concepts.measures": ["fms", "splicing"]}, CONCEPTS),
        ({"resources.concepts.workers": 2}, set()),
        ({"training.steps": 50_000}, TRAINED | SAE_CONCEPTS),
        ({"judge.dtype": "bfloat16"}, EMBEDDINGS | SCORES),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else None,  # a set has no order
)
def test_settings_of_concepts_change_its_own_steps(make_plan: MakePlan, overrides: dict, expected: set[str]):
    assert changed(names(make_plan({"concepts": {}})), names(make_plan({"concepts": {}, **overrides}))) == expected


@pytest.mark.parametrize("field", ["file", "vocabulary", "taxonomy"])
def test_concepts_depend_on_what_is_in_their_files(make_plan: MakePlan, tmp_path: Path, field: str):
    file, other = tmp_path / "one.csv", tmp_path / "other.csv"
    file.write_text("image_id,fish\n00.png,1\n")
    shutil.copy(file, other)
    before = names(make_plan({f"concepts.{field}": str(file)}))
    assert before != names(make_plan({"concepts": {}}))
    assert names(make_plan({f"concepts.{field}": str(other)})) == before
    other.write_text("image_id,fish\n00.png,0\n")
    assert changed(before, names(make_plan({f"concepts.{field}": str(other)}))) == CONCEPTS
    with pytest.raises(UsageError, match=f"concepts.{field} .*cannot be read"):
        make_plan({f"concepts.{field}": str(tmp_path / "none.csv")})


def test_depths_and_classes_are_those_of_the_labels_also_beside_a_concept_file(make_plan: MakePlan, tmp_path: Path):
    file, labels = tmp_path / "concepts.csv", tmp_path / "labels.csv"
    file.write_text("image_id,fish\n")
    rows = [f"{number:02d}.png,{'cat' if number % 2 else 'dog'}" for number in range(40)]
    labels.write_text("\n".join(["image_id,label", *rows]))
    relabelled = {"images.train.labels": str(labels)}
    for asked in ({"taxonomy": "inaturalist"}, {"measures": ["splicing"]}):
        given = {"concepts": {"file": str(file), **asked}}
        assert changed(names(make_plan(given)), names(make_plan({**given, **relabelled}))) >= CONCEPTS
    given = {"concepts": {"file": str(file)}}
    assert not changed(names(make_plan(given)), names(make_plan({**given, **relabelled}))) & CONCEPTS


def test_reconstructions_are_put_where_an_output_is_computed_from(make_plan: MakePlan, tiny_llava: str):
    asked = {
        "concepts.measures": ["splicing"],
        "grid.sites": ["projection", "layer1:random:2", "layer0:mean", "pooled"],
    }
    plan = make_plan(asked)
    found = {one.name.split("-batch")[0]: one for one in plan.concepts if one.sae is not None}
    read = {site: one.readout and one.readout.name for site, one in found.items()}
    assert read == {
        "projection": "projection",
        "layer1.random-2": "projection",
        "layer0.mean": None,
        "pooled": "pooled",
    }
    assert [site for site, one in found.items() if one.is_zero_shot] == ["projection", "layer1.random-2"]
    for one in found.values():
        assert one.sae is not None
        assert (one.sae.activations.step in one.inputs) == (one.readout is not None)
    assert {one.readout for one in plan.concepts if one.sae is None} == {None}
    assert {one.readout for one in make_plan({"concepts": {}}).concepts} == {None}
    without_texts = make_plan({**asked, "encoder.model": tiny_llava, "grid.sites": ["layer1:cls"]}).concepts
    assert not any(one.is_zero_shot for one in without_texts)
    needed = [(use.field, use.kind) for use in models_needed([], plan.concepts)]
    assert ("encoder.model", "texts") in needed
    assert ("encoder.model", "images") in needed


def test_names_are_found_with_a_model_that_embeds_texts(make_plan: MakePlan, tiny_llava: str):
    grid = {"grid.sites": ["layer1:cls"], "concepts": {}}
    space = make_plan(grid).naming_space
    assert space is not None
    assert space.step.label == "activations-heldout-projection"
    assert space.step in [one.step for one in make_plan(grid).extracts]
    by_judge = make_plan({**grid, "encoder.model": tiny_llava}).naming_space
    assert by_judge is not None
    assert by_judge.step.label == "embeddings-heldout"
    assert make_plan({**grid, "encoder.model": tiny_llava, "judge.point": "pooled"}).naming_space is None
    assert make_plan({**grid, "concepts.measures": ["fms"]}).naming_space is None


def test_a_plan_knows_the_patches_of_a_site_that_has_all_of_them(make_plan: MakePlan):
    of_all = make_plan({"grid.score_tokens": "all", "grid.sites": ["layer1:random:2"], "concepts": {}}).concepts
    assert {one.patches for one in of_all} == {(2, 2, 1)}
    assert {one.patches for one in make_plan({"concepts": {}}).concepts} == {None}


def test_seeds_add_saes_that_differ_in_start_and_order_and_are_compared(make_plan: MakePlan):
    before, plan = names(make_plan({"concepts": {}})), make_plan({"concepts": {}, "grid.seeds": [0, 3]})
    after = names(plan)
    more = {f"{label}-seed3" for label in SAES | FIDELITY | SAE_CONCEPTS | SAE_SCORES - PICTURES}
    assert after.keys() - before.keys() == more
    assert changed(before, {label: after[label] for label in before}) == PICTURES | SAE_CONCEPTS
    first, second = (one for one in plan.trains if one.grid_cell.site.name == "projection")
    assert first.grid_cell.cell.seed != second.grid_cell.cell.seed
    assert first.stream_seed != second.stream_seed
    compared = {one.name: one.counterpart for one in plan.concepts}
    assert compared[first.grid_cell.name] is second
    assert compared[second.grid_cell.name] is first
    assert compared["raw-projection"] is None


def test_a_study_that_was_remembered_is_the_same_steps(make_plan: MakePlan):
    plan = make_plan({"grid.expansions": [1, 4], "training.gradient_clip": 1})
    study = Study.from_dict(json.loads(json.dumps(plan.study.to_dict())))
    assert names(StudyPlan(study, plan.root)) == names(plan)
    [defaults] = Study.from_dict(MINIMAL).cells()
    [remembered] = Study.from_dict(json.loads(json.dumps(Study.from_dict(MINIMAL).to_dict()))).cells()
    [whole] = Study.from_dict(MINIMAL, {"grid.expansions": [8]}).cells()
    assert json.dumps(dataclasses.asdict(defaults)) == json.dumps(dataclasses.asdict(remembered))
    assert json.dumps(dataclasses.asdict(defaults)) == json.dumps(dataclasses.asdict(whole))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"grid.k": [4, 33]}, "cell.k = 33: make it at most d_sae = 32"),
        ({"resources.train.shards": 33}, "resources.train.shards = 33: choose at most 32, the latents of an SAE with"),
        ({"grid.expansions": [0.01]}, "cell.expansion = 0.01: make it at least 1/16: the input is 16 wide"),
        (
            {"grid.sites": ["projection", "layer2:cls"]},
            "grid.sites = 'layer2.cls': layer is 2, but .*clip has 2 layers; name one from 0 to 1",
        ),
        ({"grid.sites": ["layer0:random:6"]}, "clip has 5 tokens per image; ask for at most 5"),
        ({"encoder.model": "/nowhere"}, "there is no directory /nowhere on .*; an encoder is named by a directory"),
        ({"encoder.revision": "main"}, "revision is 'main', but that of .*clip is "),
        ({"images.train.path": "/nowhere"}, "images.train: .*image folder /nowhere"),
        ({"images.heldout.path": "/nowhere"}, "images.heldout: .*image folder /nowhere"),
        ({"images.train.labels": "/nowhere.csv"}, "images.train: .*label file /nowhere.csv"),
    ],
    ids=str,
)
def test_a_plan_that_cannot_be_is_refused_before_any_work(make_plan: MakePlan, overrides: dict, message: str):
    with pytest.raises(UsageError, match=message):
        make_plan(overrides)


def test_a_set_without_images_is_refused(make_plan: MakePlan, tmp_path: Path):
    with pytest.raises(SaeRayError, match=r"images\.heldout: no image is left .* change images\.heldout_fraction"):
        make_plan({"images.heldout_fraction": 1e-9})
    (tmp_path / "empty").mkdir()
    with pytest.raises(SaeRayError, match=r"images\.train: .*empty"):
        make_plan({"images.train.path": str(tmp_path / "empty")})


def test_the_papers_study_is_planned_by_the_same_code(make_clip: Callable[..., str], tiny_llava: str, tmp_path: Path):
    for number in range(20):
        for part in ("train", "val"):
            (tmp_path / part / "n01").mkdir(parents=True, exist_ok=True)
            (tmp_path / part / "n01" / f"{number}.JPEG").touch()
    clip = make_clip(tmp_path / "clip", n_layers=24, width=64, projection=32)
    llava = with_tower(tiny_llava, tmp_path / "llava", num_hidden_layers=24, hidden_size=64, patch_size=14)
    overrides = {
        "images.train.path": str(tmp_path / "train"),
        "images.heldout": {"path": str(tmp_path / "val")},
        "encoder.model": clip,
        "judge.model": clip,
        "judge.point": "projection",
        "steering.llava": llava,
        "steering.scorer": clip,
    }
    plan = StudyPlan(Study.load(STUDIES / "pach2025.toml", overrides), Folder(tmp_path / "root"))
    assert len(plan.trains) == 67
    # Six sites on both image sets, the judge and the scorer; every SAE and the raw neurons of every site, on both sets.
    assert len(plan.extracts) == 6 * 2 + 2
    assert len(plan.scores) == 2 * (67 + 6)
    assert len({step.name for step in plan.steps}) == 4 + 14 + 2 * 67 + 146 + 1 + 1
    assert {train.d_sae for train in plan.trains if train.grid_cell.site.name == "projection"} == {
        32 * expansion for expansion in (1, 2, 4, 8, 16, 64)
    }
    steered = plan.trains[-1]
    assert (steered.activations.rows, steered.d_sae) == (2 * 20, 64 * 64)
    assert [one.sae for one in plan.steerings] == [steered]
    assert plan.steerings[0].rows == (1 + 3 * 1000 + 2 * 10) + 20 * (2 + 3 * 10)


# The steering stage


def with_tower(llava: str, directory: Path, **vision: int) -> str:
    """A copy of the LLaVA with another tower in its configuration, which is all that planning reads."""
    shutil.copytree(llava, directory)
    config = json.loads((directory / "config.json").read_text())
    config["vision_config"] |= vision
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


STEERING = {"steering-layer1.all-batch_topk-x2-k4", "steering-layer1.random-2-batch_topk-x2-k4"}


@pytest.fixture
def make_steered(make_plan: MakePlan, tiny_llava: str, tiny_clip: str) -> MakePlan:
    """A plan whose encoder is the tower of a LLaVA that reads layer 1; there are SAEs that do not fit it."""

    def make(overrides: dict[str, Any] | None = None) -> StudyPlan:
        values = {
            "encoder.model": tiny_llava,
            "grid.sites": ["layer0:all", "layer1:all", "layer1:cls", "layer1:random:2"],
            "scoring.pictures": "train",
            "steering.llava": tiny_llava,
            "steering.scorer": tiny_clip,
        }
        return make_plan(values | (overrides or {}))

    return make


def test_a_model_in_a_directory_is_described_anew_once_its_files_change(
    make_steered: MakePlan, tiny_clip: str, tiny_llava: str, tmp_path: Path
):
    named = {"encoder.model": "encoder", "judge.model": "judge", "steering.scorer": "scorer", "steering.llava": "llava"}
    places = {of: tmp_path / of for of in named.values()}
    for of, place in places.items():
        shutil.copytree(tiny_llava if of in ("encoder", "llava") else tiny_clip, place)
    study = make_steered({field: str(places[of]) for field, of in named.items()}).study
    first = survey_models(study)
    assert survey_models(study, first) == first

    def marked(info: Any) -> Any:
        return dataclasses.replace(info, **({"layer": 99} if isinstance(info, LlavaInfo) else {"family": "remembered"}))

    before = dataclasses.replace(first, **{of: marked(getattr(first, of)) for of in places})
    for of, place in places.items():
        assert survey_models(study, before) == before, "nothing was read but the files' bytes"
        (place / "config.json").write_text((place / "config.json").read_text() + "\n")
        found = getattr(survey_models(study, before), of)
        tower, first_tower = (getattr(info, "tower", info) for info in (found, getattr(first, of)))
        assert found != getattr(before, of)
        assert tower == dataclasses.replace(first_tower, revision=tower.revision)
        assert tower.revision != first_tower.revision
        before = dataclasses.replace(before, **{of: found})
    shutil.rmtree(places["judge"])
    with pytest.raises(UsageError, match=r"judge\.model = .*there is no directory"):
        survey_models(study, before)


def test_the_saes_of_the_layer_that_the_llava_reads_are_steered(make_steered: MakePlan):
    plan = make_steered()
    assert {one.step.label for one in plan.steerings} == STEERING
    steps = list(plan.steps)
    assert {step.label for step in steps[-3:-1]} == STEERING
    for one in plan.steerings:
        before = steps[: steps.index(one.step)]
        assert all(step in before for step in one.inputs)
        assert one.scores.activations.images.name == "train"
        assert one.heldout.name == "heldout"
    [scorer] = [extract for extract in plan.extracts if extract.step.label == "embeddings-train-scorer"]
    assert (scorer.width, scorer.rows) == (16, plan.images["train"].n_images)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"steering.strength": 40}, STEERING | PICTURES),
        ({"steering.other_prompts": ["And what else?"]}, STEERING | PICTURES),
        ({"steering.ignore_labels": ["blank"]}, STEERING | PICTURES),
        ({"steering.dtype": "bfloat16"}, STEERING | PICTURES),
        ({"steering.strength": 100.0}, set()),
        ({"scoring.min_images": 10}, PICTURES),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_settings_of_steering_change_its_own_steps(make_steered: MakePlan, overrides: dict, expected: set[str]):
    assert changed(names(make_steered()), names(make_steered(overrides))) == expected


NAMING = {"naming-" + label for label in (
    "layer0.all-batch_topk-x2-k4", "layer1.all-batch_topk-x2-k4", "layer1.cls-batch_topk-x2-k4",
    "layer1.random-2-batch_topk-x2-k4",
)}  # fmt: skip
BY_STEERING = {label.replace("steering-", "naming-", 1) for label in STEERING}


def test_the_llava_names_latents_of_every_sae_and_steers_those_of_its_layer(make_steered: MakePlan):
    before, plan = names(make_steered()), make_steered({"naming": {}})
    after = names(plan)
    assert after.keys() - before.keys() == NAMING
    assert changed(before, {label: after[label] for label in before}) == set()
    assert {one.step.label for one in plan.namings if one.methods == ("vlm", "steering")} == BY_STEERING
    assert {one.methods for one in plan.namings} == {("vlm", "steering"), ("vlm",)}
    steps = list(plan.steps)
    for one in plan.namings:
        assert all(step in steps[: steps.index(one.step)] for step in one.inputs)
        assert (one.train.name, one.heldout.images.name) == ("train", "heldout")
    only = make_steered({"naming.methods": ["steering"]})
    assert {one.step.label for one in only.namings} == BY_STEERING


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"naming.n_latents": 1000}, set()),  # as it stands anyway
        ({"naming.n_latents": 7}, NAMING),
        ({"naming.images": "grid"}, NAMING),
        ({"steering.prompt": "What?"}, NAMING | STEERING | PICTURES),
        ({"steering.strength": 40}, BY_STEERING | STEERING | PICTURES),
        ({"steering.n_images": 7}, STEERING | PICTURES),
        ({"naming.methods": ["steering", "vlm"]}, BY_STEERING),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",  # sets have no order
)
def test_settings_change_the_names_that_depend_on_them(make_steered: MakePlan, overrides: dict, expected: set[str]):
    before, after = names(make_steered({"naming": {}})), names(make_steered({"naming": {}, **overrides}))
    assert changed(before, after) == expected


def test_naming_needs_the_llava_of_steering():
    with pytest.raises(UsageError, match=r"latents are named by the LLaVA of \[steering\]; add that table"):
        study({"naming": {}})


def test_other_models_change_the_steps_that_they_decide(
    make_steered: MakePlan, make_clip: Callable[..., str], make_llava: Callable[..., str], tmp_path: Path
):
    before = names(make_steered())
    other = make_clip(tmp_path / "other", seed=2)
    of_scorer = STEERING | PICTURES | {"embeddings-train-scorer"}
    assert changed(before, names(make_steered({"steering.scorer": other}))) == of_scorer
    llava = make_llava(tmp_path / "llava", layer=2)  # the same block, counted from below
    assert changed(before, names(make_steered({"steering.llava": llava}))) == STEERING | PICTURES


def test_the_encoder_as_scorer_embeds_the_images_once(make_plan: MakePlan, tiny_clip: str, tiny_llava: str, tmp_path):
    llava = with_tower(tiny_llava, tmp_path / "llava", num_hidden_layers=2, patch_size=14)
    steering = {"steering.llava": llava, "steering.scorer": tiny_clip, "scoring.pictures": "train"}
    plan = make_plan(steering | {"grid.sites": ["projection", "layer0:all"]})
    assert plan.text_space.step.label == "activations-train-projection"
    assert plan.text_space.step.name in {train.activations.step.name for train in plan.trains}
    assert make_plan().text_space.step.label == "activations-heldout-projection"  # without steering


def test_what_cannot_be_steered_is_refused_before_any_work(
    make_steered: MakePlan, tiny_clip: str, tiny_llava: str, tmp_path: Path
):
    def refused(overrides: dict[str, Any]) -> str:
        with pytest.raises(UsageError) as raised:
            make_steered(overrides)
        return str(raised.value)

    elsewhere = {"grid.sites": ["layer1:cls", "layer2:all"]}
    assert (
        'reads layer 1, but no SAE is trained on tokens of it; add a [[grid]] with sites = ["layer1:random:2"]'
        in refused(elsewhere)
    )
    assert "clip is of the model type clip, not llava" in refused({"steering.llava": tiny_clip})
    wider = with_tower(tiny_llava, tmp_path / "wider", hidden_size=64)
    assert "its vision tower has 17 tokens of width 64" in refused({"steering.llava": wider})
    no_projection = refused({"judge.model": tiny_llava})
    assert no_projection.startswith("judge.point = 'projection': point is 'projection', which ")
    no_text = refused({"steering.scorer": tiny_llava})
    assert no_text.startswith(f"steering.scorer = '{tiny_llava}': ")
    assert "does not embed texts; name a CLIP, SigLIP" in no_text
    assert "there is no directory /nowhere" in refused({"steering.llava": "/nowhere"})
