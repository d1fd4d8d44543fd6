"""The answers of several people on pairs of neurons: read, merged, and compared with one another."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sae_ray.errors import SaeRayError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

COLUMNS = ("page", "rater", "pair", "left", "right", "choice")
AS_DOWNLOADED = "give the file as the page downloaded it"


class Answer(NamedTuple):
    """One person's answer on one pair of neurons."""

    page: str
    """Of the step that made the page."""
    rater: str
    pair: int
    """Its place in `pairs.parquet`."""
    left: int
    """The neuron that was shown on the left; on a phone, above."""
    right: int
    choice: int
    """The chosen neuron."""
    where: str
    """File and line, for errors."""


def read_answers(files: Sequence[Path | str]) -> list[Answer]:
    """The answers in the CSV files that people downloaded from one page.

    Raises SaeRayError, with the file and line, if one cannot be read, has no answers or is about another page than the
    first, or if a rater is in several files or has answered a pair twice.
    """
    found: list[Answer] = []
    file_of: dict[str, str] = {}
    for file in map(str, files):
        answers = _read(file)
        for one in answers:
            first = found[0] if found else answers[0]
            if one.page != first.page:
                raise SaeRayError(
                    f"{one.where} is about the page {one.page!r}, but {first.where} about {first.page!r}; "
                    "give the files of one page"
                )
            if file_of.setdefault(one.rater, file) != file:
                raise SaeRayError(
                    f"rater {one.rater!r} is in {file_of[one.rater]} and in {file}; "
                    "give the later file alone, or rename one of two people of that name"
                )
        found += answers
    answered: dict[tuple[str, int], Answer] = {}
    for one in found:
        before = answered.setdefault((one.rater, one.pair), one)
        if before is not one:
            raise SaeRayError(
                f"{one.where}: rater {one.rater!r} has already answered pair {one.pair} in {before.where}; "
                f"{AS_DOWNLOADED}"
            )
    return found


def votes_of(
    answers: Sequence[Answer], first: Int[np.ndarray, " pairs"], second: Int[np.ndarray, " pairs"]
) -> tuple[list[str], Float[np.ndarray, "pairs raters"]]:
    """The raters, and their votes: 1 for the first neuron of a pair, 0 for the second, NaN without an answer.

    Raises SaeRayError, with the file and line, if an answer is about a pair that is not there or shows other neurons.
    """
    raters = sorted({one.rater for one in answers})
    column = {rater: place for place, rater in enumerate(raters)}
    votes = np.full((len(first), len(raters)), np.nan)
    for one in answers:
        if not 0 <= one.pair < len(first):
            raise SaeRayError(f"{one.where}: pair {one.pair} is unknown; the page has pairs 0 to {len(first) - 1}")
        neurons = {int(first[one.pair]), int(second[one.pair])}
        if {one.left, one.right} != neurons:
            shown = " and ".join(map(str, sorted(neurons)))
            raise SaeRayError(
                f"{one.where}: pair {one.pair} shows neurons {shown}, not {one.left} and {one.right}; {AS_DOWNLOADED}"
            )
        votes[one.pair, column[one.rater]] = one.choice == first[one.pair]
    return raters, votes


def merged(votes: Float[np.ndarray, "pairs raters"]) -> Float[np.ndarray, " pairs"]:
    """What most raters say of each pair: 1 or 0, .5 if they are divided, NaN if nobody answered.

    Args:
        votes: 1, 0, or NaN where a rater has not answered.
    """
    ayes, noes = (votes == 1).sum(axis=1), (votes == 0).sum(axis=1)
    return np.where(ayes + noes > 0, (np.sign(ayes - noes) + 1) / 2, np.nan)


def same_answers(votes: Float[np.ndarray, "units raters"]) -> tuple[float, int]:
    """The share of equal answers among all that two raters gave on the same unit, and their number; NaN without any.

    Args:
        votes: categories as numbers, NaN where a rater has not answered.
    """
    counts = _counts(votes)
    answers = counts.sum(axis=1)
    n = int((answers * (answers - 1)).sum()) // 2
    return (float((counts * (counts - 1)).sum() / 2 / n) if n else float("nan")), n


def krippendorff_alpha(votes: Float[np.ndarray, "units raters"]) -> float:
    """Krippendorff's alpha for categories without order: 1 if raters always agree, 0 if they agree as by chance.

    Raters may leave out units. NaN if no unit has two answers, or if all answers are the same. The closed formula
    is that for nominal data in Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), section C.

    Args:
        votes: categories as numbers, NaN where a rater has not answered.
    """
    counts = _counts(votes)
    counts = counts[counts.sum(axis=1) >= 2]
    answers, of_category = counts.sum(axis=1), counts.sum(axis=0)
    n = answers.sum()
    by_chance = n * (n - 1) - (of_category * (of_category - 1)).sum()
    if not by_chance:
        return float("nan")
    matches = (counts * (counts - 1) / np.maximum(answers - 1, 1)[:, None]).sum()
    return float(((n - 1) * matches - (of_category * (of_category - 1)).sum()) / by_chance)


def _counts(votes: np.ndarray) -> np.ndarray:
    """How many raters chose each category, per unit."""
    categories = np.unique(votes[~np.isnan(votes)])
    return (votes[:, :, None] == categories).sum(axis=1)


def _read(file: str) -> list[Answer]:
    try:
        with open(file, newline="", encoding="utf-8-sig") as lines:
            rows = list(csv.reader(lines, strict=True))
    except (OSError, UnicodeError, csv.Error) as error:
        raise SaeRayError(f"{file} cannot be read as CSV ({error}); {AS_DOWNLOADED}") from error
    if not rows or tuple(rows[0]) != COLUMNS:
        shown = ", ".join(rows[0])[:100] if rows else "nothing"
        raise SaeRayError(f"{file} begins with {shown} instead of {', '.join(COLUMNS)}; {AS_DOWNLOADED}")
    answers = [_answer(row, f"{file}, line {line}") for line, row in enumerate(rows[1:], start=2) if row]
    if not answers:
        raise SaeRayError(f"{file} has no answers; leave it out, or download it again after some answers")
    return answers


def _answer(row: list[str], where: str) -> Answer:
    if len(row) != len(COLUMNS):
        raise SaeRayError(f"{where} has {len(row)} values instead of {len(COLUMNS)}; {AS_DOWNLOADED}")
    page, rater, *texts = row
    for name, text in zip(COLUMNS[2:], texts, strict=True):
        if not text.isdecimal():
            raise SaeRayError(f"{where}: {name} is {text!r}, which is not a number; {AS_DOWNLOADED}")
    pair, left, right, choice = map(int, texts)
    one = Answer(page, rater, pair, left, right, choice, where)
    if one.choice not in (one.left, one.right):
        raise SaeRayError(
            f"{where}: choice is {one.choice}, but {one.left} and {one.right} were shown; {AS_DOWNLOADED}"
        )
    return one
