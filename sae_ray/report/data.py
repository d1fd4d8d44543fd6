"""The data of images and cells that the pages load on demand.

Each cell has an index (a few numbers per neuron, for filters and sorting), chunks of `PER_CHUNK` neurons in the order
of the index, so that a page of the best neurons loads one chunk, files that tell the neurons of the images of a sprite,
and a file of heat maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from sae_ray.report.album import SIDE, Album
from sae_ray.report.heat import HeatMaps
from sae_ray.report.meanings import Meaning, meaning_of
from sae_ray.report.names import Named, names_of
from sae_ray.report.neighbours import N_NEAREST, nearest_latents
from sae_ray.report.neurons import Neurons
from sae_ray.report.packing import packed, rounded, write_data

PER_CHUNK = 512
WITH_NEIGHBOURS = 8192
"""How many neurons per cell, best first, get decoder neighbours. Each is compared with all neurons."""


def write_captions(folder: Path, album: Album) -> None:
    """Writes the names of all images, also of those without a thumbnail, one file per sprite."""
    for sprite in range(-(-len(album) // SIDE**2)):
        write_data(folder, f"images/{sprite}", album.captions(sprite))


def write_cell(
    folder: Path,
    cell: Neurons,
    album: Album,
    heat: HeatMaps | None,
    meaning: Meaning | None,
    named: Sequence[Named],
) -> None:
    """Writes the data of one cell's neurons."""
    order = cell.order
    write_data(
        folder,
        f"{cell.name}/index",
        {
            "neuron": packed(order, "<i4"),
            "ms": packed(cell.columns.ms[order], "<f4"),
            "frequency": packed(cell.columns.frequency[order], "<f4"),
            "max": packed(cell.columns.max_image[order], "<f4"),
            "support": packed(cell.columns.n_active[order], "<i4"),
            "label": packed(cell.label[order], "<i4"),
            "share": packed(cell.purity[order], "<f4"),
        },
    )
    near, cosine = _neighbours(cell)
    for start in range(0, len(order), PER_CHUNK):
        part = order[start : start + PER_CHUNK]
        images = album.numbers(cell.pictures.name, cell.top_image[part])
        n_images = (images >= 0).sum(axis=1).tolist()
        meant = {} if meaning is None else {"meaning": meaning_of(meaning, part)}
        write_data(
            folder,
            f"{cell.name}/{start // PER_CHUNK}",
            {
                "images": _cut(images.tolist(), n_images),
                "activations": _cut(rounded(cell.top_activation[part]), n_images),
                "histogram": [_trimmed(counts) for counts in cell.histogram[part]],
                "near": near[start : start + PER_CHUNK].tolist(),
                "cosine": rounded(cosine[start : start + PER_CHUNK]),
                "mean": rounded(cell.columns.mean[part]),
                "mean_active": rounded(cell.columns.mean_active[part]),
                "max_token": rounded(cell.columns.max_token[part]),
                "n_firing": cell.columns.n_firing[part].tolist(),
                "names": names_of(named, start, len(part)),
                **meant,
            },
        )
    for sprite, images in enumerate(_by_image(cell, album)):
        write_data(folder, f"{cell.name}/images/{sprite}", images)
    if heat is not None:
        write_data(folder, f"{cell.name}/heat", _heat(heat))


def _by_image(cell: Neurons, album: Album) -> list[list[list[list[int]]]]:
    """Per sprite and image: place and rank of the neurons that have it among their top images, lowest rank first."""
    images = album.numbers(cell.pictures.name, cell.top_image[cell.order])
    place, rank = np.nonzero(images >= 0)
    number = images[place, rank]
    first = np.lexsort((place, rank, number))
    pairs, ends = np.stack([place, rank], axis=1)[first], np.searchsorted(number[first], np.arange(len(album) + 1))
    found = [pairs[start:end].tolist() for start, end in pairwise(ends)]
    return [found[start : start + SIDE**2] for start in range(0, len(found), SIDE**2)]


def _neighbours(cell: Neurons) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours and cosines of the first neurons of the order; none for raw neurons."""
    if cell.score.sae is None or len(cell.order) < 2:
        return np.zeros((0, N_NEAREST), dtype=np.int64), np.zeros((0, N_NEAREST))
    from sae_ray.sae import load_sae

    return nearest_latents(load_sae(cell.score.sae.step.folder), cell.order[:WITH_NEIGHBOURS], cell.order)


def _heat(heat: HeatMaps) -> dict[str, Any]:
    """Per latent, its largest value on a patch, and a map per image in 255ths of that value; null without an image."""
    found: dict[str, Any] = {"rows": heat.maps.shape[2], "columns": heat.maps.shape[3], "latents": {}}
    for latent, maps in zip(heat.latents.tolist(), np.maximum(heat.maps, 0), strict=True):
        missing = np.isnan(maps).any(axis=(1, 2))
        largest = float(np.nan_to_num(maps).max(initial=0.0))
        shares = np.rint(np.nan_to_num(maps) / (largest or 1.0) * 255)
        found["latents"][latent] = {
            "max": rounded(np.array(largest)),
            "maps": [None if gone else packed(one, "<u1") for one, gone in zip(shares, missing, strict=True)],
        }
    return found


def _trimmed(counts: np.ndarray) -> list[int]:
    """The number of the first non-empty bin, then the counts up to the last non-empty one; [] if all are empty."""
    filled = np.flatnonzero(counts)
    return [int(filled[0]), *counts[filled[0] : filled[-1] + 1].tolist()] if len(filled) else []


def _cut(rows: list[list], lengths: list[int]) -> list[list]:
    return [row[:length] for row, length in zip(rows, lengths, strict=True)]
