"""A page on which people compare the top images of neurons. It opens from disk or any web server and needs no network.

The step's directory holds `pairs.parquet` and the folder `page`, which is given to people. The page knows no scores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from sae_ray.encoders import load_preprocess
from sae_ray.encoders.sources import named_by
from sae_ray.images.part import Preparation, decode_part
from sae_ray.report.album import sprite_of, thumbnail_size
from sae_ray.report.page import ASSETS, template
from sae_ray.scores.tables import ScoreTables
from sae_ray.seeds import derived_seed
from sae_ray.store.steps import Step
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import ScorePlan

if TYPE_CHECKING:
    from jaxtyping import Bool, Int

STAGE = "humans"
SIDE = 4
"""Images per row and column of a set."""
PAIRS = "pairs.parquet"
PAIRS_SCHEMA = pa.schema([("pair", pa.int32()), ("first", pa.int64()), ("second", pa.int64())])
PAGE = "page"


def rating_step(plan: StudyPlan, score: ScorePlan, n_pairs: int) -> Step:
    """The step of the page about the neurons of a scoring pass."""
    config = {"scores": score.step.name, "pairs": n_pairs, "seed": derived_seed(plan.study.seed, STAGE)}
    return Step(plan.root, STAGE, f"{STAGE}-{score.name}", config)


def ratable(tables: ScoreTables) -> Bool[np.ndarray, " neurons"]:
    """The neurons that people can be asked about: those with an MS and enough top images for a set."""
    image = tables.top_images.image
    full = image[:, SIDE**2 - 1] >= 0 if image.shape[1] >= SIDE**2 else np.zeros(len(image), bool)
    return full & ~np.isnan(tables.scores.ms)


def write_rating(
    plan: StudyPlan,
    score: ScorePlan,
    step: Step,
    pairs: Int[np.ndarray, "pairs 2"],
    after_neuron: Callable[[int], None] = lambda done: None,
) -> int:
    """Writes the pairs and the page; returns how many images could no longer be read, which are grey.

    `after_neuron` is called with the number of neurons done since the last call.

    Raises SaeRayError if the encoder's preprocessing cannot be loaded, or this machine does not have the images.
    """
    page, images = step.folder / PAGE, score.activations.images
    top_image = ScoreTables(score.step.folder).top_images.image[:, : SIDE**2]
    with named_by("encoder.model", plan.study.encoder.model):
        preparation = Preparation(load_preprocess(plan.encoder.model, plan.encoder.revision))
    height, width = size = thumbnail_size(plan.encoder.image_size)
    n_missing = 0
    for neuron in np.unique(pairs).tolist():
        ids = images.manifest["image_id"].take(pa.array(top_image[neuron])).to_pylist()
        part = decode_part(images.folder, ids, [preparation], rendering=images.rendering)
        pixels: list[np.ndarray | None] = [None] * len(ids)
        for place, one in zip(part.accepted.tolist(), part.pixels[0], strict=True):
            pixels[place] = one
        page.write_bytes(f"neurons/{neuron}.jpg", sprite_of(pixels, size, SIDE))
        n_missing += len(part.rejects)
        after_neuron(1)

    facts = {"page": step.name, "side": SIDE, "width": width, "height": height, "pairs": pairs.tolist()}
    text = template("rating.html.jinja").render(study=plan.study.name, n_pairs=len(pairs), facts=facts)
    page.write_bytes("index.html", text.encode())
    for name in ("report.css", "rating.css", "rating.js"):
        page.write_bytes(name, (ASSETS / name).read_bytes())
    columns = [np.arange(len(pairs)), pairs[:, 0], pairs[:, 1]]
    step.folder.write_parquet(PAIRS, pa.table(columns, schema=PAIRS_SCHEMA))
    return n_missing
