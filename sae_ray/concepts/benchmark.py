"""The released benchmark of human judgments on pairs of neurons (Pach et al., arXiv 2504.02821, Appendix C)."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.csv

from sae_ray.concepts.agreeing import Pairs
from sae_ray.errors import SaeRayError, UsageError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

PAIRS, TOP_IMAGES, ACTIVATIONS = "pairs.csv", "top16_images.csv", "activations.csv"
N_TOP = 16
SAME = 1e-6
"""By which the scores may differ that a neuron has in several rows."""
BLOCK_BYTES = 2**26
"""Of the text of the activations that is read at a time. A row has about a megabyte."""

Key = int | str
"""A neuron or an image: a number, or other text."""

CODES = {
    "the chosen neuron's k": lambda x, y, said: said == x if said in (x, y) else None,
    "x or y": lambda x, y, said: {"x": True, "y": False}.get(str(said).lower()),
    "0 for x, 1 for y": lambda x, y, said: {0: True, 1: False}.get(said),
}
"""How `R_user` may name the chosen neuron -> whether it is x, from k_x, k_y and R_user; None if it is not said so."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Its folder, with the pairs in memory. The other two files are read when they are needed."""

    folder: Path
    pairs: Pairs
    """The neurons x and y, and which of them most people chose."""
    ms: dict[str, dict[Key, float]]
    """Judge (`dino`, `clip`) -> neuron -> its MS as published."""
    code: str
    """How the file names the chosen neuron, one of `CODES`."""

    @cached_property
    def top_images(self) -> dict[Key, list[Key]]:
        """Neuron -> its 16 top images, strongest first. Raises SaeRayError if the file is missing or incomplete."""
        columns = ["k", *(f"x_{rank}" for rank in range(1, N_TOP + 1))]
        rows = _read(self.folder / TOP_IMAGES, columns)
        return {_key(neuron): [_key(image) for image in images] for neuron, *images in rows}

    def activations(self) -> Iterator[tuple[list[Key], Float[np.ndarray, "neurons images"]]]:
        """Blocks of neurons with their activations on all images, in float64.

        Raises SaeRayError if the file is missing or holds something that is no number.
        """
        path = self.folder / ACTIVATIONS
        _check_there(path)
        header = _header(path)
        if header[:1] != ["k"]:
            raise SaeRayError(f"{path}: the first column is {header[:1]} instead of 'k'; download it again")
        types = dict.fromkeys(header, pa.float64()) | {"k": pa.string()}
        reading = pyarrow.csv.ReadOptions(block_size=BLOCK_BYTES)
        try:
            with pyarrow.csv.open_csv(path, reading, None, pyarrow.csv.ConvertOptions(column_types=types)) as reader:
                for batch in reader:
                    keys, *values = batch.columns
                    yield [_key(text) for text in keys.to_pylist()], np.stack([one.to_numpy() for one in values], 1)
        except pa.ArrowInvalid as error:
            raise SaeRayError(f"{path} cannot be read: {str(error).splitlines()[0]}; download it again") from error

    def ms_difference(self, embeddings: Float[Tensor, "images d"] | Float[np.ndarray, "images d"], judge: str) -> float:
        """The largest difference between published scores and those recomputed from the activations.

        Args:
            embeddings: of the images of `activations.csv`, in its order, by the judge.
            judge: one of `ms`.

        Raises:
            UsageError: there is no such judge, or not one embedding per image.
        """
        import torch

        from sae_ray.scores.statistics import monosemanticity

        published = self._scores(judge)
        judged = torch.as_tensor(embeddings)
        largest = 0.0
        for keys, values in self.activations():
            found = monosemanticity(torch.from_numpy(np.ascontiguousarray(values.T)), judged).tolist()
            apart = [abs(ms - published[key]) for key, ms in zip(keys, found, strict=True) if key in published]
            largest = max(largest, *apart, 0.0)
        return largest

    def _scores(self, judge: str) -> dict[Key, float]:
        if judge not in self.ms:
            raise UsageError(f"score = {judge!r}: the benchmark has {', '.join(self.ms)}")
        return self.ms[judge]


