"""Refusals of cells and training settings, and their defaults."""

from __future__ import annotations

import math
import typing

import pytest
from pydantic import TypeAdapter, ValidationError

from sae_ray.errors import UsageError
from sae_ray.sae import ArchitectureName, Cell, TrainingConfig
from sae_ray.sae.architectures import ARCHITECTURES


def test_registry_and_names_agree():
    assert tuple(ARCHITECTURES) == typing.get_args(ArchitectureName)


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
        ("group_fractions", (0.5, 0.4)),
        ("group_fractions", (1.5, -0.5)),
        ("group_fractions", ()),
        ("sparsity_warmup_steps", -1),
        ("jumprelu_bandwidth", 0.0),
        ("jumprelu_initial_threshold", -0.1),
        ("dtype", "float16"),
    ],
)
def test_training_settings_out_of_range_name_field_value_and_remedy(field, value):
    with pytest.raises(UsageError) as error:
        TrainingConfig(**{field: value})
    assert str(error.value).startswith(f"training.{field} = {value!r}: make it ")


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
    with pytest.raises(UsageError, match=r"training\.group_fractions"):
        Cell("matryoshka_batch_topk", 1, k=1).check(8)
    assert Cell("batch_topk", 1, k=1).group_sizes(8) == [8]


def test_an_inference_threshold_that_could_never_be_estimated_is_refused():
    short = TrainingConfig(steps=1001, warmup_steps=10)
    with pytest.raises(UsageError, match=r"training\.threshold_start_step = 1000"):
        Cell("batch_topk", 2, k=1, training=short)
    assert Cell("topk", 2, k=1, training=short).training.steps == 1001


def test_default_rates_are_the_papers():
    training = TrainingConfig()
    assert training.learning_rate_at(1000, 2**14) == pytest.approx(2e-4)
    assert training.learning_rate_at(500, 2**16) == pytest.approx(0.5e-4)
    assert training.learning_rate_at(99_999, 1024) == pytest.approx(16 / (625 * 32), rel=1e-3)
    fractions = TrainingConfig(group_fractions=(0.002, 0.009, 0.035, 0.189, 0.765))
    assert Cell("matryoshka_batch_topk", 1, k=1, training=fractions).group_sizes(1000) == [2, 9, 35, 189, 765]


def test_unknown_keys_in_a_study_file_are_refused_and_fields_carry_their_help():
    with pytest.raises(ValidationError, match="warmup"):
        TypeAdapter(Cell).validate_python({"architecture": "topk", "expansion": 2, "k": 1, "training": {"warmup": 3}})
    for config in (TrainingConfig, Cell):
        properties = TypeAdapter(config).json_schema()["properties"]
        assert all(field.get("description") for field in properties.values())
