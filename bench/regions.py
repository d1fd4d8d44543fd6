"""Edits of a part of an image: python -m bench.regions ROOT

Of a finished study of the embedded world with `[steering]`: the best latent of a shape is set in a part of an image,
and the LLaVA is asked to describe it. How many descriptions name the new shape, how many still name the shape that is
there, and how many say the same of colour and background as without an edit? On held-out images, every other shape is
tried; on a white image, all shapes.

The emptiest part of an image is the one with the least colour, of its halves or of squares at its four corners: shapes
are coloured, backgrounds hardly.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from bench.record import Table, record
from sae_ray.concepts.naming import words_of
from sae_ray.encoders.resizing import WHOLE
from sae_ray.images import decode_image
from sae_ray.sae import SAE, load_sae
from sae_ray.steering import Box, Condition, Intervention, LatentEdit, Llava, Region, TowerEdit, load_llava
from sae_ray.steering.protocol import sample
from sae_ray.steering.regions import tokens_in
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import ImagePlan, SteeringPlan

if TYPE_CHECKING:
    from jaxtyping import Float
    from PIL import Image
    from torch import Tensor

PROMPT = "Describe the image."
N_IMAGES = 32
STRENGTHS = (1, 4, 16)
"""Multiples of the largest value on a token."""
BATCH = 256
HALVES = tuple(Box(*box) for box in ((0, 0, 1, 0.5), (0, 0.5, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)))
SIZES = ("all tokens", "9 of 16 patches", "the emptiest half", "the emptiest quarter", "the emptiest corner patch")
WRITING = {"drop": "the SAE's error dropped", "keep": "the SAE's error kept"}


class Shape(NamedTuple):
    """A class and its best latent."""

    name: str
    latent: int
    max_token: float


class Shown(NamedTuple):
    """A held-out image."""

    image: Image.Image
    shape: Shape
    colour: Float[np.ndarray, "height width"]
    """The strongest less the weakest of red, green and blue."""
    firing: float
    """The share of tokens on which its shape's latent fires."""
    unsteered: str


class Case(NamedTuple):
    """One description to ask for."""

    one: Shown
    new: Shape
    other: Shape
    """A third shape, that is neither shown nor set."""


Where = Callable[[Case], dict[str, Any]]
"""Where the latent is set: arguments of an `Intervention`."""
ABLATED = ", its own shape's latent ablated everywhere"


def corners(side: float) -> tuple[Box, ...]:
    ends = ((0.0, side), (1 - side, 1.0))
    return tuple(Box(left, top, right, bottom) for top, bottom in ends for left, right in ends)


def emptiest(boxes: Sequence[Box]) -> Where:
    def colour(one: Shown, box: Box) -> float:
        height, width = one.colour.shape
        part = one.colour[round(box.top * height) : round(box.bottom * height)]
        return float(part[:, round(box.left * width) : round(box.right * width)].mean())

    return lambda case: {"region": Region((min(boxes, key=lambda box: colour(case.one, box)),))}


def places(llava: Llava) -> dict[str, Where]:
    patch = 1 / llava.info.patch_grid[0]
    return {
        "all tokens": lambda case: {},
        "9 of 16 patches": emptiest(corners(3 * patch)),
        "the emptiest half": emptiest(HALVES),
        "the emptiest quarter": emptiest(corners(0.5)),
        "the emptiest corner patch": emptiest(corners(patch)),
        f"the emptiest half{ABLATED}": emptiest(HALVES),
        f"the emptiest quarter{ABLATED}": emptiest(corners(0.5)),
        "where its own shape's latent fires": lambda case: {"when": Condition(case.one.shape.latent)},
        "where the latent of a third shape fires": lambda case: {"when": Condition(case.other.latent)},
    }


def shapes_of(plan: SteeringPlan) -> list[Shape]:
    rows = plan.step.folder.read_parquet("concepts.parquet").to_pylist()
    return [Shape(row["label"], row["latent"], row["max_token"]) for row in rows if row["is_best"]]


def shown(plan: ImagePlan, shapes: Sequence[Shape], llava: Llava, sae: SAE, seed: int) -> list[Shown]:
    """Some held-out images that show one of the shapes."""
    shape_of = {one.name: one for one in shapes}
    ids, labels = plan.manifest["image_id"].to_pylist(), plan.labels["label_name"].to_pylist()
    usable = [place for place, label in enumerate(labels) if label in shape_of]
    found = []
    for place in sample(usable, N_IMAGES, seed):
        image, shape = decode_image(plan.folder.read_bytes(ids[place])), shape_of[labels[place]]
        answer, tokens = seen(image, llava)
        firing = (sae.encode(tokens)[:, shape.latent] > 0).double().mean().item()
        found.append(Shown(image, shape, np.ptp(np.asarray(image, np.float64), axis=2), firing, answer))
    return found


def donors(plan: ImagePlan, shapes: Sequence[Shape], llava: Llava) -> dict[str, Tensor]:
    """The tokens of the first held-out image of each shape."""
    ids, labels = plan.manifest["image_id"].to_pylist(), plan.labels["label_name"].to_pylist()
    firsts = {shape.name: ids[labels.index(shape.name)] for shape in shapes}
    return {name: seen(decode_image(plan.folder.read_bytes(first)), llava)[1] for name, first in firsts.items()}


def seen(image: Image.Image, llava: Llava) -> tuple[str, Tensor]:
    """Its description, and the tokens that the language model reads."""
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    return llava.answer(image, PROMPT, [keep]), kept[0]


