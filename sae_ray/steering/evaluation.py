"""Evaluates answers: whether each is right, how similar it is to the concept, and the rates over all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, assert_never

import numpy as np
import pyarrow as pa

from sae_ray.concepts.naming import first_synonym, names, words_of
from sae_ray.steering.protocol import SCALES, Added, Kind, Question, Scales, Subjects
from sae_ray.text_table import table_lines

if TYPE_CHECKING:
    from jaxtyping import Float

CONCEPTS_SCHEMA = pa.schema(
    [
        ("latent", pa.int64()),
        ("label", pa.string()),
        ("purity", pa.float64()),
        ("n_firing", pa.int64()),
        ("frequency", pa.float64()),
        ("max_token", pa.float64()),
        ("is_concept", pa.bool_()),
        ("is_best", pa.bool_()),
        ("label_similarity", pa.float64()),
        ("other_similarity", pa.float64()),
    ]
)
ANSWERS_SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("latent", pa.int64()),
        ("concept", pa.string()),
        ("strength", pa.float64()),
        ("image_index", pa.int64()),
        ("prompt", pa.string()),
        ("unsteered", pa.string()),
        ("steered", pa.string()),
        ("right", pa.bool_()),
        ("unsteered_right", pa.bool_()),
        ("similarity", pa.float64()),
        ("unsteered_similarity", pa.float64()),
    ]
)


DESCRIPTIONS: dict[Kind, str] = {
    "unsteered": "images, no edit: names the class",
    "reconstruction": "images, SAE without edits: names the class",
    "white": "white image, all concept latents: names the concept",
    "impure": "white image, impure latents: names their commonest class",
    "neuron": "white image, raw neurons: names their commonest class",
    "insertion": "images of other classes, best latents: names the concept",
    "suppression": "images of the class, best latent ablated: loses the name",
    "diffmean_white": "white image, DiffMean added: names the concept",
    "diffmean_insertion": "images of other classes, DiffMean added: names the concept",
    "diffmean_suppression": "images of the class, DiffMean subtracted: loses the name",
    "profile_white": "white image, profile added: names the concept",
    "profile_insertion": "images of other classes, profile added: names the concept",
    "profile_suppression": "images of the class, profile subtracted: loses the name",
}
BOUNDS = {"label_similarity": "upper bound: the label itself", "other_similarity": "lower bound: other labels"}


class Yardstick(NamedTuple):
    """What answers are compared with."""

    prompt: str
    """The study's prompt, which asks for the class."""
    class_name: Mapping[str, str]
    """Class -> its readable name. Classes without a name are not asked about."""
    targets: Mapping[tuple[str, int | str | None], Float[np.ndarray, " d"]]
    """Unit vectors: the mean embedding of the top images of `("latent", number)` and `("neuron", number)`. For
    `("class", label)` it is that of the class's best latent."""
    embeddings: Mapping[str, Float[np.ndarray, " d"]]
    """Text -> unit vector, for all texts that `texts` returns."""


def texts(answers: Sequence[str], class_name: Mapping[str, str]) -> list[str]:
    """The texts to embed: the first word of each answer, and the names of classes."""
    return sorted({*map(_first_word, answers), *map(first_synonym, class_name.values())} - {""})


def best_scales(
    added: Sequence[Added], asked: Sequence[Question], answers: Sequence[str], class_name: Mapping[str, str]
) -> dict[Added, Scales]:
    """The scales with the highest rates on training images; of equal ones the smallest.

    Args:
        added: what the scales are of.
        asked: its `calibration_questions`.
    """
    hits: dict[tuple, list[bool]] = defaultdict(list)
    for question, answer in zip(asked, answers, strict=True):
        right = _is_right(question, question.prompt, answer, answer, class_name)
        hits[*question[:3], abs(question.strength)].append(bool(right))

    def best(one: Added, place: Literal["insertion", "suppression"]) -> float:
        return max(SCALES, key=lambda scale: (np.mean(hits[one.kind(place), *one[1:], scale] or [False]), -scale))

    return {one: Scales(best(one, "insertion"), best(one, "suppression")) for one in added}


def answer_table(asked: Sequence[Question], answers: Sequence[str], yardstick: Yardstick) -> pa.Table:
    """One row per question, with the answer (`steered`), the answer without the edit (`unsteered`), and for both:

    - `right`: whether the answer is the intended one. To the study's prompt it should name the concept, or not name it
      under suppression. To another prompt it should be the same as without the edit. Null if there is no class to name.
    - `similarity`: cosine of the answer's first word and the mean embedding of the top images of the edited latent or
      neuron (for DiffMean, of the class's best latent). Null for other prompts and without an edit.
    """
    plain = {
        (question.image_index, question.prompt): answer
        for question, answer in zip(asked, answers, strict=True)
        if question.kind == "unsteered"
    }
    rows = []
    for question, steered in zip(asked, answers, strict=True):
        unsteered = plain[question.image_index, question.prompt]
        row = [*question, unsteered, steered]
        for answer in (steered, unsteered):
            row.append(_is_right(question, yardstick.prompt, answer, unsteered, yardstick.class_name))
        for answer in (steered, unsteered):
            row.append(_similarity(question, answer, yardstick))
        rows.append(row)
    return _table(rows, ANSWERS_SCHEMA)


