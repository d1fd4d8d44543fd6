"""The steering protocol: who is asked what, what edits do, what answers are worth; against counts by hand."""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
import torch

from sae_ray.concepts.labelling import Concept
from sae_ray.sae import SAE
from sae_ray.steering.diffmean import class_sums, diffmean
from sae_ray.steering.evaluation import (
    Yardstick,
    answer_table,
    best_scales,
    concept_table,
    rate_lines,
    rates,
    texts,
)
from sae_ray.steering.llava import load_llava
from sae_ray.steering.profiles import PROFILE_LATENTS, Profile, TopImages, code_sums, profiles, top_images
from sae_ray.steering.protocol import (
    CALIBRATION_IMAGES,
    SCALES,
    WHITE,
    Added,
    Question,
    Scales,
    Subjects,
    calibration_questions,
    choose_subjects,
    main_questions,
    sample,
    usable_images,
)
from sae_ray.steering.respondent import Directions, Respondent
from sae_ray.study.config import Steering
from sae_ray.world.write import MODELS

ASK = "What is it?"
OTHER = "Which colour?"


def steering(**values) -> Steering:
    return Steering("llava", **{"prompt": ASK, "min_images": 2, "strength": 4.0, "unit": "max", **values})


def concept(latent: int, label: str | None, n_firing: int = 10, purity: float = 1.0, max_token: float = 2.0) -> Concept:
    return Concept(latent, label, purity, n_firing, n_firing / 100, max_token)


# Who is asked what


def test_subjects_are_the_pure_and_as_controls_the_others():
    latents = [
        concept(0, "cat", n_firing=5),
        concept(1, "cat", n_firing=9),
        concept(2, "dog", purity=0.7),
        concept(3, "dog", n_firing=1),
        concept(4, None),
        concept(5, "dog", n_firing=3, max_token=100.0),
        concept(6, "dog", n_firing=8),
    ]
    neurons = [concept(0, "cat", purity=0.3), concept(1, None)]
    chosen = choose_subjects(latents, neurons, steering())
    assert [one.latent for one in chosen.concepts] == [1, 6, 0, 5]  # by support
    assert [one.latent for one in chosen.best] == [5, 1]  # by maximum times frequency
    assert [one.latent for one in chosen.impure] == [2]  # 3 fires too rarely, 4 is of no class
    assert [one.latent for one in chosen.neurons] == [0, 1]
    few = choose_subjects(latents, neurons, steering(n_white_latents=1, n_image_latents=1))
    assert [[one.latent for one in some] for some in few] == [[1], [5], [2], [0]]


def test_without_labels_the_most_supported_latents_are_steered():
    latents = [concept(0, None, n_firing=5, purity=0), concept(1, None, n_firing=9, purity=0), concept(2, None, 1, 0)]
    chosen = choose_subjects(latents, [], steering(n_image_latents=1))
    assert [[one.latent for one in some] for some in chosen] == [[1, 0], [1], [], []]
    asked = main_questions(chosen, {}, [None] * 3, [0, 2], steering())
    assert Counter(question.kind for question in asked) == {
        "unsteered": 3, "reconstruction": 2, "white": 2, "insertion": 2,
    }  # fmt: skip


def test_images_that_are_asked_about():
    assert usable_images(list("abcde"), ["cat", "blank", "dog", None, "cat"], {"e"}, ["blank"]) == [0, 2, 3]
    images = list(range(0, 200, 2))
    assert sample(images, 1000, 0) == images
    some = sample(images, 20, 0)
    assert (len(set(some)), some) == (20, sorted(some))
    assert set(some) < set(images)
    assert some == sample(images, 20, 0) != sample(images, 20, 1)


