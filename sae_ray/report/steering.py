"""The results of steering a LLaVA: rates with their counts, and answers before and after with their images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from sae_ray.concepts.naming import class_names
from sae_ray.encoders.sources import model_name
from sae_ray.report import plots
from sae_ray.report.album import Album
from sae_ray.report.neurons import Neurons
from sae_ray.report.packing import write_data
from sae_ray.steering.protocol import WHITE
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import SteeringPlan

KINDS = {
    "unsteered": "no edit",
    "reconstruction": "SAE reconstruction, no edit",
    "white": "concept latents, on a white image",
    "impure": "latents without a class, on a white image (control)",
    "neuron": "raw neurons, on a white image (control)",
    "diffmean_white": "DiffMean, on a white image",
    "profile_white": "profiles of the best latents, on a white image",
    "insertion": "best latents, on images of other classes",
    "diffmean_insertion": "DiffMean, on images of other classes",
    "profile_insertion": "profiles of the best latents, on images of other classes",
    "suppression": "best latents ablated, on images of their class",
    "diffmean_suppression": "DiffMean subtracted, on images of its class",
    "profile_suppression": "profiles subtracted, on images of their class",
}
"""Kind of edit -> its description, in the order of the table."""
TITLES = {
    "white": "A white image",
    "insertion": "Images of other classes",
    "suppression": "Images of the class itself",
}
"""The kinds whose answers are shown, with their headings."""
GOALS = {"white": "name it", "insertion": "name it", "suppression": "no longer name it"}
"""Kind of edit -> what counts as right."""
EXAMPLES = 6
"""Images per kind and latent whose answers a neuron's page shows."""
ON_PAGE = 2
"""Images per kind and latent whose answers the main page shows."""
WHITE_SHOWN = 48
"""Latents whose answers about a white image the main page shows."""


class Answers(NamedTuple):
    """All answers about one image with one edit."""

    kind: str
    latent: int
    image_index: int
    """Of a held-out image; -1 for the white image."""
    rows: list[dict[str, Any]]
    """Rows of `answers.parquet`, one per prompt."""


@dataclass(frozen=True, eq=False)
class SteeringResult:
    """The results of steering with one SAE."""

    plan: SteeringPlan
    counts: dict[str, Any]
    """The rates from `step.json`."""
    concepts: list[dict[str, Any]]
    """The rows of `concepts.parquet`: the steered latents."""
    examples: list[Answers]
    """A few images per kind and latent, evenly spaced over all that were asked about."""
    asked: dict[tuple[str, int], tuple[int, int]]
    """(kind, latent) -> number of right answers and of all answers to the study's prompt, over all images."""

    class_name: Mapping[str, str]
    """Class -> its readable name."""

    @property
    def best(self) -> list[int]:
        """The best latent of each class."""
        return [one["latent"] for one in self.concepts if one["is_best"]]


def read_steering(plan: StudyPlan) -> list[SteeringResult]:
    """The results of all finished steering steps."""
    return [_read(one) for one in plan.steerings if one.step.finished and one.step.failure is None]


def _read(plan: SteeringPlan) -> SteeringResult:
    record = plan.step.record()
    assert record is not None, "it is finished"
    answers = plan.step.folder.read_parquet("answers.parquet")
    groups = _by_edit(answers, plan.steering.prompt)
    asked = {}
    for key, images in groups.items():
        found = [one for answers in images for one in _of_prompt(answers, plan.steering.prompt)]
        known = [row["right"] for row in found if row["right"] is not None]
        asked[key] = sum(known), len(known)
    return SteeringResult(
        plan=plan,
        counts=record["counts"],
        concepts=plan.step.folder.read_parquet("concepts.parquet").to_pylist(),
        examples=[one for images in groups.values() for one in _spread(images, EXAMPLES)],
        asked=asked,
        class_name=class_names(set(plan.heldout.labels["label_name"].to_pylist()) - {None}),
    )


def _by_edit(answers: pa.Table, prompt: str) -> dict[tuple[str, int], list[Answers]]:
    """(kind, latent) -> answers per image. Suppression only counts images whose class is named without the edit."""
    images: dict[tuple[str, int, int], Answers] = {}
    for row in answers.to_pylist():
        if row["kind"] in TITLES:
            key = (row["kind"], row["latent"], row["image_index"])
            images.setdefault(key, Answers(*key, [])).rows.append(row)
    groups: dict[tuple[str, int], list[Answers]] = {}
    for one in images.values():
        if one.kind == "suppression" and not any(row["unsteered_right"] is False for row in _of_prompt(one, prompt)):
            continue
        groups.setdefault((one.kind, one.latent), []).append(one)
    return groups


def _of_prompt(answers: Answers, prompt: str) -> list[dict[str, Any]]:
    return [row for row in answers.rows if row["prompt"] == prompt]


