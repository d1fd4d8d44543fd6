"""Naming latents with the world's LLaVA, by their top images and by steering, and the figures that are counted."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from sae_ray.concepts import Trials, random_images, trials
from sae_ray.concepts.labelling import Concept
from sae_ray.errors import UsageError
from sae_ray.sae import SAE
from sae_ray.steering.config import Naming
from sae_ray.steering.latent_names import (
    LATENT_NAMES_SCHEMA,
    Answers,
    Shown,
    image_questions,
    name_rates,
    name_table,
    nameable,
)
from sae_ray.steering.llava import load_llava
from sae_ray.steering.protocol import white_questions
from sae_ray.steering.respondent import Directions, Respondent
from sae_ray.study.config import Steering
from sae_ray.world.render import SHAPES, attributes, render
from sae_ray.world.write import MODELS

BOTH = ("vlm", "steering")
N_TRAIN, N_HELDOUT = 600, 400
STEERING = Steering("llava", strength=4.0, unit="max")


class Named(NamedTuple):
    subjects: list[Concept]
    table: pa.Table


@pytest.fixture(scope="module")
def named() -> Named:
    """One latent per shape, made of the mean activation of its images, named on images that it was not made of."""
    llava = load_llava(str(MODELS / "llava"))
    images = [render(index) for index in range(N_TRAIN + N_HELDOUT)]
    shapes = [attributes(index).shape for index in range(len(images))]
    stream = torch.cat([activations(llava, images[start : start + 100]) for start in range(0, len(images), 100)])
    classes = torch.tensor([-1 if shape is None else list(SHAPES).index(shape) for shape in shapes])
    mean = stream[:N_TRAIN].mean((0, 1))
    means = torch.stack([stream[:N_TRAIN][classes[:N_TRAIN] == one].mean((0, 1)) for one in range(len(SHAPES))])
    W = torch.linalg.pinv(means - mean)  # each latent answers to its own shape alone
    sae = SAE("relu", W, means - mean, torch.full((len(SHAPES),), -0.3), mean)
    codes = sae.encode(stream)
    value, largest = codes.mean(1), codes.flatten(0, 1).amax(0)
    train, heldout = value[:N_TRAIN], value[N_TRAIN:]
    n_firing = (train > 0).sum(0).tolist()
    concepts = [
        Concept(latent, shape, 0.9, n_firing[latent], n_firing[latent] / N_TRAIN, float(largest[latent]))
        for latent, shape in enumerate(SHAPES)
    ]
    subjects = nameable(concepts, 1000)
    latents = [one.latent for one in subjects]
    top = train.argsort(0, descending=True)[:20].T.numpy()[latents]
    shown = Shown(top, random_images(np.arange(N_TRAIN), len(latents), 0), trials(heldout, latents, 0))

    respondent = Respondent(llava, sae, Directions(), STEERING)

    def answers(wanted: list[int], first: int) -> dict[int, str]:
        asked = image_questions(wanted, STEERING.prompt)
        return dict(zip(wanted, respondent.answers(asked, lambda index: images[first + index], 100), strict=True))

    white = respondent.answers(white_questions("white", subjects, STEERING), images.__getitem__, 100)
    unsteered = llava.answer(llava.white(), STEERING.prompt)
    found = Answers(answers(shown.training, 0), answers(shown.heldout, N_TRAIN), white, unsteered)
    return Named(subjects, name_table(subjects, shown, found, BOTH))


def activations(llava, images: list[Image.Image]) -> torch.Tensor:
    seen: list[torch.Tensor] = []
    llava.image_embeddings(images, [[lambda x: seen.append(x) or x]] * len(images))
    return torch.stack(seen)


def test_both_ways_find_the_shapes_and_controls_do_not(named: Named):
    assert len(named.subjects) == len(SHAPES)
    found = name_rates(named.table, named.subjects, {shape: shape for shape in SHAPES}, 5, 0.75)
    for method in BOTH:
        rates = found[method]
        assert rates["latents"] == rates["pure"] == len(SHAPES)
        assert rates["right"] >= 0.85
        assert rates["distinct"] >= 13
        assert rates["control_right"] <= 0.25
        assert rates["score"] > 0.7 > 0.55 > rates["control_score"]


def test_a_latent_that_changes_nothing_has_no_name():
    tried = Trials(np.arange(12).reshape(2, 6), np.arange(12, 24).reshape(2, 6))
    shown = Shown(np.array([[0, 1, 2], [3, 4, -1]]), np.array([[5, 6], [7, 8]]), tried)
    heldout = {image: "star" if image < 6 else "nothing" for image in range(24)}
    training = dict.fromkeys(range(9), "Star!") | {3: "moon", 4: "moon"}
    answers = Answers(training, heldout, ["Star", "Nothing."], "nothing")
    subjects = [Concept(8, "star", 1.0, 20, 0.1, 2.0), Concept(5, "blank", 1.0, 20, 0.1, 2.0)]
    table = name_table(subjects, shown, answers, ("steering", "vlm"))
    assert table.schema == LATENT_NAMES_SCHEMA
    columns = ("neuron", "method", "name", "score", "agreement", "n_images", "control", "control_score")
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        (8, "steering", "star", 1.0, None, 0, None, None),
        (5, "steering", None, None, None, 0, "star", 0.5),
        (8, "vlm", "star", 1.0, 1.0, 3, "star", 1.0),
        (5, "vlm", "moon", 0.5, 1.0, 2, "star", 0.5),
    ]
    rates = name_rates(table, subjects, {"star": "star"}, 16, 0.75)
    assert list(rates) == ["steering", "vlm"]
    assert rates["steering"] == {
        "latents": 2, "named": 1, "distinct": 1, "tried": 1, "score": 1.0, "verified": 1.0, "control_score": 0.5,
        "control_verified": 0.0, "pure": 1, "right": 1.0, "control_right": 0.0,
    }  # fmt: skip
    assert (rates["vlm"]["score"], rates["vlm"]["verified"], rates["vlm"]["distinct"]) == (0.75, 0.5, 2)
    assert name_rates(name_table([], shown, answers, ()), [], {}, 16, 0.75) == {}


def test_a_grid_has_one_answer_and_every_answer_is_kept():
    tried = Trials(np.arange(12).reshape(2, 6), np.arange(12, 24).reshape(2, 6))
    shown = Shown(np.array([[0, 1, 2], [3, 4, -1]]), np.array([[5, 6], [7, 8]]), tried)
    heldout = {image: "star" if image < 6 else "nothing" for image in range(24)}
    answers = Answers({}, heldout, ["Star", "nothing"], "nothing", ["A star.", "!", "Moon", "moon"])
    subjects = [Concept(8, "star", 1.0, 20, 0.1, 2.0), Concept(5, "blank", 1.0, 20, 0.1, 2.0)]
    columns = ("neuron", "name", "agreement", "n_images", "control")
    table = name_table(subjects, shown, answers, ("vlm",))
    assert [tuple(row[name] for name in columns) for row in table.to_pylist()] == [
        (8, "a star", None, 3, "moon"), (5, None, None, 2, "moon"),
    ]  # fmt: skip
    kept = [tuple(row.values()) for row in answers.table([8, 5]).to_pylist()]
    assert kept[:4] == [
        ("grid", None, 8, "A star."), ("grid", None, 5, "!"),
        ("random grid", None, 8, "Moon"), ("random grid", None, 5, "moon"),
    ]  # fmt: skip
    assert kept[-3:] == [("white", None, None, "nothing"), ("white", None, 8, "Star"), ("white", None, 5, "nothing")]


def test_images_are_asked_about_once():
    tried = Trials(np.array([[9, 3, -1], [3, 1, 0]]), np.array([[5, -1, -1], [5, 6, 7]]))
    shown = Shown(np.arange(40).reshape(2, 20), np.array([[0, 77], [77, 78]]), tried)
    assert shown.heldout == [0, 1, 3, 5, 6, 7, 9]
    assert shown.training == [*range(16), *range(20, 36), 77, 78]  # the 16 first of the top images


def test_the_latents_that_fire_most_are_named():
    concepts = [Concept(latent, None, 0.0, n, 0.1, 1.0) for latent, n in enumerate([9, 4, 30, 9])]
    assert [one.latent for one in nameable(concepts, 2)] == [2, 0]
    assert [one.latent for one in nameable(concepts, 9)] == [2, 0, 3]


def test_grids_show_top_images():
    with pytest.raises(UsageError, match=r"naming\.images = 'grid': only the method \"vlm\" shows top images"):
        Naming(methods=("steering",), images="grid")


@pytest.mark.parametrize("methods", [(), ("vlm", "vlm")])
def test_methods_are_checked(methods: tuple):
    with pytest.raises(UsageError, match=r"naming\.methods"):
        Naming(methods)
