"""A neuron as a notebook shows it: its scores, and its top images with where it fires on them."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.report.album import SIDE, thumbnail_size
from sae_ray.report.neurons import Neurons
from sae_ray.report.pictures import HEAT, Shown
from sae_ray.study.names import Name
from sae_ray.study.plan import StudyPlan
from sae_ray.study.step_plans import PicturesPlan
from sae_ray.text_table import number

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

HOT = (255, 64, 0)
"""The colour of where a latent fires."""
SPRITES_KEPT = 32


class TopImage(NamedTuple):
    """An image that a neuron fires on."""

    image_id: str
    label: str | None
    activation: float
    thumbnail: UInt8[np.ndarray, "h w 3"] | None
    """As the encoder sees it, small; None where the report has none."""
    heat: Float[np.ndarray, "rows columns"] | None
    """The latent's value on each patch; None where the report has none."""


@dataclass(frozen=True, eq=False, repr=False)
class NeuronCard:
    """One neuron of a cell."""

    cell: str
    neuron: int
    name: Name | None
    """How it is named, by a LLaVA, from a vocabulary or by labels."""
    scores: Mapping[str, float]
    """The columns of `SCORES_SCHEMA`."""
    images: Sequence[TopImage]
    """Strongest first."""

    def __repr__(self) -> str:
        named = f" {self.name.name!r}," if self.name else ""
        return f"NeuronCard({self.cell}, neuron {self.neuron},{named} {len(self.images)} images)"

    def _repr_html_(self) -> str:
        """What a notebook shows. It needs no other file."""
        named = f" · {escape(self.name.name)} ({escape(self.name.method)})" if self.name else ""
        told = (("MS", "ms", 3), ("frequency", "frequency", 4), ("largest", "max_image", 3))
        facts = " · ".join(f"{title} {number(self.scores[key], digits)}" for title, key, digits in told)
        figures = "".join(_figure(one, self._hottest) for one in self.images)
        return (
            f'<div><b>{escape(self.cell)}, neuron {self.neuron}{named}</b><div style="opacity:.75">{facts}</div>'
            f'<div style="display:flex;flex-wrap:wrap;gap:6px">{figures}</div></div>'
        )

    @property
    def _hottest(self) -> float:
        """What is coloured fully: the largest value on any patch."""
        return max((float(one.heat.max()) for one in self.images if one.heat is not None), default=0.0)


def _figure(image: TopImage, hottest: float) -> str:
    caption = f"{number(image.activation, 2)} {escape(image.label or '')}"
    pictures = ""
    if image.thumbnail is not None:
        pictures = _img(image.thumbnail, image.image_id)
        if image.heat is not None and hottest > 0:
            pictures += _img(heated(image.thumbnail, image.heat / hottest), f"where it fires on {image.image_id}")
    else:
        caption = f"{escape(image.image_id)} {caption}"
    style = "margin:0;display:flex;flex-direction:column;gap:2px"
    return f'<figure style="{style}">{pictures}<figcaption style="font-size:11px">{caption}</figcaption></figure>'


def heated(
    thumbnail: UInt8[np.ndarray, "h w 3"], heat: Float[np.ndarray, "rows columns"]
) -> UInt8[np.ndarray, "h w 3"]:
    """The thumbnail, coloured where the map is above 0: at 1 the colour covers three quarters of it."""
    height, width, _ = thumbnail.shape
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    share = 0.75 * np.clip(heat, 0, 1)[rows][:, columns, None]
    return np.rint(thumbnail * (1 - share) + np.array(HOT) * share).astype(np.uint8)


def _img(pixels: UInt8[np.ndarray, "h w 3"], alt: str) -> str:
    from PIL import Image

    out = BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    data = base64.b64encode(out.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt)}" title="{escape(alt)}">'


class Pictures:
    """Thumbnails and heat maps of a report, from its finished step."""

    def __init__(self, plan: StudyPlan, pictures: PicturesPlan):
        self.folder = pictures.step.folder
        self.size = thumbnail_size(plan.encoder.image_size)
        self.grid = plan.encoder.patch_grid if plan.encoder.n_tokens > 1 else None
        self.album = Shown(plan, pictures).album
        self._sprite = lru_cache(SPRITES_KEPT)(self._opened)

    def thumbnails(self, neurons: Neurons, number: int) -> list[UInt8[np.ndarray, "h w 3"] | None]:
        """Of the top images of a neuron; None for those that the report shows by name only."""
        index = neurons.top_image[number]
        numbers = self.album.numbers(neurons.pictures.name, index[index >= 0].astype(np.int64))
        return [self._thumbnail(int(one)) if 0 <= one < self.album.n_pictured else None for one in numbers]

    def maps(self, cell: str, latent: int) -> dict[int, Float[np.ndarray, "rows columns"]]:
        """Rank -> heat map, of a latent that has some."""
        if self.grid is None:
            return {}
        rows = self._heat.filter((self._heat_of["cell"] == cell) & (self._heat_of["latent"] == latent)).to_pylist()
        return {row["rank"]: np.array(row["map"], np.float32).reshape(self.grid) for row in rows}

    @cached_property
    def _heat(self):
        return self.folder.read_parquet(HEAT)

    @cached_property
    def _heat_of(self) -> dict[str, np.ndarray]:
        return {name: self._heat[name].to_numpy() for name in ("cell", "latent")}

    def _thumbnail(self, number: int) -> UInt8[np.ndarray, "h w 3"]:
        sprite, place = divmod(number, SIDE**2)
        height, width = self.size
        top, left = place // SIDE * height, place % SIDE * width
        return self._sprite(sprite)[top : top + height, left : left + width]

    def _opened(self, sprite: int) -> UInt8[np.ndarray, "h w 3"]:
        from PIL import Image

        return np.asarray(Image.open(BytesIO(self.folder.read_bytes(f"sprites/{sprite}.jpg"))).convert("RGB"))