def _spread(images: Sequence[Answers], n: int) -> list[Answers]:
    places = np.unique(np.linspace(0, len(images) - 1, min(n, len(images))).round().astype(int))
    return [images[place] for place in places]


def write_steering(folder: Path, result: SteeringResult, album: Album) -> None:
    """Writes the answers of each latent, for its page."""
    by_latent: dict[int, dict[str, list[dict]]] = {}
    for one in result.examples:
        kinds = by_latent.setdefault(one.latent, {})
        kinds.setdefault(one.kind, []).append(_plain(one, album, result.plan.heldout.name))
    examples = {
        latent: [
            {
                "kind": kind,
                "title": TITLES[kind],
                "right": result.asked[kind, latent][0],
                "n": result.asked[kind, latent][1],
                "images": images,
            }
            for kind, images in kinds.items()
        ]
        for latent, kinds in by_latent.items()
    }
    write_data(folder, f"{result.plan.name}/steering", {"examples": examples, "goals": GOALS})


def _plain(one: Answers, album: Album, heldout: str) -> dict[str, Any]:
    return {
        "image": int(album.numbers(heldout, np.array(one.image_index))),
        "answers": [
            {"prompt": row["prompt"], "before": row["unsteered"], "after": row["steered"], "right": row["right"]}
            for row in one.rows
        ],
    }


def show(result: SteeringResult, cell: Neurons, album: Album) -> dict[str, Any]:
    """The results of one SAE as the template needs them."""
    steering, counts = result.plan.steering, result.counts
    rates = _named(counts["kinds"])
    edited = [row for row in rates if row["rate"] is not None]
    bars = plots.Bars(
        f"Right answers, {result.plan.name}",
        [row["name"] for row in edited],
        {
            "with the edit": [row["rate"] for row in edited],
            "without": [math.nan if row["unsteered_rate"] is None else row["unsteered_rate"] for row in edited],
        },
    )
    unit = "times their largest value on a token" if steering.unit == "max" else ""
    kept = "dropped" if steering.error == "drop" else "kept"
    return {
        "name": result.plan.name,
        "llava": model_name(steering.llava),
        "prompt": steering.prompt,
        "edit": f"set to {steering.strength:g} {unit}".rstrip() + f" and the SAE's reconstruction error was {kept}",
        "rates": rates,
        "unchanged": _named(counts["unchanged"]),
        "upper": counts["bounds"]["label_similarity"],
        "lower": counts["bounds"]["other_similarity"],
        "plots": [plots.figure(bars)] if edited else [],
        "groups": [group for kind in TITLES if (group := _answers(result, kind, cell, album))["answers"]],
    }


def _named(counts: dict[str, dict]) -> list[dict[str, Any]]:
    return [{"name": name} | counts[kind] for kind, name in KINDS.items() if kind in counts]


def _answers(result: SteeringResult, kind: str, cell: Neurons, album: Album) -> dict[str, Any]:
    """A few answers before and after, with their images. For the white image the latent's top images are shown."""
    best = result.best
    mine = [one for one in result.examples if one.kind == kind]
    if kind == "white":
        chosen = sorted(mine, key=lambda one: one.latent not in best)[:WHITE_SHOWN]
        words = (
            f"Answers about a white image, for {len(chosen)} of {len(mine)} latents, the best of each class first. "
            "Beside each answer are the latent's top images."
        )
    else:
        groups = [[one for one in mine if one.latent == latent] for latent in best]
        chosen = [one for turn, group in enumerate(groups) for one in _few(group, turn)]
        words = "For each latent, images are evenly spaced over all that were asked about, whatever the answers."
    return {"title": TITLES[kind], "words": words, "answers": [_shown(one, result, cell, album) for one in chosen]}


def _shown(one: Answers, result: SteeringResult, cell: Neurons, album: Album) -> dict[str, Any]:
    [row] = _of_prompt(one, result.plan.steering.prompt)
    is_white = one.image_index == WHITE
    tops = album.numbers(cell.pictures.name, cell.top_image[one.latent][:4])
    number = int(album.numbers(result.plan.heldout.name, np.array(one.image_index)))
    return {
        "images": [image for image in tops.tolist() if image >= 0] if is_white else [],
        "image": number,
        "name": "white image" if is_white else album.name(number),
        "latent": one.latent,
        "concept": result.class_name.get(row["concept"], row["concept"]),
        "before": row["unsteered"],
        "after": row["steered"],
        "mark": "" if row["right"] is None else "yes" if row["right"] else "no",
    }


def _few(answers: Sequence[Answers], turn: int) -> list[Answers]:
    """Picks `ON_PAGE` answers; each turn picks others, so that latents are not all shown on the same images."""
    n = min(ON_PAGE, len(answers))
    return [answers[(turn + place * len(answers) // n) % len(answers)] for place in range(n)]
