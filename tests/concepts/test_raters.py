"""Answers of several people: read, merged, and compared with one another."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from sae_ray.concepts.raters import krippendorff_alpha, merged, read_answers, same_answers, votes_of
from sae_ray.errors import SaeRayError

HEADER = "page,rater,pair,left,right,choice"
NONE = math.nan
VOTES = arrays(float, st.tuples(st.integers(1, 8), st.integers(1, 5)), elements=st.sampled_from([0.0, 1.0, NONE]))


def write(path: Path, *lines: str, header: str = HEADER, encoding: str = "utf-8") -> Path:
    path.write_text("\n".join([header, *lines]) + "\n", encoding=encoding)
    return path


def test_the_majority_counts_and_a_tie_is_half():
    votes = np.array(
        [
            [1, 1, 0],
            [0, 1, 0],
            [1, NONE, 0],
            [NONE, NONE, NONE],
            [NONE, 0, NONE],
            [1, 1, 1],
        ]
    )
    np.testing.assert_array_equal(merged(votes), [1, 0, 0.5, NONE, 0, 1])


@given(VOTES)
def test_merged_as_by_counting(votes: np.ndarray):
    for row, found in zip(votes, merged(votes), strict=True):
        ones, zeros = row.tolist().count(1.0), row.tolist().count(0.0)
        expected = NONE if ones + zeros == 0 else 1.0 if ones > zeros else 0.0 if zeros > ones else 0.5
        np.testing.assert_equal(found, expected)


def test_alpha_is_the_published_one():
    # Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011): four observers, twelve units, five categories.
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, NONE, NONE, NONE],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NONE, 3],
        [NONE, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NONE],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NONE],
    ]
    assert krippendorff_alpha(np.array(observers).T) == pytest.approx(0.743, abs=5e-4)
    # From there, too: two observers, ten units, two categories.
    binary = np.array([[0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]], float).T
    assert krippendorff_alpha(binary) == pytest.approx(0.095, abs=5e-4)
    assert same_answers(binary) == (pytest.approx(0.6), 10)


@given(VOTES)
def test_alpha_is_one_less_disagreement_over_that_by_chance(votes: np.ndarray):
    """By the definition: the mean disagreement within units against that of all answers."""
    units = [row[~np.isnan(row)] for row in votes]
    units = [unit for unit in units if len(unit) > 1]
    answers = np.concatenate([*units, np.zeros(0)])
    pairs = list(combinations(answers, 2))
    expected = np.mean([a != b for a, b in pairs]) if pairs else 0.0
    if not expected:
        assert math.isnan(krippendorff_alpha(votes))
        return
    within = sum(len(unit) * np.mean([a != b for a, b in combinations(unit, 2)]) for unit in units) / len(answers)
    assert krippendorff_alpha(votes) == pytest.approx(1 - within / expected)


@given(VOTES)
def test_same_answers_as_by_counting(votes: np.ndarray):
    compared = [a == b for row in votes for a, b in combinations(row, 2) if not (math.isnan(a) or math.isnan(b))]
    share, n = same_answers(votes)
    assert n == len(compared)
    assert math.isnan(share) if not n else share == pytest.approx(np.mean(compared))


def test_files_are_read_and_votes_are_for_the_first_neuron(tmp_path: Path):
    first, second = np.array([7, 3, 9]), np.array([4, 8, 2])
    ann = write(tmp_path / "ann.csv", "p,Ann,0,7,4,7", "p,Ann,2,2,9,2", encoding="utf-8-sig")
    ben = write(tmp_path / "ben.csv", 'p,"Ben ""B"", 2nd",0,4,7,7', 'p,"Ben ""B"", 2nd",1,8,3,8', "")
    raters, votes = votes_of(read_answers([ann, ben]), first, second)
    assert raters == ["Ann", 'Ben "B", 2nd']
    np.testing.assert_array_equal(votes, [[1, 1], [NONE, 0], [0, NONE]])


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "a.csv has no answers"),
        (["p,Ann,0,7,4"], "a.csv, line 2 has 5 values instead of 6"),
        (["p,Ann,0,7,4,7", "p,Ann,1,x,4,4"], "a.csv, line 3: left is 'x', which is not a number"),
        (["p,Ann,0,7,4,9"], "a.csv, line 2: choice is 9, but 7 and 4 were shown"),
        (["p,Ann,0,7,4,4", "p,Ann,0,7,4,7"], "a.csv, line 3: rater 'Ann' has already answered pair 0 in"),
        (["p,Ann,3,7,4,4"], "a.csv, line 2: pair 3 is unknown; the page has pairs 0 to 2"),
        (["p,Ann,1,7,4,4"], "a.csv, line 2: pair 1 shows neurons 3 and 8, not 7 and 4"),
        (["p,Ann,0,7,4,7", "q,Ann,1,8,3,3"], "a.csv, line 3 is about the page 'q', but"),
        (['p,"Ann,0,7,4,7'], "a.csv cannot be read as CSV"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path: Path, lines: list[str], words: str):
    file = write(tmp_path / "a.csv", *lines)
    with pytest.raises(SaeRayError) as caught:
        votes_of(read_answers([file]), np.array([7, 3, 9]), np.array([4, 8, 2]))
    assert words in str(caught.value)


def test_files_that_are_not_of_the_page_are_named(tmp_path: Path):
    (tmp_path / "photo.csv").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(SaeRayError, match=r"photo\.csv cannot be read as CSV"):
        read_answers([tmp_path / "photo.csv"])
    (tmp_path / "empty.csv").write_bytes(b"")
    with pytest.raises(SaeRayError, match=r"empty\.csv begins with nothing"):
        read_answers([tmp_path / "empty.csv"])
    with pytest.raises(SaeRayError, match=r"other\.csv begins with page;rater.* instead of page, rater"):
        read_answers([write(tmp_path / "other.csv", header=HEADER.replace(",", ";"))])


def test_a_rater_with_two_files_is_named(tmp_path: Path):
    files = [write(tmp_path / name, f"p,Ann,{number},7,4,7") for number, name in enumerate(("a.csv", "b.csv"))]
    with pytest.raises(SaeRayError) as caught:
        read_answers(files)
    assert f"rater 'Ann' is in {files[0]} and in {files[1]}" in str(caught.value)
