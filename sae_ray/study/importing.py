"""Activations from elsewhere become a root's own: in the format of extraction, beside lists of their images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sae_ray.encoders.info import IMPORTED
from sae_ray.encoders.sites import Site
from sae_ray.errors import UsageError, check
from sae_ray.images.manifest import LABELS_SCHEMA, MANIFEST_SCHEMA, ImageList, is_heldout
from sae_ray.store.files import Folder
from sae_ray.store.steps import hold
from sae_ray.store.tables import spooled
from sae_ray.store.vectors import Vectors, write_vectors
from sae_ray.study.config import Extraction, Images
from sae_ray.study.imported import Imported, ImportedImages, ImportedSite, read_imported
from sae_ray.study.plan import images_per_part
from sae_ray.study.step_plans import ImagePlan
from sae_ray.study.survey import SurveyedImages

if TYPE_CHECKING:
    from jaxtyping import Bool

MOST_TOKENS = 2**15 - 1
"""Of an image: their numbers are stored in 16 bits."""
IMAGE_COLUMNS = ("image_id", "label")
TABLES = "a .csv or .parquet file with a row per vector and the columns image_id, label or both"


class _Set(NamedTuple):
    """Vectors of an image set."""

    vectors: Vectors
    ids: pa.Array
    """Of the images."""
    labels: pa.Array | None
    """Of the images, null for none; None if nothing is said of labels."""
    rows_per_image: int

    def only(self, chosen: Bool[np.ndarray, " images"]) -> _Set:
        """Some of its images."""
        rows = self.vectors.only(np.flatnonzero(np.repeat(chosen, self.rows_per_image)))
        kept = pa.array(chosen)
        labels = None if self.labels is None else self.labels.filter(kept)
        return _Set(rows, self.ids.filter(kept), labels, self.rows_per_image)


def import_activations(
    root: str | Path,
    site: str,
    train: Any,
    heldout: Any = None,
    *,
    images: Any = None,
    heldout_images: Any = None,
    judge: Any = None,
    column: str | None = None,
    heldout_fraction: float = Images.heldout_fraction,
) -> Imported:
    """Puts activations under a root, where a study without `[images]` and `[encoder]` trains on them.

    What is there already is not written again. A root has one pair of image sets, which all of its sites share.

    Args:
        root: a directory or a URI.
        site: the name that `grid.sites` gives them.
        train, heldout: what `Vectors` takes, [n, d]. Without `heldout` a share of the images is held out.
        images, heldout_images: what is known of the rows of `train` and `heldout`: a pyarrow table, a mapping of
            columns, or a `.csv` or `.parquet` file, with `image_id`, `label` or both. Rows with the same `image_id` are
            tokens of one image: they stand together, and every image has as many. Without it each row is an image of
            its own.
        judge: another encoder's embeddings, [images, d], with which MonoSemanticity is scored: of the held-out images,
            or of all images if `heldout` is not given.
        column: see `Vectors`.
        heldout_fraction: share of the images that is held out; which ones depends on their ids.

    Returns:
        All that was imported under the root so far.

    Raises:
        UsageError: these are no vectors, or vectors and images do not fit one another or what is there; the root
            cannot be written.
        SaeRayError: a value is not finite; another process writes the same.
    """
    Site("imported", label=site)  # refuses what cannot be the name of a file
    folder = Folder(root)
    whole = _described(Vectors(train, column), images, "images (--image-table)")
    judged = None if judge is None else Vectors(judge)
    of_heldout = "heldout_images (--heldout-image-table)"
    if heldout is not None:
        sets = {"train": whole, "heldout": _described(Vectors(heldout, column), heldout_images, of_heldout)}
        _check_judge(judged, len(sets["heldout"].ids))
    else:
        check(heldout_images is None, of_heldout, heldout_images, "give heldout (--heldout), or leave it out")
        sets, judged = _split(whole, judged, heldout_fraction)
    shapes = {name: (one.vectors.d, one.rows_per_image) for name, one in sets.items()}
    if len(set(shapes.values())) > 1:
        told = " and ".join(f"{d} dimensions, {rows} row(s) per image in {name}" for name, (d, rows) in shapes.items())
        raise UsageError(f"site {site!r} has {told}; they must agree")
    lists = {name: _lists(one) for name, one in sets.items()}
    known = _known(folder, site, lists)
    try:
        plans = {name: _listed(folder, name, sets[name], one, known) for name, one in lists.items()}
        configs = {name: _written(plans[name], f"activations-{name}-{site}", one) for name, one in sets.items()}
        facts = {name: plan.surveyed for name, plan in plans.items()}
        imported = Imported(
            {name: ImportedImages(one.n_images, one.manifest_digest, one.labels_digest) for name, one in facts.items()},
            {**known.sites, site: ImportedSite(*shapes["train"], configs)},
            known.judge if judged is None else _judge(plans["heldout"], judged),
        )
        imported.write(folder)
    except OSError as error:
        raise UsageError(
            f"--root {folder} cannot be written ({error}); make room, or choose a directory of your own"
        ) from error
    return imported


def _described(vectors: Vectors, images: Any, field: str) -> _Set:
    """The images of the rows of some vectors. `field`: what gave the former."""
    columns = {} if images is None else _columns(vectors, images, field)
    if "image_id" not in columns:
        texts, padding = pa.array(np.arange(vectors.n)).cast(pa.string()), pc.PadOptions(len(str(vectors.n - 1)), "0")
        return _Set(vectors, pc.call_function("utf8_lpad", [texts], padding), columns.get("label"), 1)
    rows = columns["image_id"].dictionary_encode()
    first = np.flatnonzero(np.diff(rows.indices.to_numpy(), prepend=-1))
    per_image = np.diff(first, append=vectors.n)
    ids = columns["image_id"].take(pa.array(first))
    if len(ids) > len(rows.dictionary):
        raise UsageError(f"{vectors.name}: the rows of an image do not stand together; sort them by image_id")
    if (per_image != per_image[0]).any():
        other = int((per_image != per_image[0]).argmax())
        raise UsageError(
            f"{vectors.name}: image {ids[0]} has {per_image[0]} rows, {ids[other]} has {per_image[other]}; give every "
            "image as many, or each row an image_id of its own"
        )
    n = int(per_image[0])
    if n > MOST_TOKENS:
        raise UsageError(f"{field} gives each image {n:,} rows of {vectors.name}; give it at most {MOST_TOKENS:,}")
    if "label" not in columns:
        return _Set(vectors, ids, None, n)
    said, none = columns["label"], "\0"
    labels = said.take(pa.array(first))
    of_rows = labels.take(pa.array(np.repeat(np.arange(len(ids)), n)))
    same = pc.call_function("equal", [said.fill_null(none), of_rows.fill_null(none)]).to_numpy(zero_copy_only=False)
    if not same.all():
        row = int(same.argmin())
        raise UsageError(f"{vectors.name}: the rows of image {ids[row // n]} have several labels; give an image one")
    return _Set(vectors, ids, labels, n)


def _columns(vectors: Vectors, images: Any, field: str) -> dict[str, pa.Array]:
    """Those of `IMAGE_COLUMNS` that a table has, as texts."""
    table = _opened(images, field) if isinstance(images, str | Path) else images
    if not isinstance(table, pa.Table):
        table = pa.table(dict(table))
    there = [name for name in IMAGE_COLUMNS if name in table.column_names]
    if not there:
        raise UsageError(f"{field} has the columns {', '.join(table.column_names)}; give {TABLES}")
    if table.num_rows != vectors.n:
        raise UsageError(f"{field} has {table.num_rows:,} rows for the {vectors.n:,} of {vectors.name}; give {TABLES}")
    found = {name: table[name].cast(pa.string()).combine_chunks() for name in there}
    if "image_id" in found and found["image_id"].null_count:
        raise UsageError(f"{field} has rows without an image_id; give each row one, or leave the column out")
    return found


def _opened(path: str | Path, field: str) -> pa.Table:
    suffix = Path(path).suffix
    check(suffix in (".csv", ".parquet"), field, str(path), f"give {TABLES}")
    try:
        if suffix == ".parquet":
            from pyarrow.parquet import read_table

            return read_table(path)
        from pyarrow.csv import ConvertOptions, read_csv

        texts = ConvertOptions(column_types=dict.fromkeys(IMAGE_COLUMNS, pa.string()), strings_can_be_null=True)
        return read_csv(path, convert_options=texts)
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"{field} = {str(path)!r} cannot be read ({error}); give {TABLES}") from error


def _split(whole: _Set, judged: Vectors | None, fraction: float) -> tuple[dict[str, _Set], Vectors | None]:
    """Training and held-out images, and the judge's embeddings of the latter."""
    check(0 < fraction < 1, "heldout_fraction", fraction, "make it more than 0 and less than 1")
    held = is_heldout(pa.chunked_array([whole.ids]), fraction)
    if held.all() or not held.any():
        raise UsageError(
            f"heldout_fraction = {fraction}: it leaves a set without images; give more than {len(held)} images, or "
            "held-out activations (--heldout)"
        )
    _check_judge(judged, len(held))
    if judged is not None:
        judged = judged.only(np.flatnonzero(held))
    return {"train": whole.only(~held), "heldout": whole.only(held)}, judged


