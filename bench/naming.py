"""How often names are right, by every way to find them: python -m bench.naming ROOT

Of a finished study of the embedded world with `[concepts]` and `[naming]`: the share of latents that represent a shape
(as in `[steering]`, by their top training images) whose name is that shape. A second table tells where SoftWPMI fails,
and a third one what names by steering become at other strengths than the study's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from bench.record import Table, record
from sae_ray.concepts.dissect import soft_wpmi
from sae_ray.concepts.image_codes import image_codes
from sae_ray.concepts.inputs import unit
from sae_ray.concepts.labelling import Concept, image_classes, label_concepts
from sae_ray.concepts.naming import names
from sae_ray.concepts.naming_by_answers import VERIFIED, plain
from sae_ray.concepts.tables import ConceptTables
from sae_ray.encoders.text import load_text_encoder
from sae_ray.sae import load_sae
from sae_ray.scores.tables import ScoreTables
from sae_ray.steering import load_llava, load_max_token
from sae_ray.steering.latent_names import NAMES
from sae_ray.steering.protocol import WHITE, Question
from sae_ray.steering.respondent import Directions, Respondent
from sae_ray.store.activations import ActivationStore
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import NamingPlan
from sae_ray.world.render import SHAPES
from tools.world.words import CAPTION_WORDS

STRENGTHS = (0.5, 1, 2, 4, 8, 16)
"""Multiples of the largest value on a token."""


def pure(plan: NamingPlan) -> list[Concept]:
    """The latents that represent a shape, and that the LLaVA was asked to name."""
    steering, tables = plan.steering, ScoreTables(plan.scores.step.folder)
    classes, max_token = image_classes(plan.train.labels, steering.ignore_labels), load_max_token(plan.sae.step.folder)
    asked = set(plan.step.folder.read_parquet(NAMES)["neuron"].to_pylist())
    found = label_concepts(tables.scores, tables.top_images.image, classes, max_token.numpy())
    return [
        one
        for one in found
        if one.latent in asked and one.stands_for_its_class(steering.min_images, steering.min_purity)
    ]


def right(concepts: Iterable[Concept], name: Mapping[int, str | None]) -> float | None:
    """The share whose name is the class; None if no latent has a name by this method."""
    said = [names(name.get(one.latent) or "", one.label or "") for one in concepts]
    return float(np.mean(said)) if said and name else None


def holding(concepts: Iterable[Concept], plan: NamingPlan) -> float:
    """The share whose name by the LLaVA holds on held-out images, of those that could be tried."""
    rows = plan.step.folder.read_parquet(NAMES).to_pylist()
    score = {row["neuron"]: row["score"] for row in rows if row["method"] == "vlm"}
    tried = [score[one.latent] for one in concepts if score[one.latent] is not None]
    return float(np.mean([one >= VERIFIED for one in tried]))


def names_of(plan: StudyPlan, one: NamingPlan) -> dict[str, dict[int, str | None]]:
    """Method, or its control -> latent -> name."""
    found: dict[str, dict[int, str | None]] = {}
    for row in one.step.folder.read_parquet(NAMES).to_pylist():
        found.setdefault(row["method"], {})[row["neuron"]] = row["name"]
        found.setdefault(f"control of {row['method']}", {})[row["neuron"]] = row["control"]
    [concepts] = [other for other in plan.concepts if other.name == one.name]
    for row in ConceptTables(concepts.step.folder).names.to_pylist():
        if row["rank"] == 0:
            found.setdefault(row["method"], {})[row["neuron"]] = row["name"]
    return found


def first_shapes(plan: StudyPlan, one: NamingPlan, words: Sequence[str]) -> dict[int, str]:
    """Latent of an SAE of the projection -> its first shape word by SoftWPMI on the training images.

    Args:
        words: the vocabulary, the shapes among them.
    """
    store = ActivationStore(one.scores.activations.step.folder)
    found = image_codes(load_sae(one.sae.step.folder), store)
    texts = load_text_encoder(plan.encoder.model).embed_texts(words).double().numpy()
    images = unit(np.concatenate([store.read(number)[2] for number in store.parts]))
    scores = soft_wpmi(found.codes, images @ texts.T)[:, [words.index(shape) for shape in SHAPES]]
    return {latent: list(SHAPES)[int(row.argmax())] for latent, row in enumerate(scores) if not np.isnan(row).any()}


def where_soft_wpmi_fails(plan: StudyPlan, one: NamingPlan) -> list[Any]:
    """A row of the second table."""
    [step] = [other.step for other in plan.concepts if other.name == one.name]
    neurons, concepts = ConceptTables(step.folder).neurons, pure(one)
    name = dict(enumerate(neurons.name))
    named = [concept for concept in concepts if name[concept.latent] is not None]
    there = [concept for concept in named if neurons.purity[concept.latent] >= one.steering.min_purity]
    row = [f"`{one.name}`", len(concepts), len(concepts) - len(named), len(named) - len(there), right(there, name)]
    if one.scores.activations.site.point != "projection":
        return [*row, None, None]
    return [*row, *(right(concepts, first_shapes(plan, one, list(of))) for of in (SHAPES, CAPTION_WORDS))]


def main() -> None:
    plan = recalled_plan(sys.argv[1])
    methods = {
        "vlm": "by the LLaVA", "control of vlm": "random images", "steering": "by steering",
        "control of steering": "another latent", "soft_wpmi": "SoftWPMI", "decoder_cosine": "decoder cosine",
    }  # fmt: skip
    rows: list[list[Any]] = []
    for one in plan.namings:
        found, concepts = names_of(plan, one), pure(one)
        shares = [right(concepts, found.get(method, {})) for method in methods]
        by_llava, *others = (share if share is None else round(share, 3) for share in shares)
        rows.append([f"`{one.name}`", len(concepts), by_llava, round(holding(concepts, one), 3), *others])
    by_llava, *others = methods.values()
    columns = ["SAE", "latents", by_llava, "and holds", *others]
    tables = [Table(title="Right names", columns=columns, rows=rows)]

    rows = [where_soft_wpmi_fails(plan, one) for one in plan.namings]
    rows = [[share if not isinstance(share, float) else round(share, 3) for share in row] for row in rows]
    columns = ["SAE", "latents", "no name", "not pure there", "the others", "training images", "and all words"]
    tables.append(Table(title="SoftWPMI", columns=columns, rows=rows))

    [steered] = [one for one in plan.namings if "steering" in one.methods]
    llava = load_llava(steered.steering.llava, steered.steering.revision)
    respondent = Respondent(llava, load_sae(steered.sae.step.folder), Directions(), steered.steering)
    unsteered = plain(llava.answer(llava.white(), steered.steering.prompt))
    concepts, rows = pure(steered), []
    for strength in STRENGTHS:
        prompt = steered.steering.prompt
        asked = [Question("white", one.latent, one.label, strength * one.max_token, WHITE, prompt) for one in concepts]
        said = [plain(answer) for answer in respondent.answers(asked, lambda index: llava.white(), 64)]
        name = {one.latent: text for one, text in zip(concepts, said, strict=True)}
        nothing = float(np.mean([text == unsteered for text in said]))
        rows.append([f"{strength:g}", round(right(concepts, name) or 0, 3), round(nothing, 3)])
    columns = ["strength, in multiples of the largest value on a token", "right", "no name"]
    tables.append(Table(title=f"By steering, {len(concepts)} latents of `{steered.name}`", columns=columns, rows=rows))
    for table in tables:
        for row in [table["columns"], *table["rows"]]:
            print("  ".join(map(str, row)))
    record("naming", tables)


if __name__ == "__main__":
    main()
