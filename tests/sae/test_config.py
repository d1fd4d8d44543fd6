"""Refusals of cells and training settings, and their defaults."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from pydantic import TypeAdapter, ValidationError

from sae_ray.errors import UsageError
from sae_ray.sae import Cell, TrainingConfig
from sae_ray.sae.architectures import ARCHITECTURES
from sae_ray.sae.architectures.jumprelu import JumpReLUSettings
from sae_ray.sae.architectures.matryoshka_batch_topk import MatryoshkaSettings
from sae_ray.study.fields import docstrings


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 0),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("warmup_steps", -1),
        ("warmup_steps", 100_001),
        ("decay_start", 100_000),
        ("gradient_clip", 0.0),
        ("auxk_weight", -1.0),
        ("auxk_select", "both"),
        ("dead_after_samples", 0),
        ("threshold_beta", 1.0),
        ("threshold_start_step", -1),
        ("sparsity_warmup_steps", -1),
        ("dtype", "float16"),
        ("threshold", "median"),
    ],
)
def test_training_settings_out_of_range_name_field_value_and_remedy(field, value):
    with pytest.raises(UsageError) as error:
        TrainingConfig(**{field: value})
    assert str(error.value).startswith(f"training.{field} = {value!r}: make it ")


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("matryoshka_batch_topk", "group_fractions", (0.5, 0.4)),
        ("matryoshka_batch_topk", "group_fractions", (1.5, -0.5)),
        ("matryoshka_batch_topk", "group_fractions", ()),
        ("jumprelu", "bandwidth", 0.0),
        ("jumprelu", "bandwidth", math.nan),
        ("jumprelu", "initial_threshold", -0.1),
        ("guided_matryoshka_batch_topk", "group_fractions", (0.5, 0.4)),
        ("guided_matryoshka_batch_topk", "concept_weight", -1.0),
        ("guided_topk", "concepts", ""),
        ("guided_topk", "concept_weight", math.inf),
        ("guided_batch_topk", "concept_reduction", "max"),
        ("guided_topk", "positive_weight", 0.0),
    ],
)
def test_own_settings_out_of_range_name_where_they_stand_in_a_study(architecture, field, value):
    with pytest.raises(UsageError) as error:
        ARCHITECTURES[architecture].Settings(**{field: value})
    assert str(error.value).startswith(f"architectures.{architecture}.{field} = {value!r}: make it ")


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"architecture": "gated", "k": 1}, "architecture"),
        ({"expansion": 0.0, "k": 1}, "expansion"),
        ({"k": None}, "k"),
        ({"k": 0}, "k"),
        ({"k": 1, "sparsity": 0.1}, "sparsity"),
        ({"architecture": "relu"}, "sparsity"),
        ({"architecture": "relu", "sparsity": 0.1, "k": 3}, "k"),
        ({"architecture": "jumprelu", "sparsity": -0.1}, "sparsity"),
        ({"k": 1, "seed": -1}, "seed"),
        ({"k": 1, "settings": JumpReLUSettings()}, "settings"),
        ({"architecture": "jumprelu", "sparsity": 0.1, "settings": {"bandwidth": 0.1}}, "settings"),
    ],
)
def test_cells_that_cannot_be_name_the_field(settings, field):
    with pytest.raises(UsageError, match=rf"^cell\.{field} = "):
        Cell(**{"architecture": "batch_topk", "expansion": 2.0} | settings)


def test_what_depends_on_the_width_is_checked_with_it():
    with pytest.raises(UsageError, match=r"cell\.k = 20: make it at most d_sae = 16"):
        Cell("topk", 2, k=20).check(8)
    with pytest.raises(UsageError, match=r"cell\.expansion"):
        Cell("topk", 0.1, k=1).check(8)
    with pytest.raises(UsageError, match=r"architectures\.matryoshka_batch_topk\.group_fractions"):
        Cell("matryoshka_batch_topk", 1, k=1).check(8)
    with pytest.raises(
        UsageError, match=r"resources\.train\.shards = 17: choose at most 16, the latents of an SAE with"
    ):
        Cell("topk", 2, k=1).check(8, shards=17)
    Cell("topk", 2, k=1).check(8, shards=16)
    assert Cell("batch_topk", 1, k=1).group_sizes(8) == [8]


def test_an_inference_threshold_that_could_never_be_estimated_is_refused():
    late = TrainingConfig(steps=1001, threshold_start_step=1000)
    with pytest.raises(UsageError, match=r"training\.threshold_start_step = 1000"):
        Cell("batch_topk", 2, k=1, training=late)
    assert Cell("topk", 2, k=1, training=late).training.steps == 1001
    with pytest.raises(UsageError, match=r"training\.steps = 1: make it at least 2 for batch_topk"):
        Cell("batch_topk", 2, k=1, training=TrainingConfig(steps=1))


@pytest.mark.parametrize(("steps", "tenth"), [(2, 0), (9, 0), (200, 20), (10_000, 1000), (100_000, 1000)])
def test_settings_that_follow_steps_fit_any_number_of_them(steps: int, tenth: int):
    training = TrainingConfig(steps=steps)
    assert training.effective("warmup_steps") == training.effective("threshold_start_step") == tenth
    for name, kind in ARCHITECTURES.items():
        Cell(name, 2, training=training, **{kind.tuned_by: 1})
    assert training.learning_rate_at(tenth, 2**14) == pytest.approx(2e-4)
    assert TrainingConfig(steps=steps, warmup_steps=1).effective("warmup_steps") == 1


def test_default_rates_are_the_papers():
    training = TrainingConfig()
    assert training.learning_rate_at(1000, 2**14) == pytest.approx(2e-4)
    assert training.learning_rate_at(500, 2**16) == pytest.approx(0.5e-4)
    assert training.learning_rate_at(99_999, 1024) == pytest.approx(16 / (625 * 32), rel=1e-3)
    fractions = MatryoshkaSettings((0.002, 0.009, 0.035, 0.189, 0.765))
    assert Cell("matryoshka_batch_topk", 1, k=1, settings=fractions).group_sizes(1000) == [2, 9, 35, 189, 765]


@pytest.mark.parametrize("config", [TrainingConfig, *(kind.Settings for kind in ARCHITECTURES.values())])
def test_unknown_keys_in_a_study_file_are_refused_and_fields_carry_their_help(config: type):
    with pytest.raises(ValidationError, match="warmup"):
        TypeAdapter(config).validate_python({"warmup": 3})
    properties = TypeAdapter(config).json_schema().get("properties", {})
    assert set(properties) == {field.name for field in dataclasses.fields(config)}
    assert set(properties) <= docstrings(config).keys()


def renamed(**settings) -> set[str]:
    """The architectures whose cells are other ones with these settings, of training or of one architecture alone."""
    own = {field: value for field, value in settings.items() if field not in TrainingConfig.__dataclass_fields__}
    training = TrainingConfig(**{field: value for field, value in settings.items() if field not in own})
    found = set()
    for name, kind in ARCHITECTURES.items():
        knows = own and own.keys() <= kind.Settings.__dataclass_fields__.keys()
        cell = Cell(name, 2, training=training, settings=kind.Settings(**own) if knows else None, **{kind.tuned_by: 1})
        plain = Cell(name, 2, **{kind.tuned_by: 1})
        assert cell.identity() == json.loads(json.dumps(cell.identity()))
        if cell.identity() != plain.identity():
            found.add(name)
    return found


EVERY = set(ARCHITECTURES)
GUIDED = {"guided_topk", "guided_batch_topk", "guided_matryoshka_batch_topk"}
LEARNING = EVERY - {"random"}
REVIVING = {"batch_topk", "matryoshka_batch_topk", "topk", "frozen_decoder"} | GUIDED - {"guided_topk"}
BY_BATCH = REVIVING - {"topk"} | {"random"}


@pytest.mark.parametrize(
    ("settings", "architectures"),
    [
        ({"batch_size": 512}, EVERY),
        ({"steps": 50_000}, EVERY),
        ({"learning_rate": 1e-3}, LEARNING),
        ({"warmup_steps": 10}, LEARNING),
        ({"decay_start": 90_000}, LEARNING),
        ({"gradient_clip": 2.0}, LEARNING),
        ({"dtype": "bfloat16"}, EVERY),
        ({"centre": not TrainingConfig().centre}, EVERY - {"guided_topk"}),  # which standardises every row
        ({"threshold": "average"}, EVERY),
        ({"auxk_weight": 0.1}, REVIVING),
        ({"auxk_select": "pre"}, REVIVING),
        ({"dead_after_samples": 9}, REVIVING),
        ({"threshold_beta": 0.9}, BY_BATCH),
        ({"threshold_start_step": 5}, BY_BATCH),
        ({"sparsity_warmup_steps": 5}, {"relu", "jumprelu"}),
        ({"group_fractions": (0.5, 0.5)}, {"matryoshka_batch_topk", "guided_matryoshka_batch_topk"}),
        ({"bandwidth": 0.1}, {"jumprelu"}),
        ({"initial_threshold": 0.1}, {"jumprelu"}),
        ({"concept_weight": 2.0}, GUIDED),
        ({"concept_reduction": "mean"}, GUIDED),
        ({"positive_weight": 5.0}, GUIDED),
        ({"concepts": "file.csv"}, set()),  # what it holds is a part of the step's name
        # What a default says anyway, or what would stand for it.
        ({"batch_size": 4096, "gradient_clip": 1, "auxk_weight": 0.03, "bandwidth": 0.001}, set()),
        ({"group_fractions": (0.0625, 0.125, 0.25, 0.5625)}, set()),
        ({"warmup_steps": 1000, "threshold_start_step": 1000, "sparsity_warmup_steps": 10_000}, set()),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_renames_the_architectures_that_use_it(settings: dict, architectures: set[str]):
    assert renamed(**settings) == architectures


def test_every_training_setting_is_used_by_an_architecture():
    fields = {field.name for field in dataclasses.fields(TrainingConfig)}
    assert set().union(*(kind.uses for kind in ARCHITECTURES.values())) == fields


def test_an_identity_says_what_the_cell_is():
    training = TrainingConfig(steps=200, warmup_steps=20, threshold_beta=0.9)
    cell = Cell("jumprelu", 2.0, sparsity=0.1, seed=3, training=training, settings=JumpReLUSettings(bandwidth=0.5))
    assert cell.identity() == {
        "architecture": "jumprelu",
        "expansion": 2.0,
        "sparsity": 0.1,
        "seed": 3,
        "training": {"steps": 200, "threshold": "calibrated"},
        "settings": {"bandwidth": 0.5},
    }
    reference = dataclasses.replace(training, threshold="average")
    of_reference = dataclasses.replace(cell, training=reference).identity()
    assert of_reference["training"] == {"steps": 200}, "as SAEs were named when this was the default"
    for change in ({"expansion": 3.0}, {"sparsity": 0.2}, {"seed": 4}):
        assert dataclasses.replace(cell, **change).identity() != cell.identity()