def _known(folder: Folder, site: str, lists: Mapping[str, SurveyedImages]) -> Imported:
    """What was imported before that stays: all, if it is of the same images; nothing, if it was this site alone.

    Raises UsageError if there are other sites, of other images.
    """
    known = read_imported(folder)
    if known is None or all(known.images[name].manifest_digest == one.manifest_digest for name, one in lists.items()):
        return known or Imported({}, {})
    if others := sorted(known.sites.keys() - {site}):
        raise UsageError(
            f"site {site!r} has other images than {', '.join(others)} under {folder}; give all sites the same images, "
            "in the same order and with the same image_id, or choose another root"
        )
    return Imported({}, {})


def _lists(one: _Set) -> SurveyedImages:
    """The manifest and the labels of an image set."""
    index, sizes = pa.array(np.arange(len(one.ids))), pa.array(np.zeros(len(one.ids), np.int64))
    labels = one.labels if one.labels is not None else pa.nulls(len(one.ids), pa.string())
    classes = pa.array(sorted(set(labels.to_pylist()) - {None}), pa.string())
    codes = pc.call_function("index_in", [labels], pc.SetLookupOptions(classes))
    manifest = spooled(MANIFEST_SCHEMA, [pa.table([index, one.ids, sizes], schema=MANIFEST_SCHEMA)])
    named = spooled(LABELS_SCHEMA, [pa.table([index, codes, labels], schema=LABELS_SCHEMA)])
    return SurveyedImages.of(ImageList(manifest, named))