def test_every_edit_is_asked_about_the_images_it_is_for():
    classes = ["cat", "dog", "cat", None, "dog"]
    subjects = Subjects(
        [concept(7, "cat"), concept(8, "dog")],
        [concept(7, "cat")],
        [concept(9, "dog")],
        [concept(1, "dog", max_token=3)],
    )
    config = steering(other_prompts=(OTHER,))
    scales = {Added("diffmean", -1, "cat"): Scales(2.0, 0.5), Added("profile", 7, "cat"): Scales(1.0, 4.0)}
    asked = main_questions(subjects, scales, classes, [0, 1, 2, 3], config)
    assert len(set(asked)) == len(asked)

    def of(kind: str) -> set[tuple]:
        return {tuple(question[1:]) for question in asked if question.kind == kind}

    both = (ASK, OTHER)
    assert of("unsteered") == {(-1, None, 0.0, WHITE, ASK)} | {
        (-1, classes[image], 0.0, image, prompt) for image in range(4) for prompt in both
    }
    assert of("reconstruction") == {(-1, classes[image], 0.0, image, prompt) for image in range(4) for prompt in both}
    assert of("white") == {(7, "cat", 8.0, WHITE, ASK), (8, "dog", 8.0, WHITE, ASK)}
    assert of("impure") == {(9, "dog", 8.0, WHITE, ASK)}
    assert of("neuron") == {(1, "dog", 12.0, WHITE, ASK)}
    assert of("insertion") == {(7, "cat", 8.0, image, prompt) for image in (1, 3) for prompt in both}
    assert of("suppression") == {(7, "cat", 0.0, image, prompt) for image in (0, 2) for prompt in both}
    assert of("diffmean_white") == {(-1, "cat", 2.0, WHITE, ASK)}
    assert of("diffmean_insertion") == {(-1, "cat", 2.0, image, prompt) for image in (1, 3) for prompt in both}
    assert of("diffmean_suppression") == {(-1, "cat", -0.5, image, prompt) for image in (0, 2) for prompt in both}
    assert of("profile_white") == {(7, "cat", 1.0, WHITE, ASK)}
    assert of("profile_insertion") == {(7, "cat", 1.0, image, prompt) for image in (1, 3) for prompt in both}
    assert of("profile_suppression") == {(7, "cat", -4.0, image, prompt) for image in (0, 2) for prompt in both}
    absolute = main_questions(subjects, {}, classes, [], steering(strength=100.0, unit="absolute"))
    assert {question.strength for question in absolute if question.kind in ("white", "neuron")} == {100.0}


# DiffMean


