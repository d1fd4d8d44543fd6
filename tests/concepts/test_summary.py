"""Which SAE is best by which measure, and a table of an SAE's best neurons."""

from __future__ import annotations

import pyarrow as pa
import pytest

from sae_ray.concepts.findings import Findings
from sae_ray.concepts.summary import SHOWN_CONCEPTS, Cell, best_by_measure, comparison_lines, concept_lines
from sae_ray.concepts.tables import NEURONS, ConceptTables
from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder


def cells() -> list[Cell]:
    def counts(rho: float | None, entropy: float, chance: float = 0.01) -> dict:
        return {"rho": rho, "mean_entropy_balanced": entropy, "n_found_concepts": 3, "shuffled": {"rho": chance}}

    return [
        Cell("raw-a", "a", False, counts(0.9, 0.95)),
        Cell("raw-b", "b", False, counts(0.3, 0.8)),
        Cell("narrow", "a", True, counts(0.5, 0.2, 0.02)),
        Cell("wide", "b", True, counts(0.7, 0.4, 0.03)),
        Cell("dead", "b", True, counts(None, 0.5)),
    ]


def test_the_best_is_an_sae_and_its_row_has_its_own_sites_raw_neurons():
    best = {one.measure.key: one for one in best_by_measure(cells())}
    rho, entropy = best["rho"], best["mean_entropy_balanced"]
    assert (rho.name, rho.value, rho.raw, rho.chance) == ("wide", 0.7, 0.3, 0.03)
    assert (entropy.name, entropy.value, entropy.raw, entropy.chance) == ("narrow", 0.2, 0.95, None)
    assert best["n_found_concepts"].name == "narrow", "the first one in a tie"
    assert best.keys() == {"rho", "mean_entropy_balanced", "n_found_concepts"}


def test_chance_is_that_of_the_measure():
    counts = {"stability": 0.6, "stability_random": 0.2, "spliced": 0.9, "spliced_mean": 0.1, "recovered": 0.95}
    best = best_by_measure([Cell("wide", "b", True, counts | {"shuffled": {"stability_random": 0.7}})])
    assert {one.measure.key: one.chance for one in best} == {"stability": 0.2, "spliced": 0.1, "recovered": None}


def test_the_comparison_is_a_table_of_what_there_is():
    lines = comparison_lines(cells())
    assert len(lines) == 1 + 3
    assert lines[0].split() == ["measure", "best", "SAE", "its", "value", "raw", "neurons", "by", "chance"]
    assert ["narrow", "0.200", "0.950", "–"] in [line.split()[-4:] for line in lines]
    assert comparison_lines([one for one in cells() if not one.is_sae]) == []


def tables(folder, n_concepts: int, stem: str = "concept ") -> ConceptTables:
    found = Findings(2)
    found.neurons |= {"name": ["cat", None]}
    places = range(n_concepts)
    found.concepts |= {
        "concept": [f"{stem}{place}" for place in places],
        "n_images": [20] * n_concepts,
        "neuron": [place % 2 if place else -1 for place in places],  # none for the first
        "rho": [place / 100 for place in places],
    }
    found.write(Folder(folder))
    return ConceptTables(Folder(folder))


def test_a_table_has_the_best_concepts_first_and_says_how_many_there_are(tmp_path):
    cell = Cell("wide", "b", True, {"n_live": 1, "neurons": 2})
    lines = concept_lines(cell, tables(tmp_path / "many", 14))
    assert lines[0] == "wide: 1 of 2 neurons fire"
    rows = lines[3:-1]
    assert [row.split()[1] for row in rows] == [str(place) for place in range(13, 3, -1)]
    assert len(rows) == SHOWN_CONCEPTS
    assert rows[0].split()[3:6] == ["1", "–", "0.13"]
    assert rows[1].split()[3:6] == ["0", "cat", "0.12"]
    assert lines[-1] == "and 3 more concepts"
    assert concept_lines(cell, tables(tmp_path / "none", 0)) == ["wide: 1 of 2 neurons fire"]


def test_a_concept_that_is_a_synset_is_told_in_words(tmp_path):
    cell = Cell("wide", "b", True, {"n_live": 1, "neurons": 2})
    [_, _, _, first, *_] = concept_lines(cell, tables(tmp_path, 5, stem="n0144076"))
    assert first.startswith("tench, Tinca tinca (n01440764) ")


def test_what_is_measured_of_the_whole_is_told_in_a_line_each(tmp_path):
    counts = {
        "n_live": 1, "neurons": 2, "depth": 1.25, "depths": [1.0, None, 2.0], "q_star_atom": 0.5, "reachable": 0.9,
        "q_star_tenth_ridge": 0.4, "q_star_tenfold_ridge": 0.75, "spliced_by": "zero_shot", "spliced": 0.8,
        "spliced_original": 0.9, "spliced_mean": 0.1, "spliced_zero": 0.05, "stability": 0.6, "stability_random": 0.2,
        "max_rho": 0.95, "share_rho_50": 0.25, "shuffled": {"max_rho": 0.1}, "words": 16, "named": 1200,
        "distinct_names": 9, "pure": 4, "names_right": 0.75,
    }  # fmt: skip
    assert concept_lines(Cell("wide", "b", True, counts), tables(tmp_path, 0)) == [
        "wide: 1 of 2 neurons fire",
        "ρ of .5 or more with a concept: 0.250 of the neurons; the largest is 0.950, by chance 0.100",
        "names: 1,200 neurons have one of 16 words, 9 different ones; 0.750 of the 4 pure ones have that of their "
        "concept",
        "q*: 0.500 (0.400 with a tenth of the ridge, 0.750 with ten times as much); 0.900 of the samples are within "
        "Welch's bound",
        "stability between seeds: 0.600; with random directions 0.200",
        "depth in the taxonomy: 1.25, by Matryoshka level 1.00, –, 2.00",
        "accuracy (zero-shot) with the reconstruction in place: 0.800; with the activations 0.900, with their mean "
        "0.100, with zeros 0.050",
    ]
    missing = dict.fromkeys(("spliced", "q_star_atom", "max_rho", "stability", "names_right"))
    flat = counts | missing | {"depths": [1.25]}
    assert concept_lines(Cell("wide", "b", True, flat), tables(tmp_path / "flat", 0))[1:] == [
        "names: 1,200 neurons have one of 16 words, 9 different ones",
        "depth in the taxonomy: 1.25",
    ]


def test_what_is_missing_is_missing_when_it_is_read_again(tmp_path):
    read = tables(tmp_path, 2)
    assert read.concepts.neuron.tolist() == [-1, 1]
    assert read.neurons.name.tolist() == ["cat", None]
    assert read.neurons.name_images.tolist() == [-1, -1]
    stored = Folder(tmp_path).read_parquet(NEURONS)
    assert stored["rho"].null_count == stored["name_images"].null_count == 2, "null in the file"
    Folder(tmp_path).write_parquet(NEURONS, stored.set_column(3, "rho", pa.array([1, 2])))
    with pytest.raises(SaeRayError, match=r"no column 'rho' of type double; delete .* run the concepts stage again"):
        _ = ConceptTables(Folder(tmp_path)).neurons
