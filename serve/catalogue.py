"""The SAEs available for steering: their features, scores, top images and names, read from a study's files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from sae_ray.concepts.labelling import Concept, image_classes, label_concepts, mean_embeddings
from sae_ray.encoders.info import EncoderInfo
from sae_ray.encoders.text import TextEncoder, load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.images import decode_image
from sae_ray.images.rendering import Rendering
from sae_ray.scores.statistics import HISTOGRAM_EDGES
from sae_ray.scores.tables import ScoreTables, TopImages
from sae_ray.steering import load_max_token
from sae_ray.steering.llava import describe_llava
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.study.names import Name, NeuronNames
from sae_ray.study.plan import StudyPlan
from sae_ray.study.root import recalled_plan
from sae_ray.study.step_plans import ImagePlan, TrainPlan

if TYPE_CHECKING:
    from jaxtyping import Float, Int

Sort = Literal["similarity", "ms", "frequency", "max_token", "index"]
THUMBNAIL = 224
"""Longest side in pixels of the top images that are shown."""
MOST_SIMILAR = 50
"""How many features a text search returns for their similarity, besides those whose name contains the text."""


class Summary(NamedTuple):
    """One feature."""

    concept: Concept
    name: Name | None
    label: str | None
    """The most common class of its top images, readable."""
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
    """One SAE, with the tables of the scoring passes over the study's pictures and held-out images."""

    name: str
    folder: Folder
    train: TrainPlan
    concepts: dict[int, Concept]
    """Every feature that fired at least once."""
    names: NeuronNames
    ms: Float[np.ndarray, " d_sae"]
    top_images: TopImages
    histogram: Int[np.ndarray, "d_sae bins"]
    pictures: ImagePlan
    ignored: frozenset[int]
    """Features whose top images mostly are of classes that the study ignores."""
    similar_to: MeanEmbeddings | None
    """None if the study has no text-image model, or has not embedded its pictures with it."""

    @property
    def n_features(self) -> int:
        return self.train.d_sae

    def summary(self, index: int, similarity: float | None = None) -> Summary:
        """Raises KeyError if the feature never fired."""
        concept = self.concepts[index]
        ms = float(self.ms[index])
        name, label = self.names.of(concept), self.names.label_of(concept)
        return Summary(concept, name, label, None if np.isnan(ms) else ms, self._n_top(index), similarity)

    def search(self, text: str | None, sort: Sort | None) -> list[Summary]:
        """Sorted features: all that fired at least once, or those that match a text.

        By default the best come first, and after them the ignored ones; a text finds what is most similar to it.

        Raises UsageError when sorting by similarity without a text.
        """
        if not text:
            found = [self.summary(index) for index in self.concepts]
        else:
            similarity = self.similar_to.similarities(text) if self.similar_to else {}
            similar = sorted(similarity, key=lambda index: -similarity[index])[:MOST_SIMILAR]
            named = [index for index in self.concepts if self._mentions(index, text)]
            found = [self.summary(index, similarity.get(index)) for index in dict.fromkeys([*similar, *named])]
        by = sort or ("similarity" if text and self.similar_to else "ms")
        if by == "similarity" and not (text and self.similar_to):
            raise UsageError(
                "sort is 'similarity', which needs a search text and a study whose encoder embeds texts; "
                "add search=… or choose another order"
            )
        last = self.ignored if not text and sort is None else ()
        return sorted(found, key=lambda one: (one.concept.latent in last, *_order(one, by)))

    def top(self, index: int) -> list[Top]:
        columns = self.pictures.manifest["image_id"], self.pictures.labels["label_name"]
        images, activations = (values[index, : self._n_top(index)].tolist() for values in self.top_images)
        found = []
        for rank, (image, activation) in enumerate(zip(images, activations, strict=True)):
            image_id, label = (column[image].as_py() for column in columns)
            found.append(Top(rank, image_id, label, activation))
        return found

    def bins(self, index: int) -> list[dict]:
        """The filled bins of the histogram, as rows of low, high and n_images."""
        edges, counts = HISTOGRAM_EDGES.tolist(), self.histogram[index].tolist()
        bins = zip(edges[:-1], edges[1:], counts, strict=True)
        return [{"low": low, "high": high, "n_images": count} for low, high, count in bins if count]

    def picture(self, index: int, rank: int) -> bytes | None:
        """A thumbnail of a top image as PNG; None if there is no image of that rank."""
        ids = {top.rank: top.image_id for top in self.top(index)} if index in self.concepts else {}
        return _thumbnail(self.pictures.folder, ids[rank], self.pictures.rendering) if rank in ids else None

    def _mentions(self, index: int, text: str) -> bool:
        one = self.summary(index)
        return any(text.lower() in words.lower() for words in (one.name and one.name.name, one.label) if words)

    def _n_top(self, index: int) -> int:
        return int((self.top_images.image[index] >= 0).sum())