def test_diffmean_is_the_difference_of_means(write_store, tmp_path):
    rng = np.random.default_rng(0)
    index = np.repeat(np.arange(9), 3)
    x = rng.normal(size=(27, 4)).astype(np.float32)
    parts = [
        (index[rows], np.tile(np.arange(3), len(rows) // 3), x[rows]) for rows in (np.arange(12), np.arange(12, 27))
    ]
    store = write_store(tmp_path, parts)
    codes = np.array([0, 1, -1, 0, 1, 1, -1, 0, -1])
    found = diffmean(class_sums(store, part, codes, 3) for part in range(2))
    for code in range(2):
        members = codes[index] == code
        np.testing.assert_allclose(found[code], x[members].mean(0) - x[~members].mean(0), rtol=1e-5, atol=1e-6)
    assert np.isnan(found[2]).all()  # no image is of that class


# Profiles


@pytest.mark.parametrize("cuts", [(18,), (6, 15), (3, 6, 9, 12, 15)], ids=len)
@pytest.mark.parametrize("kind", ["relu", "topk"])
def test_a_profile_is_the_difference_of_mean_codes(write_store, tmp_path, kind: str, cuts: tuple[int, ...]):
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    index, token = np.repeat(np.arange(7), 3)[3:], np.tile(np.arange(3), 6)  # image 0 could not be read
    x = rng.normal(size=(18, 8)).astype(np.float32)
    x[index == 5] = x[index == 2]  # a tie
    bounds = [0, *cuts, 18]
    rows = [np.arange(*pair) for pair in itertools.pairwise(bounds) if pair[0] < pair[1]]
    store = write_store(tmp_path, [(index[some], token[some], x[some]) for some in rows])
    sae = SAE(
        kind, torch.randn(8, 24), torch.randn(24, 8), torch.randn(24), torch.zeros(8), k=6 if kind == "topk" else None
    )
    usable = np.arange(7) != 3
    latents = [4, 0, 19]

    found = [top_images(sae, store, part, latents, usable) for part in range(len(rows))]
    top = TopImages.merged(found, n=2)
    codes = sae.encode(torch.tensor(x)).double().numpy()
    of_image = np.array([codes[index == image].mean(axis=0) if image else np.zeros(24) for image in range(7)])
    members = top.members(7)
    for place, latent in enumerate(latents):
        able = [image for image in range(1, 7) if usable[image] and of_image[image, latent] > 0]
        best = sorted(able, key=lambda image: (-round(of_image[image, latent], 5), image))[:2]
        assert set(np.flatnonzero(members[place])) == set(best)

    given = profiles(code_sums(sae, store, part, members) for part in range(len(rows)))
    for place, profile in enumerate(given):
        own = members[place][index]
        if not own.any():
            assert profile is None
            continue
        change = codes[own].mean(axis=0) - codes[~own].mean(axis=0)
        assert profile is not None
        assert len(profile.latents) == min(PROFILE_LATENTS, np.count_nonzero(change))
        np.testing.assert_allclose(profile.changes, change[list(profile.latents)], rtol=1e-4, atol=1e-5)
        left = np.delete(np.abs(change), profile.latents)
        assert np.max(left, initial=0) <= np.abs(profile.changes).min() + 1e-5
        assert sorted(map(abs, profile.changes), reverse=True) == [abs(one) for one in profile.changes]
    assert sum(profile is not None for profile in given) >= 2


def test_scales_are_chosen_on_images_of_the_class_and_of_others():
    classes = ["cat", "dog"] * 30
    images = list(range(4, 60))
    added = [Added("diffmean", -1, "dog"), Added("profile", 3, "dog")]
    asked = calibration_questions(added, classes, images, steering(), seed=0)
    assert asked == calibration_questions(added, classes, images, steering(), seed=0)
    assert len(asked) == 2 * 2 * CALIBRATION_IMAGES * len(SCALES)
    both = [[question[3:] for question in asked if question.latent == latent] for latent in (-1, 3)]
    assert both[0] == both[1], "the same images choose both scales"
    for question in asked:
        insertion = question.kind.endswith("insertion")
        assert (classes[question.image_index], question.strength > 0) == (
            ("cat", True) if insertion else ("dog", False)
        )
        assert question.image_index in images
    assert {abs(question.strength) for question in asked} == set(SCALES)


def test_the_best_scale_is_the_smallest_of_the_most_successful():
    added = [Added("diffmean", -1, "dog"), Added("profile", 3, "dog")]
    asked = [
        Question(one.kind(place), one.latent, one.label, sign * scale, image, ASK)
        for one in added
        for place, sign in (("insertion", 1), ("suppression", -1))
        for scale in SCALES
        for image in range(2)
    ]

    def answer(question: Question) -> str:
        if question.kind == "profile_insertion":
            return "dog" if question.strength == 8.0 else "cat"
        if question.kind == "diffmean_insertion":
            return "dog" if abs(question.strength) in (2.0, 4.0) or question.image_index == 0 else "cat"
        return "dog" if question.strength > -4.0 else "cat"

    found = best_scales(added, asked, [answer(question) for question in asked], {"dog": "dog"})
    assert found == {added[0]: Scales(2.0, 4.0), added[1]: Scales(8.0, 4.0)}
    assert best_scales([], [], [], {}) == {}


# Edits


@pytest.fixture(scope="module")
def respondent() -> Callable[..., Respondent]:
    """The world's LLaVA with a random SAE, and a vector; on the CPU or another device."""
    torch.manual_seed(0)
    sae = SAE("relu", torch.randn(128, 32) / 11, torch.randn(32, 128), torch.randn(32), torch.randn(128))
    profile = Profile((5, 9, 30), (2.0, -1.0, 0.5))
    directions = Directions({"star": torch.randn(128).double()}, {3: profile})
    config = Steering("", error="drop", max_new_tokens=5)

    @functools.cache
    def on(device: str = "cpu") -> Respondent:
        return Respondent(load_llava(str(MODELS / "llava"), device=device), sae.to(device), directions, config)

    return on


@pytest.mark.parametrize(
    "question",
    [
        Question("unsteered", -1, "star", 0.0, 0, ASK),
        Question("reconstruction", -1, "star", 0.0, 0, ASK),
        Question("white", 3, "star", 7.0, WHITE, ASK),
        Question("insertion", 3, "star", 7.0, 0, ASK),
        Question("impure", 3, "star", 7.0, WHITE, ASK),
        Question("suppression", 3, "star", 0.0, 0, ASK),
        Question("neuron", 5, "star", 7.0, WHITE, ASK),
        Question("diffmean_white", -1, "star", 2.0, WHITE, ASK),
        Question("diffmean_insertion", -1, "star", 2.0, 0, ASK),
        Question("diffmean_suppression", -1, "star", -2.0, 0, ASK),
        Question("profile_white", 3, "star", 2.0, WHITE, ASK),
        Question("profile_insertion", 3, "star", 2.0, 0, ASK),
        Question("profile_suppression", 3, "star", -2.0, 0, ASK),
    ],
    ids=lambda question: question.kind,
)
def test_an_edit_does_what_its_question_asks(respondent: Callable[..., Respondent], question: Question, device: str):
    x = torch.randn(17, 128)
    seen = x.to(device, copy=True)
    edited = seen
    for edit in respondent(device)._edits(question):
        edited = edit(edited)
    assert edited.device == seen.device
    sae, directions = respondent().sae, respondent().directions
    codes = sae.encode(x)
    match question.kind:
        case "unsteered":
            expected = x
        case "reconstruction":
            expected = sae.decode(codes)
        case "white" | "insertion" | "impure" | "suppression":
            codes[:, question.latent] = question.strength
            expected = sae.decode(codes)
        case "neuron":
            expected = x.clone()
            expected[:, question.latent] = question.strength
        case "profile_white" | "profile_insertion" | "profile_suppression":
            expected = x + question.strength * torch.tensor([2.0, -1.0, 0.5]) @ sae.W_dec[[5, 9, 30]]
        case _:
            expected = x + question.strength * directions.diffmean["star"].float()
    torch.testing.assert_close(edited.cpu(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(seen.cpu(), x)


def test_answers_depend_neither_on_what_is_asked_beside_them_nor_on_the_device(
    respondent: Callable[..., Respondent], device: str
):
    from sae_ray.world.render import render

    asked = [
        Question(kind, latent, None, 50.0, image, prompt)
        for image in (WHITE, 40_000, 40_001)
        for kind, latent in (("unsteered", -1), ("insertion", 3), ("insertion", 4), ("neuron", 4))
        for prompt in ("What is shown in this image? Use exactly one word!", "What is the background?")
    ]
    together = respondent(device).answers(asked, render, batch_size=7)
    assert together == [respondent().answers([question], render, 1)[0] for question in asked]
    assert len(set(together)) > 4  # they are not all the same


# What answers are worth


CLASSES = {"n1 cat": "cat, house cat", "dog": "dog"}
VECTORS = {"cat": [1, 0, 0], "house": [1, 0, 0], "dog": [0, 1, 0], "red": [0, 0, 1], "nothing": [0, 0, -1]}
TARGETS = {
    ("latent", 7): [1, 0, 0],
    ("latent", 9): [0, 0.6, 0.8],
    ("neuron", 1): [0, 1, 0],
    ("class", "n1 cat"): [1, 0, 0],
}
YARDSTICK = Yardstick(
    ASK,
    CLASSES,
    {key: np.array(vector, float) for key, vector in TARGETS.items()},
    {key: np.array(vector, float) for key, vector in VECTORS.items()},
)
CAT = "n1 cat"
ANSWERED = [
    (Question("unsteered", -1, None, 0.0, WHITE, ASK), "nothing"),
    (Question("unsteered", -1, "dog", 0.0, 0, ASK), "dog"),
    (Question("unsteered", -1, "dog", 0.0, 0, OTHER), "red"),
    (Question("unsteered", -1, CAT, 0.0, 1, ASK), "house cat"),
    (Question("unsteered", -1, CAT, 0.0, 2, ASK), "dog"),
    (Question("reconstruction", -1, "dog", 0.0, 0, ASK), "cat"),
    (Question("white", 7, CAT, 8.0, WHITE, ASK), "Cat."),
    (Question("white", 9, "unnamed", 8.0, WHITE, ASK), "red"),
    (Question("neuron", 1, "dog", 8.0, WHITE, ASK), ""),
    (Question("insertion", 7, CAT, 8.0, 0, ASK), "cat on red"),
    (Question("insertion", 7, CAT, 8.0, 0, OTHER), "Red"),
    (Question("suppression", 7, CAT, 0.0, 1, ASK), "dog"),
    (Question("suppression", 7, CAT, 0.0, 2, ASK), "dog"),
    (Question("diffmean_insertion", -1, CAT, 2.0, 0, ASK), "dog"),
    (Question("diffmean_insertion", -1, CAT, 2.0, 0, OTHER), "dog"),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers() -> pa.Table:
    return answer_table(*zip(*ANSWERED, strict=True), YARDSTICK)  # pyright: ignore[reportArgumentType]


def test_what_has_to_be_embedded():
    assert texts([answer for _, answer in ANSWERED], CLASSES) == ["cat", "dog", "house", "nothing", "red"]


def test_every_answer_is_held_against_that_without_the_edit(answers: pa.Table):
    assert answers["steered"].to_pylist() == [answer for _, answer in ANSWERED]
    columns = ("unsteered", "right", "unsteered_right", "similarity", "unsteered_similarity")
    found = list(zip(*(answers[name].to_pylist() for name in columns), strict=True))
    assert found[:6] == [
        ("nothing", None, None, None, None),
        ("dog", True, True, None, None),
        ("red", True, True, None, None),
        ("house cat", True, True, None, None),
        ("dog", False, False, None, None),
        ("dog", False, True, None, None),
    ]
    assert found[6:] == [
        ("nothing", True, False, 1.0, 0.0),
        ("nothing", None, None, 0.8, -0.8),  # its class has no name
        ("nothing", False, False, None, 0.0),
        ("dog", True, False, 1.0, 0.0),
        ("red", True, True, None, None),
        ("house cat", True, False, 0.0, 1.0),
        ("dog", True, True, 0.0, 0.0),  # it was not named before
        ("dog", False, False, 0.0, 0.0),
        ("red", False, True, None, None),
    ]


def test_rates_count_what_can_be_counted(answers: pa.Table):
    subjects = Subjects([concept(7, CAT), concept(9, "unnamed")], [concept(7, CAT)], [], [])
    found = rates(answers, concept_table(subjects, YARDSTICK), ASK)
    counted = {kind: (one["answers"], one["asked"], one["right"], one["rate"]) for kind, one in found["kinds"].items()}
    assert counted == {
        "unsteered": (4, 3, 2, 2 / 3),
        "reconstruction": (1, 1, 0, 0.0),
        "white": (2, 1, 1, 1.0),
        "neuron": (1, 1, 0, 0.0),
        "insertion": (1, 1, 1, 1.0),
        "suppression": (1, 1, 1, 1.0),
        "diffmean_insertion": (1, 1, 0, 0.0),
    }
    assert found["kinds"]["white"]["unsteered_rate"] == 0
    assert found["kinds"]["white"]["similarity"] == pytest.approx(0.9)
    assert found["kinds"]["white"]["unsteered_similarity"] == pytest.approx(-0.4)
    assert {kind: (one["asked"], one["right"]) for kind, one in found["unchanged"].items()} == {
        "insertion": (1, 1),
        "diffmean_insertion": (1, 0),
    }
    [insertion] = [line for line in rate_lines(found) if line.startswith("images of other classes, best")]
    assert insertion.split()[-8:] == ["100.0%", "1", "of", "1", "0.0%", "100.0%", "1.000", "0.000"]


def test_bounds_are_the_label_and_the_other_labels():
    subjects = Subjects([concept(7, CAT)], [concept(9, "dog")], [concept(8, "dog")], [])
    targets = {**YARDSTICK.targets, ("latent", 8): np.array([0.6, 0.8, 0.0])}
    table = concept_table(subjects, YARDSTICK._replace(targets=targets))
    assert table.select(["latent", "label", "is_concept", "is_best"]).to_pylist() == [
        {"latent": 7, "label": CAT, "is_concept": True, "is_best": False},
        {"latent": 8, "label": "dog", "is_concept": False, "is_best": False},
        {"latent": 9, "label": "dog", "is_concept": True, "is_best": True},
    ]
    np.testing.assert_allclose(table["label_similarity"], [1.0, 0.8, 0.6])
    np.testing.assert_allclose(table["other_similarity"], [0.0, 0.6, 0.0])
    found = rates(answer_table([ANSWERED[0][0]], ["nothing"], YARDSTICK), table, ASK)
    assert found["bounds"] == {"label_similarity": pytest.approx(0.8), "other_similarity": pytest.approx(0.0)}


def test_nothing_found_is_no_error():
    table = concept_table(Subjects([], [], [], []), YARDSTICK)
    found = rates(answer_table([ANSWERED[0][0]], ["nothing"], YARDSTICK), table, ASK)
    assert found["bounds"] == {"label_similarity": None, "other_similarity": None}
    assert found["kinds"]["unsteered"]["rate"] is None
    assert "–" in rate_lines(found)[1]
