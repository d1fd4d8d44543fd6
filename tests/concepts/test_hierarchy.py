"""Depths in a taxonomy against the reference's numbers (tests/golden/README.md) and against all pairs of images."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from sae_ray.concepts import (
    group_means,
    image_paths,
    inaturalist_taxonomy,
    lca_counts,
    lca_depth,
    lca_mode,
    read_taxonomy,
)
from sae_ray.errors import UsageError

FILES = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FILES / "uniqueness_hierarchy.safetensors")
EXPECTED = json.loads((FILES / "uniqueness_hierarchy.json").read_text())["hierarchy"]


def golden_paths() -> list[tuple[str, ...] | None]:
    labels = [EXPECTED["folders"][label] for label in GOLDEN["labels"]]
    return image_paths(labels, inaturalist_taxonomy(EXPECTED["folders"]))


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_reference_finds_the_same(kind):
    top, paths = kind(GOLDEN["top_images"]), golden_paths()
    depth, rounded = lca_depth(top, paths), lca_depth(top, paths, rounding="reference")
    np.testing.assert_allclose(depth, EXPECTED["lca_mean_unrounded_per_neuron"], rtol=0, atol=1e-12)
    assert rounded.tolist() == EXPECTED["lca_mean_rounded_per_neuron"]
    sizes = EXPECTED["group_sizes"]
    for values, name in ((depth, "depth_per_group_without_rounding"), (rounded, "depth_per_group_reference")):
        means = group_means(values, sizes, live=GOLDEN["live"])
        np.testing.assert_allclose(means, EXPECTED[name], rtol=0, atol=1e-12)  # type: ignore[arg-type]


def test_the_most_common_depth_is_that_of_the_reference_but_in_ties():
    paths = golden_paths()
    counts, mode = lca_counts(GOLDEN["top_images"], paths), lca_mode(GOLDEN["top_images"], paths)
    tied = (counts == counts.max(axis=1, keepdims=True)).sum(axis=1) > 1
    assert np.flatnonzero(tied).tolist() == [17, 23]
    assert mode[23] == 6  # 60 pairs at depth 6 and 60 at 7; the reference takes the depth that it sees first
    assert mode[~tied].tolist() == np.array(EXPECTED["lca_majority_per_neuron"])[~tied].tolist()


def shared_ranks(one: tuple[str, ...], other: tuple[str, ...]) -> int:
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))))


paths_of_images = st.lists(st.none() | st.lists(st.sampled_from("ab"), max_size=4).map(tuple), min_size=6, max_size=10)


@settings(deadline=None)
@given(paths_of_images, st.integers(0, 6))
def test_it_equals_all_pairs_of_images(paths: list[tuple[str, ...] | None], n_used: int):
    images = [*range(n_used), *[-1] * (6 - n_used)]
    found = lca_depth(np.array([images, range(6)]), paths)
    depths = [shared_ranks(a, b) for a, b in itertools.combinations(filter(lambda p: p is not None, paths[:6]), 2)]
    expected = np.mean(depths) if depths else np.nan
    np.testing.assert_allclose(found, [expected if n_used == 6 else np.nan, expected], rtol=1e-12)
    counts = np.bincount(depths, minlength=lca_counts(np.array([range(6)]), paths).shape[1])
    assert np.array_equal(lca_counts(np.array([range(6)]), paths)[0], counts)


def test_groups_without_live_neurons_have_no_mean():
    values = np.array([1.0, 2.0, np.nan, np.nan, 5.0])
    assert group_means(values, [2, 2, 1]) == [1.5, None, 5.0]
    assert group_means(values, [2, 0, 3], live=np.array([True, False, False, True, False])) == [1.0, None, None]
    with pytest.raises(UsageError, match="sum to 4, not to 5"):
        group_means(values, [2, 2])


def test_wrong_inputs_are_refused():
    with pytest.raises(UsageError, match="the image 3, but there are 2 paths"):
        lca_depth(np.array([[0, 3]]), [("a",), ("b",)])
    with pytest.raises(UsageError, match="rounding = 'up'"):
        lca_depth(np.array([[0, 1]]), [("a",), ("b",)], rounding="up")  # type: ignore[arg-type]


def test_a_taxonomy_is_read_from_csv(tmp_path: Path):
    file = tmp_path / "taxonomy.csv"
    file.write_text('\ufefflabel_name;path\ncrane;animal > bird\n"red; panda";animal>mammal\n', encoding="utf-8")
    taxonomy = read_taxonomy(str(file))
    assert taxonomy == {"crane": ("animal", "bird"), "red; panda": ("animal", "mammal")}
    assert image_paths(["crane", None, "red; panda"], taxonomy) == [("animal", "bird"), None, ("animal", "mammal")]
    with pytest.raises(UsageError, match="no path for 2 labels, 'cat' among them"):
        image_paths(["dog", "crane", "cat"], taxonomy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("label_name\ncrane\n", r"has the columns label_name; a taxonomy is CSV"),
        ("label_name,path\ncrane,a>\n", r"row 2: label_name is 'crane' and path is 'a>'"),
        ("label_name,path\ncrane\n", r"row 2: label_name is 'crane' and path is ''"),
        ("label_name,path\ncrane,a>b\ncrane,a>c\n", r"row 3: 'crane' already has a row"),
        ('label_name,path\n"crane,a>b\n', r"fix the row"),
    ],
)
def test_a_taxonomy_that_is_none_is_refused(tmp_path: Path, text: str, said: str):
    file = tmp_path / "taxonomy.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=said):
        read_taxonomy(str(file))


def test_other_names_than_inaturalists_are_refused():
    with pytest.raises(UsageError, match=r"2 labels are not named as in iNaturalist .*, 'arrow' among them; give"):
        inaturalist_taxonomy(name for name in ("0_A_B", "sports_car", "arrow"))


def test_paths_of_different_lengths_are_told(tmp_path: Path):
    with pytest.warns(UserWarning, match=r"most paths have 2 ranks, but '2_A_B_x_y' has 4 \(A > B > x > y\)"):
        inaturalist_taxonomy(["0_A_B", "1_A_C", "2_A_B_x_y"])
    file = tmp_path / "taxonomy.csv"
    file.write_text("label_name,path\na,x>y\nb,x>z\nc,x\n")
    with pytest.warns(UserWarning, match=r"taxonomy\.csv: most paths have 2 ranks, but 'c' has 1 \(x\)"):
        read_taxonomy(str(file))
