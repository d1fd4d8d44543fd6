"""What closes the gap between latents and DiffMean: `python -m bench.profiles ROOT`, of a finished study of the world.

Every way adds something to activations, with a scale that is chosen on training images as the steering stage chooses
it, and answers its questions. Added are the best latent's decoder row, its profile with more or fewer images and
latents, the mean activation of its top images less that of the others, or DiffMean.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sae_ray.jobs.steering import Evaluation

from bench.record import Table, record
from sae_ray.sae import load_sae
from sae_ray.steering import load_llava
from sae_ray.steering.diffmean import class_sums, diffmean
from sae_ray.steering.evaluation import CONCEPTS_SCHEMA, Yardstick, answer_table, best_scales, rates
from sae_ray.steering.profiles import Profile, TopImages, code_sums, profiles, top_images
from sae_ray.steering.protocol import Added, calibration_questions, main_questions, sample
from sae_ray.steering.respondent import Directions, Respondent
from sae_ray.store.activations import ActivationStore
from sae_ray.study.root import recalled_plan

IMAGES = (16, 200)
LATENTS = (1, 64)
BATCH = 64


class World:
    """What all ways share."""

    def __init__(self, root: str):
        plan = recalled_plan(root)
        [steered] = plan.steerings
        self.evaluation = Evaluation(steered, plan.study.seed)
        self.steering, self.seed = steered.steering, plan.study.seed
        self.llava = load_llava(self.steering.llava, self.steering.revision)
        self.sae = load_sae(steered.sae.step.folder)
        self.store = ActivationStore(steered.scores.activations.step.folder)
        self.best = [one for one in self.evaluation.subjects.best if one.label is not None]
        self.train, self.heldout = cache(self.evaluation.train.picture), cache(self.evaluation.heldout.picture)
        self.members = cache(self._members)
        self.usable = np.zeros(len(self.evaluation.train.ids), bool)
        self.usable[self.evaluation.train.usable] = True

    def _members(self, n_images: int) -> np.ndarray:
        latents, parts = [one.latent for one in self.best], range(len(self.store.parts))
        found = [top_images(self.sae, self.store, part, latents, self.usable, n_images) for part in parts]
        return TopImages.merged(found, n_images).members(len(self.usable))

    def profiles(self, n_images: int, n_latents: int) -> dict[int, Profile]:
        sums = (code_sums(self.sae, self.store, part, self.members(n_images)) for part in range(len(self.store.parts)))
        found = zip(self.best, profiles(sums, n_latents), strict=True)
        return {one.latent: profile for one, profile in found if profile is not None}

    def means(self, members: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Mean activation of some images less that of the others, for each class."""
        found = {}
        for one, own in zip(self.best, members, strict=True):
            parts = (class_sums(self.store, part, own.astype(np.int64) - 1, 1) for part in range(len(self.store.parts)))
            found[one.label] = torch.tensor(diffmean(parts)[0])
        return found

    def rates(self, directions: Directions) -> list[Any]:
        """White image, images of other classes, other prompts; the last two also for suppression."""
        one = self.evaluation
        added = [
            Added("profile", best.latent, best.label) if directions.profiles else Added("diffmean", -1, best.label)
            for best in self.best
        ]
        respondent = Respondent(self.llava, self.sae, directions, self.steering)

        asked = calibration_questions(added, one.train.classes, one.train.usable, self.steering, self.seed)
        scales = best_scales(added, asked, respondent.answers(asked, self.train, BATCH), one.class_name)
        shown = sample(one.heldout.usable, self.steering.n_images, self.seed)
        asked = main_questions(one.subjects, scales, one.heldout.classes, shown, self.steering)
        asked = [question for question in asked if question.kind == "unsteered" or "_" in question.kind]
        told = answer_table(
            asked,
            respondent.answers(asked, self.heldout, BATCH),
            Yardstick(self.steering.prompt, one.class_name, {}, {}),
        )
        found = rates(told, CONCEPTS_SCHEMA.empty_table(), self.steering.prompt)
        way = added[0].way
        white, insertion, suppression = (
            found["kinds"][f"{way}_{place}"] for place in ("white", "insertion", "suppression")
        )
        kept = [found["unchanged"][f"{way}_{place}"]["rate"] for place in ("insertion", "suppression")]
        shares = [insertion["rate"], kept[0], suppression["rate"], kept[1]]
        return [f"{white['right']} of {white['asked']}", *(f"{share:.1%}" for share in shares)]


def ways(world: World) -> Mapping[str, Directions]:
    rows = {one.latent: Profile((one.latent,), (one.max_token,)) for one in world.best}
    found = {"the latent alone, in multiples of its largest value": Directions(profiles=rows)}
    for n in IMAGES:
        found[f"profile: {n} images, 16 latents"] = Directions(profiles=world.profiles(n, 16))
    for n in LATENTS:
        found[f"profile: 200 images, {n} latents"] = Directions(profiles=world.profiles(200, n))
    for n in IMAGES:
        found[f"mean activation of the {n} top images"] = Directions(world.means(list(world.members(n))))
    classes = np.array([label or "" for label in world.evaluation.train.classes])
    found["mean activation of the class: DiffMean"] = Directions(
        world.means([classes == one.label for one in world.best])
    )
    return found


def main() -> None:
    world = World(sys.argv[1])
    columns = ["added, with a scale of its own", "white image", "other classes", "other answers kept"]
    columns += ["suppressed", "other answers kept then"]
    rows = []
    for name, directions in ways(world).items():
        rows.append([name, *world.rates(directions)])
        print("  ".join(map(str, rows[-1])), flush=True)
    record(
        "profiles", [Table(title="Ways to add a concept", columns=columns, rows=rows)], {"root": Path(sys.argv[1]).name}
    )


if __name__ == "__main__":
    main()
