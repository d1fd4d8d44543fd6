"""What is known of the SAEs that steer: their features, scores, top images and names, read from a study's files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_ray.concepts.labelling import Concept, image_classes, label_concepts, mean_embeddings
from sae_ray.concepts.naming import class_names
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.text import TextEncoder, load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.images import decode_image
from sae_ray.steering import load_max_token
from sae_ray.steering.llava import describe_llava
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.study.plan import ImagePlan, StudyPlan, TrainPlan

from .config import open_study

if TYPE_CHECKING:
    from jaxtyping import Float

Sort = Literal["similarity", "ms", "frequency", "max_token", "index"]
THUMBNAIL = 224
"""Longest side in pixels of the top images that are shown."""
LIKEST = 50
"""Features that a text search takes for what they show, beside those whose name holds the text."""


class Summary(NamedTuple):
    """One feature."""

    concept: Concept
    name: str | None
    ms: float | None
    n_images: int
    similarity: float | None


class Top(NamedTuple):
    """One of a feature's top images."""

    rank: int
    image_id: str
    label: str | None
    activation: float


@dataclass(frozen=True, eq=False)
class SaeEntry:
    """One SAE. Its tables are those of the scoring passes over the study's pictures and held-out images."""

    name: str
    folder: Folder
    train: TrainPlan
    concepts: dict[int, Concept]
    """Of every feature that ever fired."""
    class_name: dict[str, str]
    ms: Float[np.ndarray, " d_sae"]
    top_images: pa.Table
    histogram: pa.Table
    pictures: ImagePlan
    similar_to: MeanEmbeddings | None
    """None where the study has no model of texts and images, or has not embedded its pictures."""

    @property
    def n_features(self) -> int:
        return self.train.d_sae

    def summary(self, index: int, similarity: float | None = None) -> Summary:
        """Raises KeyError for a feature that never fired."""
        concept = self.concepts[index]
        ms = float(self.ms[index])
        name = None if concept.label is None else self.class_name.get(concept.label, concept.label)
        return Summary(concept, name, None if np.isnan(ms) else ms, self._n_top(index), similarity)

    def search(self, text: str | None, sort: Sort | None) -> list[Summary]:
        """Features in order: all that fired, or those that a text describes.

        Raises UsageError when it is to sort by the similarity to no text.
        """
        if not text:
            found = [self.summary(index) for index in self.concepts]
        else:
            similarity = self.similar_to.similarities(text) if self.similar_to else {}
            likest = sorted(similarity, key=lambda index: -similarity[index])[:LIKEST]
            named = [index for index in self.concepts if text.lower() in (self.summary(index).name or "").lower()]
            found = [self.summary(index, similarity.get(index)) for index in dict.fromkeys([*likest, *named])]
        by = sort or ("similarity" if text and self.similar_to else "ms")
        if by == "similarity" and not (text and self.similar_to):
            raise UsageError("sort is similarity, which needs a search text and a study with a model of texts")
        return sorted(found, key=lambda one: _order(one, by))

    def top(self, index: int) -> list[Top]:
        rows = self._top(index)
        manifest = self.pictures.manifest
        found = []
        for row in rows.to_pylist():
            image_id, label = (manifest[name][row["image_index"]].as_py() for name in ("image_id", "label_name"))
            found.append(Top(row["rank"], image_id, label, row["activation"]))
        return found

    def bins(self, index: int) -> list[dict]:
        """The histogram, as rows of low, high and n_images."""
        return self.histogram.filter(pc.field("neuron") == index).select(["low", "high", "n_images"]).to_pylist()

    def picture(self, index: int, rank: int) -> bytes | None:
        """A top image as a small PNG; None when there is none of that rank."""
        ids = {top.rank: top.image_id for top in self.top(index)} if index in self.concepts else {}
        return _thumbnail(self.pictures.folder, ids[rank]) if rank in ids else None

    @cached_property
    def _starts(self) -> np.ndarray:
        """Where the top images of every feature begin."""
        return np.searchsorted(self.top_images["neuron"].to_numpy(), np.arange(self.n_features + 1))

    def _n_top(self, index: int) -> int:
        return int(self._starts[index + 1] - self._starts[index])

    def _top(self, index: int) -> pa.Table:
        return self.top_images.slice(self._starts[index], self._n_top(index))


