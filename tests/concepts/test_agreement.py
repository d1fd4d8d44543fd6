"""Human agreement with scores, and the reader of the released benchmark."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.concepts import Agreement, Pairs, agreement, read_benchmark
from sae_ray.concepts.agreeing import AGREEMENT_SCHEMA, EDGES, wilson
from sae_ray.errors import SaeRayError, UsageError
from tests.human_benchmark import write_benchmark, write_csv

PAPER_RATES = (0.56, 0.66, 0.71, 0.81, 0.85, 0.93, 0.94, 0.96, 1.0)
PAPER_PAIRS = (177, 139, 126, 138, 121, 90, 105, 63, 41)
"""Per bin of |difference in MS|, by DINOv2 (Pach et al., arXiv 2504.02821, Appendix C)."""


def binomial_interval(n: int, rate: float, confidence: float) -> tuple[int, int]:
    """The fewest and most successes that leave at most half of the rest of the probability on each side."""
    mass = [math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(n + 1)]
    below = np.cumsum(mass)
    rest = (1 - confidence) / 2
    return int(np.searchsorted(below, rest)), int(np.searchsorted(below, 1 - rest))


def paper_pairs(seed: int = 0) -> tuple[Pairs, np.ndarray]:
    """1000 pairs of neurons with the paper's bins, chosen with the paper's rates, and the scores of their neurons."""
    rng = np.random.default_rng(seed)
    bins = np.repeat(np.arange(9), PAPER_PAIRS)
    apart = bins / 10 + rng.uniform(0.001, 0.099, len(bins))
    low = rng.uniform(0, 1 - apart)
    score = np.concatenate([low, low + apart])
    first, second = np.arange(len(bins)), np.arange(len(bins), 2 * len(bins))
    right = rng.random(len(bins)) < np.array(PAPER_RATES)[bins]
    swapped = rng.random(len(bins)) < 0.5
    pairs = Pairs(np.where(swapped, second, first), np.where(swapped, first, second), np.where(swapped, right, ~right))
    return pairs._replace(choice=pairs.choice.astype(float)), score


def test_the_papers_rates_are_found_again():
    pairs, score = paper_pairs()
    found = agreement(pairs, score)
    assert found.n_pairs.tolist() == [*PAPER_PAIRS, 0]
    for place, (n, rate) in enumerate(zip(PAPER_PAIRS, PAPER_RATES, strict=True)):
        fewest, most = binomial_interval(n, rate, 0.99)
        assert fewest <= round(found.rate[place] * n) <= most
    assert found.headline == pytest.approx(found.rate[:9].mean(), abs=1e-15)
    assert found.pooled == pytest.approx((found.rate[:9] * PAPER_PAIRS).sum() / 1000, abs=1e-15)


def test_the_papers_headline_is_the_mean_of_its_bins_and_its_other_rate_that_of_all_pairs():
    wins = [round(rate * n) for rate, n in zip(PAPER_RATES, PAPER_PAIRS, strict=True)]
    choice = np.concatenate([np.arange(n) < won for n, won in zip(PAPER_PAIRS, wins, strict=True)]).astype(float)
    apart = np.repeat(np.arange(9) / 10 + 0.05, PAPER_PAIRS)
    pairs = {"first": np.arange(1000), "second": np.full(1000, 1000), "choice": choice}
    found = agreement(pairs, torch.tensor([*apart, 0.0], dtype=torch.float64))
    # The paper states 82.8 %, which its rates allow if their further digits were cut off: each would be .004 more.
    assert found.headline == pytest.approx(sum(PAPER_RATES) / 9, abs=0.002)
    assert 0 <= 0.828 - sum(PAPER_RATES) / 9 < 0.01
    assert found.pooled == pytest.approx(0.779, abs=0.002)


def test_points_by_hand():
    score = {"a": 0.9, "b": 0.3, "c": 0.3, "d": 0.2, "none": math.nan}
    pairs = [
        np.array(["a", "b", "b", "c", "a", "d"]),
        np.array(["b", "a", "c", "d", "none", "a"]),
        [1.0, 0.5, 1.0, 0.0, 1.0, 0.0],
    ]
    found = agreement(pairs, score)
    # a-b: right, .6; b-a: divided, .6; b-c: equal scores; c-d: wrong, .1 (0.3 - 0.2 is a little less); d-a: right, .7
    assert found.n_unscored == 1
    assert found.n_pairs.tolist() == [1, 1, 0, 0, 0, 0, 2, 1, 0, 0]
    assert found.rate[[0, 1, 6, 7]].tolist() == [0.5, 0.0, 0.75, 1.0]
    assert np.isnan(found.rate[[2, 3, 4, 5, 8, 9]]).all()
    assert found.headline == pytest.approx((0.5 + 0.0 + 0.75 + 1.0) / 4)
    assert found.pooled == pytest.approx(3 / 5)
    assert found.cumulative[:8].tolist() == pytest.approx([3 / 5, 2.5 / 4, *[2.5 / 3] * 5, 1.0])
    assert np.isnan(found.cumulative[8:]).all()


def test_the_example_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    [example] = [one for one in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "import agreement" in one]
    found: dict = {}
    exec(example, found)
    assert found["found"].pooled == pytest.approx((1 + 1 + 0.5) / 3)


def test_scores_far_apart_have_a_bin():
    found = agreement(([0, 1, 2], [1, 2, 0], [1, 1, 1]), [1.0, 0.1, -1.0])
    assert found.n_pairs.tolist() == [0] * 9 + [3]
    assert found.rate[9] == pytest.approx(2 / 3)


@given(st.data())
def test_which_neuron_is_first_makes_no_difference(data: st.DataObject):
    n = data.draw(st.integers(1, 30))
    score = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=5, max_size=5)))
    neuron, votes = st.integers(0, 4), st.sampled_from([0.0, 0.5, 1.0])
    first, second, choice = (
        np.array(data.draw(st.lists(one, min_size=n, max_size=n))) for one in (neuron, neuron, votes)
    )
    for bins in ("paper", "quantiles"):
        found = agreement((first, second, choice), score, bins=bins)
        swapped = agreement((second, first, 1 - choice), score, bins=bins)
        np.testing.assert_array_equal(found.table()["rate"], swapped.table()["rate"])
        negated = agreement((first, second, choice), -score, bins=bins)
        np.testing.assert_allclose(negated.rate, 1 - found.rate, atol=1e-12)
        assert found.n_pairs.sum() == n


def test_quantiles_hold_equally_many_pairs_whatever_the_scale():
    rng = np.random.default_rng(0)
    score = rng.lognormal(0, 3, 1800)
    pairs = Pairs(np.arange(900), np.arange(900, 1800), rng.integers(0, 2, 900).astype(float))
    found = agreement(pairs, score, bins="quantiles")
    assert found.n_pairs.tolist() == [100] * 9
    for scale in (1e-12, 1e12):
        scaled = agreement(pairs, scale * score, bins="quantiles")
        np.testing.assert_array_equal(scaled.n_pairs, found.n_pairs)
        np.testing.assert_array_equal(scaled.rate, found.rate)
    assert agreement(pairs, np.ones(1800), bins="quantiles").n_pairs.tolist() == [900]
    assert math.isnan(agreement(([], [], []), score, bins="quantiles").headline)


@pytest.mark.parametrize(
    ("rate", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17, 857-872, table I, method 3
        (81 / 263, 263, 0.2553, 0.3662),
        (15 / 148, 148, 0.0624, 0.1605),
        (0.0, 20, 0.0, 0.1611),
        (1 / 29, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_intervals_are_the_published_ones(rate: float, n: int, low: float, high: float):
    found = wilson(np.array([rate, 1 - rate]), np.array([n, n]))
    assert [float(one[0]) for one in found] == pytest.approx([low, high], abs=5e-5)
    assert [float(one[1]) for one in found] == pytest.approx([1 - high, 1 - low], abs=5e-5)


def test_the_table_is_read_again():
    pairs, score = paper_pairs()
    found = agreement(pairs, score)
    table = found.table()
    assert table.schema == AGREEMENT_SCHEMA
    assert table["bin"].to_pylist() == EDGES.tolist()
    again = Agreement.of(table)
    for name in ("edge", "n_pairs", "rate", "low", "high", "cumulative"):
        np.testing.assert_array_equal(getattr(again, name), getattr(found, name))
    assert again.headline == found.headline


@pytest.mark.parametrize(
    ("pairs", "score", "words"),
    [
        (([0], [1]), [0.0, 1.0], "2 columns"),
        (([0, 1], [1], [1]), [0.0, 1.0], "2 first neurons, 1 second neurons and 1 choices"),
        (([0], [1], [2]), [0.0, 1.0], "pairs.choice has 2.0"),
        (([0], [1], [math.nan]), [0.0, 1.0], "pairs.choice has nan"),
        (([0], [2], [1]), [0.0, 1.0], "score has 2 neurons, but 2 is in a pair"),
        (([-1], [1], [1]), [0.0, 1.0], "-1 is in a pair"),
        (([0], [1], [1]), [[0.0, 1.0]], "shape (1, 2)"),
        (([0.5], [1], [1]), [0.0, 1.0], "not a whole number"),
        (([0], [1], [1]), {0: 1.0}, "score has no neuron 1"),
    ],
)
def test_what_does_not_fit_is_named(pairs, score, words: str):
    with pytest.raises(UsageError) as caught:
        agreement(pairs, score)
    assert words in str(caught.value)


# The benchmark


@pytest.mark.parametrize("code", ["k", "k as a float", "xy", "XY", "01"])
def test_the_benchmark_is_read_however_it_names_the_chosen_neuron(tmp_path: Path, code: str):
    pairs, ms, embeddings = write_benchmark(tmp_path, code)
    found = read_benchmark(tmp_path)
    expected = agreement(pairs, ms)
    assert 0.7 < expected.pooled < 0.9
    assert list(found.ms) == ["dino", "clip"]
    np.testing.assert_array_equal(agreement(found.pairs, found.ms["dino"]).rate, expected.rate)
    np.testing.assert_allclose(agreement(found.pairs, found.ms["clip"]).rate, 1 - expected.rate, atol=1e-12)
    assert len(found.top_images[100]) == 16
    assert found.ms_difference(embeddings, "dino") < 1e-9
    assert found.ms_difference(embeddings.flip(0), "dino") > 1e-3


def test_the_example_of_the_benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    page = (Path(__file__).parents[2] / "docs" / "concepts.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pairs, ms, embeddings = write_benchmark(tmp_path / "benchmark")
    scope: dict = {"embeddings": embeddings.numpy()}
    exec(example, scope)
    assert scope["found"].pooled == agreement(pairs, ms).pooled
    assert scope["difference"] < 1e-9


def test_activations_come_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    _, _, embeddings = write_benchmark(tmp_path)
    whole = list(read_benchmark(tmp_path).activations())
    monkeypatch.setattr("sae_ray.concepts.benchmark.BLOCK_BYTES", 2000)
    blocks = list(read_benchmark(tmp_path).activations())
    assert len(blocks) > 3
    assert [key for keys, _ in blocks for key in keys] == whole[0][0] == list(range(100, 140))
    np.testing.assert_array_equal(np.concatenate([values for _, values in blocks]), whole[0][1])
    assert read_benchmark(tmp_path).ms_difference(embeddings.numpy(), "dino") < 1e-9


@pytest.mark.parametrize(("code", "words"), [("12", "R_user is "), ("sides", "R_user is 'right', 'left'")])
def test_other_names_of_the_chosen_neuron_are_refused(tmp_path: Path, code: str, words: str):
    write_benchmark(tmp_path, code)
    with pytest.raises(SaeRayError) as caught:
        read_benchmark(tmp_path)
    assert words in str(caught.value)
    assert "the chosen neuron's k; x or y; 0 for x, 1 for y" in str(caught.value)


def test_a_name_that_can_be_read_in_two_ways_is_refused(tmp_path: Path):
    header = ["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino"]
    write_csv(tmp_path / "pairs.csv", header, [[0, 1, 1, 0.1, 0.2]])
    assert read_benchmark(tmp_path).pairs.choice.tolist() == [0.0]
    write_csv(tmp_path / "pairs.csv", header, [[1, 0, 1, 0.2, 0.1]])
    with pytest.raises(SaeRayError, match="in two ways, as the chosen neuron's k and as 0 for x, 1 for y"):
        read_benchmark(tmp_path)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([["k_x", "k_y", "MS_x_dino", "MS_y_dino"], [1, 2, 0, 0]], "no column 'R_user'"),
        ([["k_x", "k_y", "R_user"], [1, 2, 1]], "no column 'MS_x_dino'"),
        ([["k_x", "k_y", "R_user", "MS_x_dino"], [1, 2, 1, 0]], "no column 'MS_y_dino'"),
        ([["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino"]], "no rows"),
        ([["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino"], [1, 2, 1, 0]], "line 2: 4 values instead of 5"),
        (
            [["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino"], [1, 2, "x", 0, "high"]],
            "line 2: 'high' is not a number",
        ),
        (
            [["k_x", "k_y", "R_user", "MS_x_dino", "MS_y_dino"], [1, 2, "x", 0, 1], [3, 1, "x", 0, 1]],
            "line 3: neuron 1 has another MS (dino) than before",
        ),
    ],
)
def test_a_benchmark_that_is_not_whole_is_named(tmp_path: Path, rows: list, words: str):
    write_csv(tmp_path / "pairs.csv", rows[0], rows[1:])
    with pytest.raises(SaeRayError) as caught:
        read_benchmark(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path / "pairs.csv") in str(caught.value)


def test_files_that_are_missing_are_named_when_they_are_needed(tmp_path: Path):
    with pytest.raises(SaeRayError, match=r"pairs\.csv is missing"):
        read_benchmark(tmp_path / "nowhere")
    _, _, embeddings = write_benchmark(tmp_path)
    (tmp_path / "activations.csv").write_text("k,a_1\n100,zero\n")
    (tmp_path / "top16_images.csv").unlink()
    found = read_benchmark(tmp_path)
    with pytest.raises(SaeRayError, match=r"top16_images\.csv is missing"):
        _ = found.top_images
    with pytest.raises(SaeRayError, match=r"activations\.csv cannot be read.*zero"):
        found.ms_difference(embeddings, "dino")
    with pytest.raises(UsageError, match="score = 'human': the benchmark has dino, clip"):
        found.ms_difference(embeddings, "human")
