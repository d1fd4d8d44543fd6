"""`sae-ray find`: finds the latents whose top images match a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_ray.concepts.labelling import image_classes, label_concepts, mean_embeddings, search
from sae_ray.concepts.naming import class_names
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import SaeRayError
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.interventions import load_max_token
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.text_table import table_lines

from . import extract
from .options import chosen_sae


def found(plan: StudyPlan, text: str, sae: str | None = None) -> list[dict[str, Any]]:
    """All live latents of an SAE, best match first.

    The text is compared with images by the study's scorer, or without steering by its encoder. Missing embeddings of
    the images are extracted first.

    Args:
        text: what to look for.
        sae: name of the cell. Default: the one that steers the study's LLaVA, or the only one.

    Raises:
        UsageError: there is no such SAE, or the study has no model that embeds texts.
        SaeRayError: the SAE is not scored yet.
    """
    space = plan.text_space
    chosen = chosen_sae(plan, sae)
    heldout, pictures = plan.passes(chosen)
    for scores in (heldout, pictures):
        if not scores.step.finished:
            raise SaeRayError(f"{scores.step.label} is not there yet; run the score stage first")
    extract.run_only(plan, [space])

    tables = ScoreTables(pictures.step.folder)
    top_image = tables.top_images.image
    ms = ScoreTables(heldout.step.folder).scores.ms.tolist()
    assert pictures.sae is not None, "chosen among the SAEs"
    max_token = load_max_token(pictures.sae.step.folder).numpy()
    steering = plan.study.steering
    labels = pictures.activations.images.labels
    classes = image_classes(labels, steering.ignore_labels if steering else ())
    names = class_names(set(labels["label_name"].to_pylist()) - {None})
    concepts = label_concepts(tables.scores, top_image, classes, max_token)
    means = mean_embeddings(top_image, ActivationStore(space.step.folder), [one.latent for one in concepts])
    vector = load_text_encoder(space.encoder.model, space.info.revision).embed_texts([text])[0].numpy()
    return [
        {
            "latent": one.concept.latent,
            "similarity": one.similarity,
            "ms": None if np.isnan(ms[one.concept.latent]) else ms[one.concept.latent],
            "label": one.concept.label,
            "name": names.get(one.concept.label or "", one.concept.label),
            "purity": one.concept.purity,
            "frequency": one.concept.frequency,
            "max_token": one.concept.max_token,
        }
        for one in search(vector, means, concepts)
    ]


def found_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The latents as a table."""
    table = [["latent", "similarity", "MS", "frequency", "max_token", "most of its top images"]]
    for row in rows:
        ms = "–" if row["ms"] is None else f"{row['ms']:.3f}"
        label = "" if row["name"] is None else f"{row['name']} ({row['purity']:.0%})"
        figures = [f"{row['similarity']:.3f}", ms, f"{row['frequency']:.4f}", f"{row['max_token']:.3g}"]
        table.append([str(row["latent"]), *figures, label])
    return table_lines(table, ">>>>><")
