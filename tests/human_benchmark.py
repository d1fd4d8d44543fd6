"""A small benchmark of human judgments in the format of the released one."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sae_ray import monosemanticity
from sae_ray.concepts import Pairs

N_IMAGES = 60


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def write_benchmark(folder: Path, code: str = "k", n_pairs: int = 200) -> tuple[Pairs, np.ndarray, torch.Tensor]:
    """A benchmark of 40 neurons, numbered from 100; returns pairs of places in the scores, these, and embeddings."""
    rng = np.random.default_rng(0)
    activations = np.maximum(rng.normal(-0.5, 1, (40, N_IMAGES)), 0).round(4)
    embeddings = torch.from_numpy(rng.normal(size=(N_IMAGES, 8)))
    ms = monosemanticity(torch.from_numpy(activations.T), embeddings).numpy()
    first, second = rng.integers(0, 40, n_pairs), rng.integers(0, 39, n_pairs)
    second += second >= first
    chosen = rng.random(n_pairs) < np.where(ms[first] > ms[second], 0.8, 0.2)
    said = {
        "k": lambda x, y, is_x: 100 + (x if is_x else y),
        "k as a float": lambda x, y, is_x: f"{100 + (x if is_x else y)}.0",
        "xy": lambda x, y, is_x: "x" if is_x else "y",
        "XY": lambda x, y, is_x: "X" if is_x else "Y",
        "01": lambda x, y, is_x: 0 if is_x else 1,
        "12": lambda x, y, is_x: 1 if is_x else 2,
        "sides": lambda x, y, is_x: "left" if is_x else "right",
    }[code]
    rows = [
        [100 + x, 100 + y, said(x, y, is_x), ms[x], ms[y], 1 - ms[x], 1 - ms[y]]
        for x, y, is_x in zip(first, second, chosen, strict=True)
    ]
    folder.mkdir(exist_ok=True)
    write_csv(
        folder / "pairs.csv",
        ["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino", "MS_x_clip", "MS_y_clip"],
        rows,
    )
    top = np.argsort(-activations, axis=1, kind="stable")[:, :16]
    write_csv(
        folder / "top16_images.csv",
        ["k", *(f"x_{i}" for i in range(1, 17))],
        [[100 + place, *images] for place, images in enumerate(top)],
    )
    write_csv(
        folder / "activations.csv",
        ["k", *(f"a_{i}" for i in range(1, N_IMAGES + 1))],
        [[100 + place, *(f"{value:g}" for value in values)] for place, values in enumerate(activations)],
    )
    return Pairs(first, second, chosen.astype(float)), ms, embeddings