def read_benchmark(folder: Path | str) -> Benchmark:
    """Opens the folder with `pairs.csv`, `top16_images.csv` and `activations.csv`.

    How `R_user` names the chosen neuron is not published. Accepted are its k, `x` or `y`, and 0 for x or 1 for y.

    Raises SaeRayError if `pairs.csv` is missing, lacks a column, or names the chosen neuron in another way.
    """
    path = Path(folder) / PAIRS
    _check_there(path)
    judges = _judges(path)
    columns = ["k_x", "k_y", "R_user", *(f"MS_{side}_{judge}" for judge in judges for side in "xy")]
    rows = _read(path, columns)
    first, second, said = ([_key(row[place]) for row in rows] for place in range(3))
    code, is_first = _decoded(path, list(zip(first, second, said, strict=True)))

    ms: dict[str, dict[Key, float]] = {judge: {} for judge in judges}
    for line, (x, y, row) in enumerate(zip(first, second, rows, strict=True), start=2):
        for place, judge in enumerate(judges):
            for neuron, text in zip((x, y), row[3 + 2 * place : 5 + 2 * place], strict=True):
                value = _number(path, line, text)
                if abs(ms[judge].setdefault(neuron, value) - value) > SAME:
                    raise SaeRayError(f"{path}, line {line}: neuron {neuron} has another MS ({judge}) than before")
    return Benchmark(Path(folder), Pairs(_keys(first), _keys(second), np.array(is_first, np.float64)), ms, code)


def _judges(path: Path) -> list[str]:
    judges = [name.removeprefix("MS_x_") for name in _header(path) if name.startswith("MS_x_")]
    if not judges:
        raise SaeRayError(f"{path} has no column 'MS_x_dino' or 'MS_x_clip'; download the benchmark again")
    return judges


def _decoded(path: Path, rows: list[tuple[Key, Key, Key]]) -> tuple[str, list[bool]]:
    """How the chosen neurons are named, and whether x is chosen in each row."""
    found: dict[str, list[bool]] = {}
    for code, is_first in CODES.items():
        chosen = _all_known(is_first, rows)
        if chosen is not None:
            found[code] = chosen
    if not found:
        shown = ", ".join(repr(value) for value in list(dict.fromkeys(said for _, _, said in rows))[:4])
        raise SaeRayError(f"{path}: R_user is {shown} …; known are {'; '.join(CODES)}")
    code, chosen = next(iter(found.items()))
    if any(other != chosen for other in found.values()):
        raise SaeRayError(f"{path}: R_user can be read in two ways, as {' and as '.join(found)}; write x or y instead")
    return code, chosen


def _all_known(is_first: Callable[[Key, Key, Key], bool | None], rows: list[tuple[Key, Key, Key]]) -> list[bool] | None:
    chosen = [is_first(*row) for row in rows]
    return None if None in chosen else [bool(one) for one in chosen]


def _check_there(path: Path) -> None:
    if not path.is_file():
        raise SaeRayError(f"{path} is missing; give the folder of the released benchmark, with all its files")


def _header(path: Path) -> list[str]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        return [name.strip() for name in next(csv.reader(file), [])]


def _read(path: Path, columns: list[str]) -> list[list[str]]:
    """The texts of these columns, row by row."""
    _check_there(path)
    header = _header(path)
    for name in columns:
        if name not in header:
            raise SaeRayError(f"{path} has no column {name!r} (it has {', '.join(header)}); download it again")
    places = [header.index(name) for name in columns]
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.reader(file))[1:]
    for line, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise SaeRayError(f"{path}, line {line}: {len(row)} values instead of {len(header)}; download it again")
    if not rows:
        raise SaeRayError(f"{path} has no rows; download it again")
    return [[row[place].strip() for place in places] for row in rows]


def _key(text: str) -> Key:
    """12 for `12` and `12.0`, which is what programs make of whole numbers where some are missing."""
    return int(text.partition(".")[0]) if re.fullmatch(r"-?\d+(\.0*)?", text) else text


def _keys(keys: list[Key]) -> np.ndarray:
    whole = all(isinstance(key, int) for key in keys)
    return np.array(keys, np.int64 if whole else object)


def _number(path: Path, line: int, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise SaeRayError(f"{path}, line {line}: {text!r} is not a number; download it again") from None