def concept_table(subjects: Subjects, yardstick: Yardstick) -> pa.Table:
    """One row per steered latent, in the order of their numbers.

    `label_similarity` is the similarity of the class's name and the mean embedding of the latent's top images: an upper
    bound for answers. `other_similarity` is the mean over the names of the other concepts' classes: what shuffled names
    would get.
    """
    concepts = set(subjects.concepts) | set(subjects.best)
    labels = sorted({one.label for one in concepts if one.label is not None and one.label in yardstick.class_name})
    names_ld = {label: yardstick.embeddings[first_synonym(yardstick.class_name[label])] for label in labels}
    rows = []
    for one in sorted({*concepts, *subjects.impure}, key=lambda one: one.latent):
        target = yardstick.targets["latent", one.latent]
        likeness = {label: float(vector @ target) for label, vector in names_ld.items()}
        others = [value for label, value in likeness.items() if label != one.label]
        bounds = (likeness.get(one.label or ""), np.mean(others) if one.label in likeness and others else None)
        rows.append([*one, one in concepts, one in subjects.best, *bounds])
    return _table(rows, CONCEPTS_SCHEMA)


def rates(answers: pa.Table, concepts: pa.Table, prompt: str) -> dict[str, Any]:
    """The figures of an evaluation as plain values; None if there is nothing to count.

    - `kinds`: per kind of edit, for the study's prompt: how many questions were `asked` about a class, how many answers
      are `right`, the `rate`, and mean similarities. Suppression counts only images whose class is named without it.
    - `unchanged`: per kind of edit, for other prompts: how many answers are the same as without the edit.
    - `bounds`: mean `label_similarity` and `other_similarity` of the concepts.
    """
    kinds: dict[str, list[dict]] = defaultdict(list)
    unchanged: dict[str, list[dict]] = defaultdict(list)
    for row in answers.to_pylist():
        if row["prompt"] != prompt:
            unchanged[row["kind"]].append(row)
        elif not (row["kind"].endswith("suppression") and row["unsteered_right"]):
            kinds[row["kind"]].append(row)
    unchanged.pop("unsteered", None)
    bounds = concepts.filter(concepts["is_concept"]).to_pylist()
    columns = ("unsteered_right", "similarity", "unsteered_similarity")
    return {
        "kinds": {
            kind: _counted(rows) | {name.replace("right", "rate"): _mean(rows, name) for name in columns}
            for kind, rows in kinds.items()
        },
        "unchanged": {kind: _counted(rows) for kind, rows in unchanged.items()},
        "bounds": {name: _mean(bounds, name) for name in ("label_similarity", "other_similarity")},
    }


def rate_lines(found: Mapping[str, Any]) -> list[str]:
    """The rates as an aligned table."""
    table = [["", "right", "", "unsteered", "other prompts", "similarity", "unsteered"]]
    for kind, one in found["kinds"].items():
        unchanged = found["unchanged"].get(kind, {"rate": None})
        shares = [_percent(one["rate"]), f"{one['right']:,} of {one['asked']:,}", _percent(one["unsteered_rate"])]
        likeness = [_decimal(one[name]) for name in ("similarity", "unsteered_similarity")]
        table.append([DESCRIPTIONS[kind], *shares, _percent(unchanged["rate"]), *likeness])
    for name, meaning in BOUNDS.items():
        table.append([meaning, "", "", "", "", _decimal(found["bounds"][name]), ""])
    return table_lines(table, "<>>>>>>")


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{rate:.1%}"


def _decimal(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _table(rows: Sequence[Sequence[Any]], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(schema.names, row, strict=True)) for row in rows], schema=schema)


def _counted(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    asked = [row["right"] for row in rows if row["right"] is not None]
    return {"answers": len(rows), "asked": len(asked), "right": sum(asked), "rate": _mean(rows, "right")}


def _mean(rows: Sequence[Mapping[str, Any]], column: str) -> float | None:
    values = [row[column] for row in rows if row[column] is not None]
    return float(np.mean(values)) if values else None


def _is_right(
    question: Question, prompt: str, answer: str, unsteered: str, class_name: Mapping[str, str]
) -> bool | None:
    if question.prompt != prompt:
        return words_of(answer) == words_of(unsteered)
    if question.concept is None or question.concept not in class_name:
        return None
    return names(answer, class_name[question.concept]) != question.kind.endswith("suppression")


def _similarity(question: Question, answer: str, yardstick: Yardstick) -> float | None:
    target = yardstick.targets.get(_target(question))
    word = _first_word(answer)
    if question.prompt != yardstick.prompt or target is None or not word:
        return None
    return float(yardstick.embeddings[word] @ target)


def _target(question: Question) -> tuple[str, int | str | None]:
    match question.kind:
        case "unsteered" | "reconstruction":
            return "none", None
        case "white" | "insertion" | "suppression" | "impure":
            return "latent", question.latent
        case "profile_white" | "profile_insertion" | "profile_suppression":
            return "latent", question.latent
        case "neuron":
            return "neuron", question.latent
        case "diffmean_white" | "diffmean_insertion" | "diffmean_suppression":
            return "class", question.concept
        case _:
            assert_never(question.kind)


def _first_word(answer: str) -> str:
    return " ".join(words_of(answer)[:1])