def answers(llava: Llava, images: Sequence[Image.Image], chains: Sequence[Sequence[TowerEdit]]) -> list[str]:
    said: list[str] = []
    for start in range(0, len(images), BATCH):
        some = images[start : start + BATCH]
        said += llava.answers(some, [PROMPT] * len(some), chains[start : start + BATCH])
    return said


def shares(cases: Sequence[Case], said: Sequence[str], names: set[str]) -> list[float]:
    """Of descriptions that name the new shape, the one that is there, both, and that say the same of all else."""
    rows = []
    for case, answer in zip(cases, said, strict=True):
        words, before = words_of(answer), words_of(case.one.unsteered)
        mentions = [case.new.name in words, case.one.shape.name in words]
        rest, rest_before = ([word for word in some if word not in names | {"a", "an"}] for some in (words, before))
        rows.append([*mentions, all(mentions), rest == rest_before])
    return [round(float(share), 3) for share in np.mean(rows, axis=0)]


def of_images(cases: Sequence[Case], llava: Llava, sae: SAE, error: Any, names: set[str]) -> Table:
    images = [case.one.image for case in cases]
    rows: list[list[Any]] = [["nothing", "–", *shares(cases, [case.one.unsteered for case in cases], names)]]
    for name, where in places(llava).items():
        for strength in STRENGTHS:
            edits = [LatentEdit(case.new.latent, "set", strength * case.new.max_token) for case in cases]
            chains = [
                [Intervention(sae, (edit,), error, **where(case))] for edit, case in zip(edits, cases, strict=True)
            ]
            if name.endswith(ABLATED):
                own = [Intervention(sae, (LatentEdit(case.one.shape.latent, "ablate"),), error) for case in cases]
                chains = [[first, *chain] for first, chain in zip(own, chains, strict=True)]
            rows.append([name, f"{strength}", *shares(cases, answers(llava, images, chains), names)])
            print(error, *rows[-1], flush=True)
    columns = ["edited", "strength (× max)", "new shape", "own shape", "both", "all else as before"]
    return Table(title=f"{len(cases)} descriptions of held-out images, {WRITING[error]}", columns=columns, rows=rows)


def of_donors(cases: Sequence[Case], llava: Llava, plan: ImagePlan, shapes: Sequence[Shape], names: set[str]) -> Table:
    """What a perfect edit of the tokens could do: those of an image that does show the new shape, in their place."""
    tokens_of, rows = donors(plan, shapes, llava), []
    for name in SIZES:
        where = places(llava)[name]

        def put(case: Case, where: Where = where) -> TowerEdit:
            chosen = (
                list(tokens_in(where(case)["region"], WHOLE, llava.info))
                if where(case)
                else list(range(llava.n_tokens))
            )
            donor = tokens_of[case.new.name]
            return lambda x: x.index_copy(0, torch.tensor(chosen), donor[chosen])

        said = answers(llava, [case.one.image for case in cases], [[put(case)] for case in cases])
        rows.append([name, *shares(cases, said, names)])
        print("donors", *rows[-1], flush=True)
    columns = ["replaced", "new shape", "own shape", "both", "all else as before"]
    title = f"Control: {len(cases)} descriptions with the tokens of another image, which shows the new shape, put in"
    return Table(title=title, columns=columns, rows=rows)


def of_white(shapes: Sequence[Shape], llava: Llava, sae: SAE, error: Any) -> Table:
    patch = 1 / llava.info.patch_grid[0]
    parts = {"a half": HALVES, "a quarter at a corner": corners(0.5), "a patch at a corner": corners(patch)}
    rows: list[list[Any]] = []
    for name, boxes in {"all patches": (WHOLE,), **parts}.items():
        asked = [(shape, Region((box,))) for shape in shapes for box in boxes]
        row: list[Any] = [name, len(asked)]
        for strength in STRENGTHS:
            edits = [(LatentEdit(shape.latent, "set", strength * shape.max_token),) for shape, _ in asked]
            chains = [[Intervention(sae, edit, error, region=box)] for edit, (_, box) in zip(edits, asked, strict=True)]
            said = answers(llava, [llava.white()] * len(asked), chains)
            named = [shape.name in words_of(answer) for (shape, _), answer in zip(asked, said, strict=True)]
            row.append(round(float(np.mean(named)), 3))
        rows.append(row)
        print("white", error, *row, flush=True)
    columns = ["edited", "descriptions", *(f"at {strength} × max" for strength in STRENGTHS)]
    return Table(title=f"A white image: descriptions that name the shape, {WRITING[error]}", columns=columns, rows=rows)


def main() -> None:
    study = recalled_plan(sys.argv[1])
    [plan] = study.steerings
    llava, sae = load_llava(plan.steering.llava, plan.steering.revision), load_sae(plan.sae.step.folder)
    shapes = shapes_of(plan)
    images = shown(plan.heldout, shapes, llava, sae, study.study.seed)
    cases = []
    for one in images:
        others = [shape for shape in shapes if shape is not one.shape]
        cases += [Case(one, new, third) for new, third in zip(others, others[1:] + others[:1], strict=True)]
    names = {shape.name for shape in shapes}
    tables = [of_images(cases, llava, sae, error, names) for error in WRITING]
    tables.append(of_donors(cases, llava, plan.heldout, shapes, names))
    tables += [of_white(shapes, llava, sae, error) for error in WRITING]
    firing = round(float(np.mean([one.firing for one in images])), 3)
    record("regions", tables, {"sae": plan.name, "prompt": PROMPT, "tokens_on_which_the_own_latent_fires": firing})


if __name__ == "__main__":
    main()