class MeanEmbeddings:
    """The mean embedding of every feature's top images, to hold texts against."""

    def __init__(self, top_images: pa.Table, store: ActivationStore, indices: list[int], encoder: TextEncoder):
        self._indices = indices
        self._means = mean_embeddings(top_images, store, indices)
        self._encoder = encoder

    def similarities(self, text: str) -> dict[int, float]:
        """Cosine per feature; those without top images are left out."""
        cosines = self._means @ self._encoder.embed_texts([text])[0].numpy().astype(np.float64)
        pairs = zip(self._indices, cosines.tolist(), strict=True)
        return {index: cosine for index, cosine in pairs if not np.isnan(cosine)}


def read_catalogue(root: str, llava: str, revision: str | None, names: Sequence[str] | None) -> dict[str, SaeEntry]:
    """The finished SAEs of a study that were trained where the LLaVA reads its vision tower, by name.

    Raises:
        UsageError: a name is none of these, or there are none.
        SaeRayError: their files are damaged.
    """
    plan = StudyPlan(open_study(root), Folder(root))
    info = describe_llava(llava, revision)
    layer = info.layer
    fitting = [train for train in plan.trains if _fits(train, info.tower, layer)]
    there = {train.grid_cell.name: train for train in fitting if _done(plan, train)}
    for name in names or ():
        if name not in there:
            raise UsageError(f"saes has {name!r}; finished and made for this LLaVA are {', '.join(there) or 'none'}")
    if not there:
        raise UsageError(
            f"{root} has no finished and scored SAE of layer {layer}, which {llava} reads; "
            f'train one at a site such as "layer{layer}:random:2"'
        )
    space = plan.text_space if plan.study.steering is not None else None
    embedded = space is not None and space.step.finished
    encoder = load_text_encoder(space.encoder.model, space.encoder.revision) if space and embedded else None
    store = ActivationStore(space.step.folder) if space and embedded else None
    return {name: _entry(plan, there[name], store, encoder) for name in names or there}


def _fits(train: TrainPlan, info: EncoderInfo, layer: int) -> bool:
    site = train.grid_cell.site
    per_token = site.point == "residual" and site.tokens not in ("cls", "mean")
    return per_token and site.layer == layer and train.activations.width == info.residual_width


def _done(plan: StudyPlan, train: TrainPlan) -> bool:
    steps = [train.step, *(score.step for score in plan.passes(train.grid_cell.name))]
    return all(step.finished and step.failure is None for step in steps)


def _entry(plan: StudyPlan, train: TrainPlan, store: ActivationStore | None, encoder: TextEncoder | None) -> SaeEntry:
    heldout, pictures = plan.passes(train.grid_cell.name)
    scores, top_images = (pictures.step.folder.read_parquet(f"{name}.parquet") for name in ("scores", "top_images"))
    top_images = top_images.sort_by([("neuron", "ascending"), ("rank", "ascending")])
    images = pictures.activations.images
    steering = plan.study.steering
    classes = image_classes(images.manifest, steering.ignore_labels if steering else ())
    max_token = load_max_token(train.step.folder).numpy()
    concepts = {one.latent: one for one in label_concepts(scores, top_images, classes, max_token)}
    labels = [name for name in images.manifest["label_name"].to_pylist() if name is not None]
    similar = MeanEmbeddings(top_images, store, list(concepts), encoder) if store and encoder else None
    return SaeEntry(
        train.grid_cell.name,
        train.step.folder,
        train,
        concepts,
        class_names(labels),
        heldout.step.folder.read_parquet("scores.parquet")["ms"].to_numpy(),
        top_images,
        heldout.step.folder.read_parquet("histogram.parquet"),
        images,
        similar,
    )


def _order(one: Summary, by: Sort) -> tuple[float, int]:
    """The largest first, what has none last; by index the smallest first."""
    value = {
        "similarity": one.similarity,
        "ms": one.ms,
        "frequency": one.concept.frequency,
        "max_token": one.concept.max_token,
        "index": -one.concept.latent,
    }[by]
    return (float("inf") if value is None else -value, one.concept.latent)


@lru_cache(maxsize=2048)
def _thumbnail(folder: Folder, image_id: str) -> bytes:
    image = decode_image(folder.read_bytes(image_id))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