class MeanEmbeddings:
    """The mean embedding of each feature's top images, to compare texts with."""

    def __init__(self, top_images: TopImages, store: ActivationStore, indices: list[int], encoder: TextEncoder):
        self._indices = indices
        self._means = mean_embeddings(top_images.image, store, indices)
        self._encoder = encoder

    def similarities(self, text: str) -> dict[int, float]:
        """Cosine similarity per feature; features without top images are left out."""
        cosines = self._means @ self._encoder.embed_texts([text])[0].numpy().astype(np.float64)
        pairs = zip(self._indices, cosines.tolist(), strict=True)
        return {index: cosine for index, cosine in pairs if not np.isnan(cosine)}


def read_catalogue(root: str, llava: str, revision: str | None, names: Sequence[str] | None) -> dict[str, SaeEntry]:
    """The finished SAEs of a study that were trained on the layer that the LLaVA reads, by name.

    Raises:
        UsageError: a name is not among them, or there are none.
        SaeRayError: their files are damaged.
    """
    plan = recalled_plan(root)
    info = describe_llava(llava, revision)
    layer = info.layer
    fitting = [train for train in plan.trains if _fits(train, info.tower, layer)]
    there = {train.grid_cell.name: train for train in fitting if _done(plan, train)}
    for name in names or ():
        if name not in there:
            raise UsageError(
                f"saes contains {name!r}, which is not a finished SAE for this LLaVA; "
                f"available: {', '.join(there) or 'none'}"
            )
    if not there:
        raise UsageError(
            f"{plan.root} has no trained and scored SAE for layer {layer}, the layer that {info.tower.name} reads; "
            f'train and score one at a site such as "layer{layer}:random:2"'
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
    of_heldout, of_pictures = (ScoreTables(score.step.folder) for score in (heldout, pictures))
    scores, top_images = of_pictures.scores, of_pictures.top_images
    images = pictures.activations.images
    steering = plan.study.steering
    ignored_labels = steering.ignore_labels if steering else ()
    classes = image_classes(images.labels, ignored_labels)
    max_token = load_max_token(train.step.folder).numpy()
    concepts = {one.latent: one for one in label_concepts(scores, top_images.image, classes, max_token)}
    label_names = images.labels["label_name"].to_pylist()
    similar = MeanEmbeddings(top_images, store, list(concepts), encoder) if store and encoder else None
    return SaeEntry(
        train.grid_cell.name,
        train.step.folder,
        train,
        concepts,
        NeuronNames.read(plan, train.grid_cell.name, label_names),
        of_heldout.scores.ms,
        top_images,
        of_heldout.histogram,
        images,
        _mostly(top_images.image, [name in ignored_labels for name in label_names]),
        similar,
    )


def _mostly(top_image: Int[np.ndarray, "d_sae top"], are: Sequence[bool]) -> frozenset[int]:
    """The features most of whose top images are so. `are` has a value per image."""
    there = top_image >= 0
    such = there & np.array(are, bool)[top_image]
    return frozenset(np.flatnonzero(2 * such.sum(axis=1) > there.sum(axis=1)).tolist())


def _order(one: Summary, by: Sort) -> tuple[float, int]:
    """Largest value first, missing values last; by index, smallest first."""
    value = {
        "similarity": one.similarity,
        "ms": one.ms,
        "frequency": one.concept.frequency,
        "max_token": one.concept.max_token,
        "index": -one.concept.latent,
    }[by]
    return (float("inf") if value is None else -value, one.concept.latent)


@lru_cache(maxsize=2048)
def _thumbnail(folder: Folder, image_id: str, rendering: Rendering) -> bytes:
    image = decode_image(folder.read_bytes(image_id), rendering=rendering)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()