def _listed(folder: Folder, name: str, one: _Set, surveyed: SurveyedImages, known: Imported) -> ImagePlan:
    """Writes the lists of an image set. Labels that are known already stay where nothing is said of them."""
    if one.labels is None and name in known.images:
        surveyed = dataclasses.replace(surveyed, labels_digest=known.images[name].labels_digest)
    images = ImagePlan.of(folder, name, IMPORTED, surveyed)
    for step, which in images.lists:
        if not step.finished:
            with hold([step]):
                images.write(which)
    return images


def _written(images: ImagePlan, label: str, one: _Set) -> dict[str, Any]:
    """Writes vectors of an image set; the configuration of their step."""
    per_part = images_per_part(Extraction.images_per_part, images.n_images)
    return write_vectors(one.vectors, images.step.root, label, per_part, one.rows_per_image, images.step.name).config


def _judge(images: ImagePlan, judged: Vectors) -> ImportedSite:
    one = _Set(judged, pa.array([]), None, 1)
    return ImportedSite(judged.d, 1, {images.name: _written(images, f"embeddings-{images.name}", one)})


def _check_judge(judged: Vectors | None, n_images: int) -> None:
    if judged is not None and judged.n != n_images:
        raise UsageError(
            f"the judge's embeddings {judged.name} are of {judged.n:,} images, but there are {n_images:,}; give one "
            "row per image: of the held-out ones if held-out activations are given (--heldout), else of all"
        )
