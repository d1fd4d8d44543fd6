"""`sae-ray find`: finds the latents whose top images match a text."""

from __future__ import annotations

from typing import Any

import numpy as np

from sae_ray.concepts.labelling import image_classes, label_concepts, mean_embeddings, search
from sae_ray.encoders.text import load_text_encoder
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering.interventions import load_max_token
from sae_ray.store.activations import ActivationStore
from sae_ray.study.names import LABEL, NeuronNames
from sae_ray.study.plan import StudyPlan
from sae_ray.text_table import number, table_lines

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
        scores.check_scored()
    extract.run_only(plan, [space])

    tables = ScoreTables(pictures.step.folder)
    top_image = tables.top_images.image
    ms = ScoreTables(heldout.step.folder).scores.ms.tolist()
    assert pictures.sae is not None, "chosen among the SAEs"
    max_token = load_max_token(pictures.sae.step.folder).numpy()
    steering = plan.study.steering
    labels = pictures.activations.images.labels
    classes = image_classes(labels, steering.ignore_labels if steering else ())
    names = NeuronNames.read(plan, chosen, labels["label_name"].to_pylist())
    concepts = label_concepts(tables.scores, top_image, classes, max_token)
    means = mean_embeddings(top_image, ActivationStore(space.step.folder), [one.latent for one in concepts])
    vector = load_text_encoder(space.encoder.model, space.info.revision).embed_texts([text])[0].numpy()
    rows = []
    for concept, similarity in search(vector, means, concepts):
        name, method, score = names.of(concept) or (None, None, None)
        facts = {
            "latent": concept.latent,
            "similarity": similarity,
            "ms": None if np.isnan(ms[concept.latent]) else ms[concept.latent],
            "name": name,
            "name_method": method,
            "name_score": score,
            "label": concept.label,
            "label_name": names.label_of(concept),
            "purity": concept.purity,
            "frequency": concept.frequency,
            "max_token": concept.max_token,
        }
        rows.append(facts)
    return rows


def found_lines(rows: list[dict[str, Any]]) -> list[str]:
    """The latents as a table; names have a column of their own where a stage has found some."""
    titles = ["latent", "similarity", "MS", "frequency", "max_token", "name", "most of its top images"]
    table = [titles, *map(_cells, rows)]
    if not any(cells[5] for cells in table[1:]):
        return table_lines([cells[:5] + cells[6:] for cells in table], ">>>>><")
    return table_lines(table, ">>>>><<")


def _cells(row: dict[str, Any]) -> list[str]:
    name = label = ""
    if row["name_method"] not in (None, LABEL):
        score = "" if row["name_score"] is None else f" {row['name_score']:.2f}"
        name = f"{row['name']} ({row['name_method']}{score})"
    if row["label"] is not None:
        label = f"{row['label_name']} ({row['purity']:.0%})"
    numbers = [f"{row['similarity']:.3f}", number(row["ms"], 3), f"{row['frequency']:.4f}", f"{row['max_token']:.3g}"]
    return [str(row["latent"]), *numbers, name, label]
