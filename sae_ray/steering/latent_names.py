"""Names that a LLaVA gives to the latents of an SAE, tried on held-out images.

| method | name | control |
|---|---|---|
| `vlm` | the commonest answer about the latent's top training images | that about as many random ones |
| `steering` | the answer about a white image, with the latent set to a strength | the name of another latent |

Every question is the same, and one about an image serves all latents; a model that reads grids may be asked about the
16 top images at once instead. Names are tried by the answers about held-out
images: does the model name images on which the latent fires so, and no others (`name_scores`)?
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, assert_never

import numpy as np
import pyarrow as pa

from sae_ray.concepts.labelling import Concept
from sae_ray.concepts.naming import names
from sae_ray.concepts.naming_by_answers import (
    MIN_TRIED,
    N_IMAGES,
    VERIFIED,
    AnsweredNames,
    Trials,
    answered_names,
    name_scores,
    plain,
)
from sae_ray.steering.config import NamingMethod
from sae_ray.steering.protocol import Question
from sae_ray.text_table import table_lines

if TYPE_CHECKING:
    from jaxtyping import Float, Int

NAMES = "names.parquet"
LATENT_NAMES_SCHEMA = pa.schema(
    [
        ("neuron", pa.int64()),
        ("method", pa.string()),
        ("name", pa.string()),
        ("score", pa.float64()),
        ("agreement", pa.float64()),
        ("n_images", pa.int64()),
        ("control", pa.string()),
        ("control_score", pa.float64()),
    ]
)
NAMING_ANSWERS_SCHEMA = pa.schema(
    [("about", pa.string()), ("image_index", pa.int64()), ("latent", pa.int64()), ("answer", pa.string())]
)


class Shown(NamedTuple):
    """The images that names rest on, by `image_index`; -1 in unused places. One row per latent."""

    top: Int[np.ndarray, "latents n"]
    """Top training images."""
    random: Int[np.ndarray, "latents n"]
    """Training images of the control."""
    tried: Trials
    """Held-out images."""

    @property
    def training(self) -> list[int]:
        """All training images."""
        return _listed(self.top[:, :N_IMAGES], self.random)

    @property
    def heldout(self) -> list[int]:
        """All held-out images."""
        return _listed(*self.tried)


class Answers(NamedTuple):
    """What the model said."""

    training: Mapping[int, str]
    """About training images, by `image_index`; empty if they are shown in grids."""
    heldout: Mapping[int, str]
    white: Sequence[str]
    """About the white image with each latent set; empty where the method is not wanted."""
    unsteered: str
    """About the white image itself."""
    grids: Sequence[str] = ()
    """About the grid of each latent's top images, then about that of its random ones; empty without grids."""

    def table(self, latents: Sequence[int]) -> pa.Table:
        """Every answer, in `NAMING_ANSWERS_SCHEMA`. `about` is `train`, `grid`, `random grid`, `heldout` or `white`.

        The first answer about the white image is the one without an edit, and has no latent.

        Args:
            latents: those that were asked about.
        """
        rows: list[tuple] = [("train", image, None, answer) for image, answer in self.training.items()]
        grids = zip(product(("grid", "random grid"), latents), self.grids, strict=True) if self.grids else ()
        rows += [(about, None, latent, answer) for (about, latent), answer in grids]
        rows += [("heldout", image, None, answer) for image, answer in self.heldout.items()]
        if self.white:
            rows += [("white", None, None, self.unsteered)]
            rows += [("white", None, *one) for one in zip(latents, self.white, strict=True)]
        columns = list(zip(*rows, strict=True)) or [()] * len(NAMING_ANSWERS_SCHEMA)
        return pa.table(columns, schema=NAMING_ANSWERS_SCHEMA)


def nameable(concepts: Iterable[Concept], n_latents: int) -> list[Concept]:
    """At most as many latents, those that fire on most images first; ones that hardly fire are not worth a name."""
    return sorted((one for one in concepts if one.n_firing >= MIN_TRIED), key=lambda one: one.support)[:n_latents]


def image_questions(images: Iterable[int], prompt: str) -> list[Question]:
    """The question about each image, without an edit."""
    return [Question("unsteered", -1, None, 0.0, image, prompt) for image in images]


