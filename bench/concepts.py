"""All that the stage `concepts` measures of one SAE once its images are encoded: time, memory, and how both grow.

Codes are those of `bench.scoring`; classes are drawn at random, but one latent in 32 fires on the images of one class
as well. The vocabulary is that of the classes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from scipy.sparse import coo_array

from bench.record import Table, record
from bench.scoring import code_blocks, peak_kilobytes
from sae_ray.concepts import label_findings, measuring
from sae_ray.concepts.config import Concepts
from sae_ray.concepts.findings import Findings
from sae_ray.concepts.image_codes import ImageCodes
from sae_ray.concepts.labels import Labels
from sae_ray.concepts.word_names import Texts
from sae_ray.sae.second_moment import SecondMoment

THREADS = 1
"""As a task of the stage has."""
N, D_SAE, CLASSES, WIDTH = 50_000, 65_536, 1000, 768
IMAGES = (12_500, 25_000, N)
LATENTS = (16_384, 32_768, D_SAE)
CONCEPTS = (250, 500, CLASSES)
ALL = Concepts()
WITHOUT_ATOMS = Concepts(measures=tuple(measure for measure in ALL.measures if measure != "atoms"))
LIMIT_SECONDS, LIMIT_MB = 300, 4096


class Given:
    """What is measured."""

    def __init__(self, n: int, d_sae: int, n_classes: int):
        rng = np.random.default_rng(0)
        classes = rng.integers(0, n_classes, n)
        parts = [part for parts in code_blocks(n, d_sae) for part in parts]
        starts = np.cumsum([0, *(len(part.embeddings) for part in parts)])
        row = np.concatenate([part.row + start for part, start in zip(parts, starts, strict=False)])
        latent, value = (np.concatenate([getattr(part, name) for part in parts]) for name in ("latent", "value"))
        own = rng.permutation(d_sae)[: max(n_classes, d_sae // 32)]
        of_class = np.resize(own, n_classes)[classes]
        shown = rng.random(n) < 0.8
        row, latent = np.r_[row, np.flatnonzero(shown)], np.r_[latent, of_class[shown]]
        value = np.r_[value, 1 + rng.random(shown.sum())].astype(np.float64)
        codes = coo_array((value, (row, latent)), shape=(n, d_sae)).tocsc()
        self.labels = Labels.of(classes, [f"class {one}" for one in range(n_classes)])
        self.decoder = rng.normal(size=(d_sae, WIDTH))
        moment = SecondMoment(WIDTH)
        moment.add(rng.normal(size=(20 * WIDTH, WIDTH)))
        l0 = np.bincount(np.diff(codes.tocsr().indptr))
        self.images = ImageCodes(np.arange(n), codes, l0, moment, None)
        words = rng.normal(size=(n_classes, WIDTH))
        words /= np.linalg.norm(words, axis=1, keepdims=True)
        images = words[classes] + rng.normal(size=(n, WIDTH)) / WIDTH**0.5
        images /= np.linalg.norm(images, axis=1, keepdims=True)
        names = list(self.labels.names)
        self.texts = Texts(names, words, np.arange(n), images, dict(zip(names, names, strict=True)), True)


def measured(given: Given, settings: Concepts) -> Findings:
    top_images = measuring.top_positions(given.images.codes, measuring.TOP_IMAGES)
    return measuring.measure_codes(given.images, top_images, given.decoder, given.labels, settings, given.texts)


PLACES = {
    "top 16 images": (measuring, "top_positions"),
    "correlations, entropies, average precision (twice: also for shuffled labels)": (label_findings, "neuron_measures"),
    "probes, sparse probing, FMS of 100 concepts (twice)": (label_findings, "concept_measures"),
    "purity (twice)": (label_findings, "concept_purity"),
    "uniqueness": (measuring, "add_overlap"),
    "atoms": (measuring, "add_atoms"),
    "names": (measuring, "add_names"),
}
"""What is timed on its own."""


@contextmanager
def timed_places() -> Iterator[dict[str, float]]:
    """Seconds spent in each of `PLACES` within the block."""
    spent = dict.fromkeys(PLACES, 0.0)

    def timing(name: str, function: Any) -> Any:
        def timed(*args: Any) -> Any:
            begun = time.perf_counter()
            try:
                return function(*args)
            finally:
                spent[name] += time.perf_counter() - begun

        return timed

    patches = [patch.object(module, attribute, timing(name, getattr(module, attribute)))
               for name, (module, attribute) in PLACES.items()]  # fmt: skip
    for one in patches:
        one.start()
    try:
        yield spent
    finally:
        for one in patches:
            one.stop()


def main() -> None:
    torch.set_num_threads(THREADS)
    measured(Given(2000, 1024, 20), ALL)  # libraries and their buffers
    empty = resident_kilobytes()
    given = Given(N, D_SAE, CLASSES)
    before, begun = resident_kilobytes(), time.perf_counter()
    with timed_places() as spent:
        found = measured(given, ALL)
    seconds = time.perf_counter() - begun
    memory = (peak_kilobytes() - empty) / 1024
    del given
    assert found.counts["names_right"] > 0.9

    rows = [[name, round(value, 1)] for name, value in spent.items()] + [["all", round(seconds, 1)]]
    title = f"All that is measured of {D_SAE:,} latents on {N:,} images of {CLASSES:,} classes, by one core"
    held = [["at the peak", round(memory)], ["codes, decoder and embeddings", round((before - empty) / 1024)]]
    tables: list[Table] = [
        {"title": title, "columns": ["part", "seconds"], "rows": rows},
        {"title": "Memory that this takes", "columns": ["", "MB"], "rows": held},
    ]
    slopes, cpu_seconds = {}, cache(cpu_seconds_of)
    for what, sizes in (
        ("images", [(n, D_SAE, CLASSES) for n in IMAGES]),
        ("latents", [(N, d_sae, CLASSES) for d_sae in LATENTS]),
        ("classes", [(N, D_SAE, n_classes) for n_classes in CONCEPTS]),
    ):
        changing = next(place for place in range(3) if sizes[0][place] != sizes[-1][place])
        points = [[size[changing], round(cpu_seconds(*size), 1)] for size in sizes]
        x, y = np.log(points).T
        slope = float(np.polyfit(x, y, 1)[0])
        slopes[f"slope_of_time_against_{what}"] = round(slope, 3)
        title = f"CPU time against {what}, without atoms: slope {slope:.2f} on log axes"
        tables.append({"title": title, "columns": [what, "CPU seconds"], "rows": points})
    record("concepts", tables, {"threads": THREADS, **slopes})
    assert seconds <= LIMIT_SECONDS
    assert memory <= LIMIT_MB
    assert max(slopes.values()) <= 1.1, "the cost grows faster than the work"


def cpu_seconds_of(n: int, d_sae: int, n_classes: int) -> float:
    """Without atoms, whose cost is that of all pairs of latents, whatever the images."""
    given = Given(n, d_sae, n_classes)
    begun = time.process_time()
    measured(given, WITHOUT_ATOMS)
    return time.process_time() - begun


def resident_kilobytes() -> int:
    """Of this process, now."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


if __name__ == "__main__":
    main()
