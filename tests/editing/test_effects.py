"""What edits do to answers, counted by hand; and to codes, in known cases."""

from __future__ import annotations

import math

import pytest
import torch

from sae_ray.editing.effects import EDIT_SCHEMA, OnAnswers, edit_table, on_answers, on_codes
from sae_ray.editing.operators import Mask, Projection, direction_of
from sae_ray.steering.protocol import Question

from .conftest import random_sae

ASK, DESCRIBE, COLOUR = "What is it?", "Describe it.", "Which colour?"
NAMES = {"star": "star, sun", "cup": "cup", "n01": "great fish"}


def question(concept: str | None, prompt: str = ASK) -> Question:
    return Question("unsteered", -1, concept, 0.0, 0, prompt)


def rates(*rows: tuple[Question, str, str], concept: str | None = "star") -> OnAnswers:
    asked, before, after = zip(*rows, strict=True)
    return on_answers(asked, before, after, concept, NAMES, ASK)


def test_images_that_were_named_count_and_no_others():
    found = rates(
        (question("star"), "Star.", "cup"),
        (question("star"), "a star", "cup"),  # was not called so
        (question("star"), "sun", "sun"),
        (question("star"), "star", "a star"),  # does not begin with it any more
        (question("cup"), "cup", "cup"),
        (question("n01"), "great fish", "fish"),
        (question("cup"), "star", "cup"),
        (question(None), "star", "cup"),
    )
    assert found == OnAnswers(2 / 3, 1 / 2, None, None)


def test_answers_in_other_words_count_for_generality_and_all_the_rest_should_stay():
    found = rates(
        (question("star", DESCRIBE), "a red star on a grid", "a red cup on a grid"),
        (question("star", DESCRIBE), "a sun.", "The sun"),
        (question("star", DESCRIBE), "a starfish", "a starfish!"),
        (question("star", COLOUR), "red", "blue"),
        (question("cup", DESCRIBE), "a cup", "A cup."),
        (question("cup", DESCRIBE), "a star", "a cup"),  # was wrong before
    )
    assert found == OnAnswers(None, None, 1 / 2, 2 / 3)


def test_a_latent_without_a_class_has_only_what_stays():
    found = rates((question("star"), "star", "cup"), (question("cup", COLOUR), "red", "red"), concept=None)
    assert found == OnAnswers(None, 0.0, None, 1.0)


def test_project_and_rows_on_codes():
    sae = random_sae(24)
    x = torch.randn(2500, 24, generator=torch.Generator().manual_seed(2))
    unit = direction_of(sae, 7)
    project, rows = (on_codes(sae, 7, x, operator(x)) for operator in (Projection(unit), Mask.of(unit, 0.9)))
    assert project.own_variance_left < 1e-12
    assert 1e-3 < rows.own_variance_left < 0.5
    assert project.n_firing_before == rows.n_firing_before > 0
    assert 0 < project.others_relative_change < rows.others_relative_change
    same = on_codes(sae, 7, x, x)
    assert same == (pytest.approx(1.0), 0.0, project.n_firing_before, project.n_firing_before)


def test_a_table_has_null_for_what_is_unknown():
    table = edit_table([{"latent": 3, "own_variance_left": math.nan, "own_share_by_writer": {"block 0 mlp": 1.0}}])
    assert table.schema == EDIT_SCHEMA
    [row] = table.to_pylist()
    assert row["latent"] == 3
    assert row["own_share_by_writer"] == [("block 0 mlp", 1.0)]
    assert {value for key, value in row.items() if key not in ("latent", "own_share_by_writer")} == {None}