def name_table(
    subjects: Sequence[Concept], shown: Shown, answers: Answers, methods: Sequence[NamingMethod]
) -> pa.Table:
    """The names of some latents, in `LATENT_NAMES_SCHEMA`: one row per latent and method, the methods in order.

    `name` is null where nothing was said, or where setting the latent changed nothing. `score` is null as `name_scores`
    has it; `agreement` (share of the top images that were called so; null for a grid) and `n_images` belong to `vlm`.
    """
    tables = []
    for method in methods:
        found, control = _named(method, shown, answers)
        columns = {
            "neuron": [one.latent for one in subjects],
            "method": [method] * len(subjects),
            "name": found.name,
            "score": _tried(found.name, shown, answers),
            "agreement": found.agreement,
            "n_images": found.n_images,
            "control": control,
            "control_score": _tried(control, shown, answers),
        }
        arrays = [pa.array(columns[field.name], field.type, from_pandas=True) for field in LATENT_NAMES_SCHEMA]
        tables.append(pa.table(arrays, schema=LATENT_NAMES_SCHEMA))
    return pa.concat_tables(tables) if tables else LATENT_NAMES_SCHEMA.empty_table()


def _named(method: NamingMethod, shown: Shown, answers: Answers) -> tuple[AnsweredNames, list[str | None]]:
    """The names of a method, and those of its control."""
    match method:
        case "vlm":
            if answers.grids:
                said = [plain(answer) or None for answer in answers.grids]
                n_images = (shown.top[:, :N_IMAGES] >= 0).sum(axis=1)
                name, control = said[: len(n_images)], said[len(n_images) :]
                return AnsweredNames(name, np.full(len(name), np.nan), n_images), control
            found = answered_names(shown.top[:, :N_IMAGES], answers.training)
            return found, answered_names(shown.random, answers.training).name
        case "steering":
            said = [plain(answer) for answer in answers.white]
            name = [one if one and one != plain(answers.unsteered) else None for one in said]
            return AnsweredNames(name, np.full(len(name), np.nan), np.zeros(len(name), np.int64)), name[1:] + name[:1]
        case _:
            assert_never(method)


def _tried(named: Sequence[str | None], shown: Shown, answers: Answers) -> Float[np.ndarray, " latents"]:
    return name_scores(named, shown.tried, lambda name, image: names(answers.heldout[image], name))


def name_rates(
    table: pa.Table, subjects: Sequence[Concept], class_name: Mapping[str, str], min_images: int, min_purity: float
) -> dict[str, dict[str, Any]]:
    """The figures of each method, as plain values; None if there is nothing to count.

    `latents` asked about, `named` ones, `distinct` names; of the names that could be tried (`tried`) the mean `score`
    and the share that holds (`verified`), and both for the control. Of latents that represent a class (`pure`) the
    share whose name is the class (`right`), and whose control's name is (`control_right`).
    """
    found = {}
    concepts = {one.latent: one for one in subjects}
    for method in dict.fromkeys(table["method"].to_pylist()):
        rows = [row for row in table.to_pylist() if row["method"] == method]
        scores, held = ([row[key] for row in rows if row[key] is not None] for key in ("score", "control_score"))
        pure = []
        for row in rows:
            one = concepts[row["neuron"]]
            name = class_name.get(one.label or "")
            if name is not None and one.stands_for_its_class(min_images, min_purity):
                pure.append((row, name))
        found[method] = {
            "latents": len(rows),
            "named": sum(row["name"] is not None for row in rows),
            "distinct": len({row["name"] for row in rows} - {None}),
            "tried": len(scores),
            "score": _mean(scores),
            "verified": _mean([score >= VERIFIED for score in scores]),
            "control_score": _mean(held),
            "control_verified": _mean([score >= VERIFIED for score in held]),
            "pure": len(pure),
            "right": _mean([names(row["name"] or "", name) for row, name in pure]),
            "control_right": _mean([names(row["control"] or "", name) for row, name in pure]),
        }
    return found


def name_lines(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The figures of all SAEs as an aligned table; in brackets those of controls.

    Args:
        found: SAE -> `name_rates`.
    """
    table = [["", "names by", "latents", "named", "distinct", "is the class", "", "score", "", "holds", ""]]
    for name, methods in found.items():
        for method, one in methods.items():
            cells = [name, method, *(f"{one[key]:,}" for key in ("latents", "named", "distinct"))]
            for key, control, digits in (
                ("right", "control_right", ".0%"),
                ("score", "control_score", ".3f"),
                ("verified", "control_verified", ".0%"),
            ):
                cells += [_text(one[key], digits), f"({_text(one[control], digits)})"]
            table.append(cells)
    return table_lines(table, "<<>>>>>>>>>")


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else f"{value:{form}}"


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _listed(*images: Int[np.ndarray, "latents n"]) -> list[int]:
    """Each once, ascending."""
    return sorted({image for array in images for image in array.ravel().tolist()} - {-1})
