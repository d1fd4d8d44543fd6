"""Labels of images: which concepts each image shows, and for which of them that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from sae_ray.concepts.inputs import SparseMatrix, as_numpy
from sae_ray.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa
    from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class Labels:
    """Which concepts images show: one class per image, or any number of concepts, some of them unknown.

    Only what an image does show is listed, so a thousand classes cost one entry per image.
    """

    names: tuple[str, ...]
    """Of the concepts."""
    positive: Float[SparseMatrix, "images concepts"]
    """1 where an image shows a concept."""
    known: Bool[np.ndarray, "images populations"]
    """Whether it is known what an image shows: one column for all concepts alike, or one column for each concept. What
    is known and not positive is negative."""

    @classmethod
    def of_classes(cls, classes: Sequence[str | None]) -> Labels:
        """From the class of each image; None for an image without one. Concepts are the sorted classes."""
        names = sorted({name for name in classes if name is not None})
        place = {name: number for number, name in enumerate(names)}
        codes = np.array([-1 if name is None else place[name] for name in classes], np.int64)
        return _of_codes(codes, tuple(names))

    @classmethod
    def of_table(cls, table: pa.Table, ignored: Sequence[str] = ()) -> Labels:
        """From the labels beside a manifest (`sae_ray.images.manifest.LABELS_SCHEMA`), named as `class_of` names them.

        Args:
            ignored: `label_name`s that are no class, such as that of images without an object.
        """
        from sae_ray.concepts.labelling import image_classes

        return cls.of_classes(image_classes(table, ignored))

    @classmethod
    def of(cls, labels: Any, names: Sequence[str] | None = None) -> Labels:
        """From arrays, as a notebook has them.

        Args:
            labels: `[images]` integers, the class of each image, negative for none; or `[images, concepts]` of 0 and 1,
                NaN (or masked) where it is unknown. `Labels` come back as they are.
            names: of the concepts; by default their numbers.

        Raises:
            UsageError: there are other values, or not as many names as concepts.
        """
        if isinstance(labels, Labels):
            return labels
        values = as_numpy(labels)
        if values.ndim == 1 and values.dtype.kind in "iu":
            n_concepts = int(values.max(initial=-1)) + 1
        elif values.ndim == 2:
            n_concepts = values.shape[1]
        else:
            raise UsageError(
                f"labels has the shape {values.shape} and the type {values.dtype}; give whole numbers [images], or a "
                "matrix [images, concepts] of 0, 1 and NaN"
            )
        chosen = tuple(map(str, range(n_concepts))) if names is None else tuple(names)
        if len(chosen) < n_concepts or (values.ndim == 2 and len(chosen) != n_concepts):
            raise UsageError(f"names has {len(chosen)} names for {n_concepts} concepts; give one name per concept")
        return _of_codes(values.astype(np.int64), chosen) if values.ndim == 1 else _of_matrix(values, chosen)

    @property
    def n_images(self) -> int:
        return len(self.known)

    @property
    def n_concepts(self) -> int:
        return len(self.names)

    @cached_property
    def labelled(self) -> Bool[np.ndarray, " images"]:
        """Whether anything is known of an image."""
        return np.asarray(self.known.any(axis=1))

    @cached_property
    def n_positive(self) -> Int[np.ndarray, " concepts"]:
        """Number of images that show each concept."""
        return np.bincount(self.positive.indices, minlength=self.n_concepts)

    def take(self, images: Int[np.ndarray, " chosen"] | slice) -> Labels:
        """Those of some images, by position."""
        return Labels(self.names, self.positive[images], self.known[images])

    def showing(self, concept: int) -> Int[np.ndarray, " chosen"]:
        """Positions of the images that show a concept, ascending."""
        start, end = self._columns.indptr[concept : concept + 2]
        return np.sort(self._columns.indices[start:end])

    def of_concept(self, concept: int) -> Float[np.ndarray, " images"]:
        """1, 0 or, where it is unknown, NaN."""
        known = self.known[:, concept if self.known.shape[1] > 1 else 0]
        values = np.where(known, 0.0, np.nan)
        values[self.showing(concept)] = 1
        return values

    @cached_property
    def _columns(self) -> Float[SparseMatrix, "images concepts"]:
        return self.positive.tocsc()


def check_same_rows(codes: Any, labels: Labels) -> None:
    """Raises UsageError unless codes and labels have as many rows."""
    if codes.shape[0] != labels.n_images:
        raise UsageError(
            f"codes has {codes.shape[0]} rows and labels has {labels.n_images}; give both for the same images"
        )


def _of_codes(codes: Int[np.ndarray, " images"], names: tuple[str, ...]) -> Labels:
    known = codes >= 0
    return Labels(names, _ones(np.flatnonzero(known), codes[known], (len(codes), len(names))), known[:, None])


def _of_matrix(values: np.ndarray, names: tuple[str, ...]) -> Labels:
    values = np.ma.filled(values.astype(np.float64), np.nan)
    known = np.asarray(~np.isnan(values))
    if wrong := set(np.unique(values[known]).tolist()) - {0.0, 1.0}:
        raise UsageError(f"labels has the value {min(wrong):g}; a matrix of labels has only 0, 1 and NaN for unknown")
    if np.array_equal(known.any(axis=1), known.all(axis=1)):
        known = known[:, :1]
    row, column = np.nonzero(values == 1)
    return Labels(names, _ones(row, column, values.shape), known)


def _ones(row: np.ndarray, column: np.ndarray, shape: tuple[int, ...]) -> SparseMatrix:
    from scipy.sparse import csr_array

    return csr_array((np.ones(len(row)), (row, column)), shape=shape)
