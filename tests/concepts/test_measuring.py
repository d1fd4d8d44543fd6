"""All that the stage `concepts` measures of one SAE: known answers, single functions, blocks, and what is not there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from sklearn.metrics import average_precision_score

from sae_ray.concepts import (
    Labels,
    SecondMoment,
    halves,
    label_correlation,
    label_entropy,
    lca_depth,
    q_star,
    read_concepts,
    uniqueness,
)
from sae_ray.concepts.config import Concepts, Patches
from sae_ray.concepts.findings import Findings
from sae_ray.concepts.measuring import measure
from sae_ray.concepts.neuron_measures import Leading
from sae_ray.concepts.ranking import average_precisions
from sae_ray.concepts.tables import CONCEPTS_SCHEMA, NEURONS_SCHEMA, ConceptTables
from sae_ray.concepts.word_names import Texts
from sae_ray.errors import SaeRayError
from sae_ray.sae import SAE
from sae_ray.sae.second_moment import RIDGE
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder

N, D, N_LATENTS = 600, 16, 40
CLASSES = ("apple", "bird", "cat", "dog")
ALL = Concepts(measures=(*Concepts().measures, "tpp"))


class World(NamedTuple):
    """Activations of which coordinate c is the class c, the others noise; latent j < 16 is coordinate j."""

    store: ActivationStore
    embeddings: ActivationStore
    x: np.ndarray
    classes: np.ndarray

    @property
    def labels(self) -> Labels:
        return Labels.of_classes([CLASSES[one] for one in self.classes])

    @property
    def texts(self) -> Texts:
        """A word for each class, whose embedding is that of the images of the class, and two for nothing."""
        words = [*CLASSES, "nothing", "nobody"]
        return Texts.of(words, np.eye(6, 8), self.embeddings, {name: name for name in CLASSES})


@pytest.fixture(scope="module")
def world(write_store: Callable[..., ActivationStore], tmp_path_factory: pytest.TempPathFactory) -> World:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, len(CLASSES), N)
    x = np.where(rng.random((N, D)) < 0.3, rng.random((N, D)), 0)
    x[:, : len(CLASSES)] = np.eye(len(CLASSES))[classes] * (1 + rng.random((N, 1)))
    x = x.astype(np.float32)
    unit = np.eye(8)[classes] + 0.01 * rng.normal(size=(N, 8))
    root = tmp_path_factory.mktemp("world")
    parts = [np.arange(start, min(start + 250, N)) for start in range(0, N, 250)]
    none = np.full(N, -1)
    store = write_store(root, [(part, none[part], x[part]) for part in parts])
    embeddings = write_store(root, [(part, none[part], unit[part]) for part in parts], label="embeddings")
    return World(store, embeddings, x, classes)


def sae_of(d: int = D, n_latents: int = N_LATENTS, alive: bool = True) -> SAE:
    """Latent j is coordinate j; those that are left never fire."""
    encoder = torch.eye(d, n_latents)
    bias = torch.zeros(n_latents) if alive else torch.full((n_latents,), -100.0)
    bias[d:] = -100
    decoder = torch.eye(n_latents, d)
    decoder[d:] = 1
    return SAE("relu", encoder, decoder, bias, torch.zeros(d), None, None)


def tables(found: Findings, folder) -> ConceptTables:
    found.write(Folder(folder))
    return ConceptTables(Folder(folder))


def test_latents_that_are_the_classes_are_found_named_and_told_from_chance(world: World, tmp_path):
    found = measure(sae_of(), world.store, world.labels, ALL, texts=world.texts)
    neurons, concepts = tables(found, tmp_path).neurons, tables(found, tmp_path).concepts
    of_class = slice(0, len(CLASSES))
    assert neurons.concept[of_class].tolist() == neurons.name[of_class].tolist() == list(CLASSES)
    assert (neurons.rho[of_class] > 0.9).all()
    assert (neurons.shuffled_rho[:D] < 0.25).all()
    assert (neurons.judged_rho[of_class] > 0.9).all()
    assert (neurons.average_precision[of_class] == 1).all()
    assert (neurons.purity[of_class] == 1).all()
    assert (neurons.entropy_balanced[of_class] < 1e-9).all()
    assert (neurons.entropy_balanced[len(CLASSES) : D] > 0.9).all()
    for column in (concepts.neuron, concepts.probe_neuron, concepts.fms_neuron):
        assert column.tolist() == list(range(len(CLASSES)))
    for score, chance, least, most in (
        (concepts.rho, concepts.shuffled_rho, 0.9, 0.25),
        (concepts.average_precision, concepts.shuffled_average_precision, 0.999, 0.5),
        (concepts.probe_r, concepts.shuffled_probe_r, 0.9, 0.1),
        (concepts.sparse_1, concepts.shuffled_sparse_1, 0.99, 0.65),
        (concepts.fms_1, concepts.shuffled_fms_1, 0.75, 0.5),
    ):
        assert (score >= least).all()
        assert (chance <= most).all()
    assert concepts.n_images.tolist() == np.bincount(world.classes).tolist()
    counts = found.counts
    assert counts["n_live"] == D
    assert counts["n_found_concepts"] == len(CLASSES)
    assert counts["shuffled"]["n_found_concepts"] == 0
    assert (counts["pure"], counts["names_right"]) == (len(CLASSES), 1)
    assert counts["tpp"][0] > 0.4
    assert counts["coherence"] == 0  # among the latents that fire, which are orthogonal
    assert np.isnan(neurons.coherence[D:]).all()
    assert (neurons.coherence_aip[:D] > 0).all()


def test_the_columns_are_those_of_the_single_functions(world: World, tmp_path):
    labels = world.labels
    found = tables(measure(sae_of(), world.store, labels, Concepts(), seed=3), tmp_path)
    codes = np.pad(world.x, ((0, 0), (0, N_LATENTS - D))).astype(float)
    rho = label_correlation(codes, labels)
    np.testing.assert_allclose(found.neurons.rho[:D], rho[:D].max(axis=1), rtol=1e-9)
    np.testing.assert_allclose(found.neurons.entropy_balanced, label_entropy(codes, labels), rtol=1e-9, atol=1e-12)
    top = np.argsort(-codes, axis=0, kind="stable")[:16].T
    top[D:] = -1
    assert measure(sae_of(), world.store, labels, Concepts()).counts["overlap_counts"] == (
        uniqueness(top).counts.tolist()
    )
    for concept in range(len(CLASSES)):
        listed = found.correlations.concept == CLASSES[concept]
        order = np.argsort(-rho[:D, concept], kind="stable")
        assert found.correlations.neuron[listed].tolist() == order.tolist()
    split = halves(labels, 3)
    fitted, judged = (label_correlation(codes[half], labels.take(half)) for half in split)
    best = fitted[:D].argmax(axis=0)
    assert found.concepts.neuron.tolist() == best.tolist()
    np.testing.assert_allclose(found.concepts.rho, judged[best, np.arange(len(CLASSES))], rtol=1e-9)


def test_average_precisions_are_scikit_learns():
    rng = np.random.default_rng(1)
    codes = np.round(rng.normal(size=(80, 12)), 1) * (rng.random((80, 12)) < 0.5)  # ties, zeros, values below 0
    known = rng.random((80, 3)) < 0.8
    shown = (rng.random((80, 3)) < 0.3).astype(float)
    concept = rng.integers(-1, 3, 12)
    for values in (shown, np.where(known, shown, np.nan)):
        found = average_precisions(codes, Labels.of(values), concept)
        for latent, one in enumerate(concept):
            rows = ~np.isnan(values[:, one])
            expected = average_precision_score(values[rows, one], codes[rows, latent]) if one >= 0 else np.nan
            np.testing.assert_allclose(found[latent], expected, rtol=1e-12)


def equal(one: Findings, other: Findings) -> bool:
    """Bit by bit."""
    columns = [(a, b) for name in ("neurons", "concepts", "correlations") for a, b in
               zip(getattr(one, name).values(), getattr(other, name).values(), strict=True)]  # fmt: skip
    same = all(np.array_equal(np.asarray(a), np.asarray(b), equal_nan=np.asarray(a).dtype.kind == "f")
               for a, b in columns)  # fmt: skip
    return same and str(one.counts) == str(other.counts) and all(
        a.equals(b) for a, b in zip(one.names, other.names, strict=True)
    )  # fmt: skip


def test_blocks_of_neurons_and_words_change_nothing(world: World, monkeypatch: pytest.MonkeyPatch):
    whole = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts)
    monkeypatch.setattr("sae_ray.scores.statistics.BLOCK_BYTES", 7 * 8 * len(CLASSES))
    blocks = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts)
    assert equal(whole, blocks)
    monkeypatch.setattr("sae_ray.concepts.neuron_measures.BLOCK_ENTRIES", 300)
    smaller = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts)
    assert equal(whole, smaller)
    monkeypatch.setattr("sae_ray.concepts.word_names._BLOCK_NUMBERS", 2 * N)
    words = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts)
    np.testing.assert_allclose(words.neurons["name_score"], whole.neurons["name_score"], atol=1e-9)
    assert words.neurons["name"].tolist() == whole.neurons["name"].tolist()


@given(
    arrays.arrays(
        "float64", st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.sampled_from([-np.inf, 0, 1])
    ),
    st.integers(1, 14),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_the_first_neurons_of_a_concept_are_the_same_in_any_blocks(values: np.ndarray, n: int, cuts: list[int]):
    """Most of the values are tied."""
    bounds = [0, *sorted(cut for cut in cuts if cut < len(values)), len(values)]
    blocks = [range(*pair) for pair in pairwise(bounds)]
    found = Leading.merged([Leading.of(values[one.start : one.stop], n, one.start) for one in blocks], n)
    for concept, column in enumerate(values.T):
        order = [neuron for neuron in np.argsort(-column, kind="stable")[:n].tolist() if np.isfinite(column[neuron])]
        assert found.neuron[concept][: len(order)].tolist() == order
        assert (found.neuron[concept][len(order) :] == -1).all()
        assert found.value[concept][: len(order)].tolist() == column[order].tolist()


@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_all_that_is_measured_is_the_same_in_any_shards(data: st.DataObject, write_store, tmp_path_factory):
    """Images in parts, and neurons in blocks, of any sizes. Activations are few sixteenths, so that many values are
    tied and sums are exact."""
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    n, d = 90, 4
    x = (rng.integers(0, 3, (n, d)) / 16).astype(np.float32)
    labels = Labels.of((rng.random((n, 3)) < 0.4).astype(float), ["a", "b", "c"])
    sae = SAE("relu", torch.eye(d, 7).roll(1, 1), torch.eye(7, d), torch.zeros(7), torch.zeros(d), None, None)
    asked = Concepts(max_concepts=2)

    def of_shards(cuts: list[int], block_bytes: int, block_entries: int) -> Findings:
        parts = [part for part in np.split(np.arange(n), cuts) if len(part)]
        store = write_store(
            tmp_path_factory.mktemp("store"), [(part, np.full(len(part), -1), x[part]) for part in parts]
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("sae_ray.scores.statistics.BLOCK_BYTES", block_bytes)
            patched.setattr("sae_ray.concepts.neuron_measures.BLOCK_ENTRIES", block_entries)
            return measure(sae, store, labels, asked)

    cuts = sorted(data.draw(st.lists(st.integers(1, n - 1), max_size=5)))
    sharded = of_shards(
        cuts, data.draw(st.sampled_from([24, 24 * 3, 2**20])), data.draw(st.sampled_from([1, 60, 2**20]))
    )
    assert equal(of_shards([], 2**26, 2**22), sharded)


def test_raw_neurons_and_images_without_labels(world: World, tmp_path):
    found = measure(None, world.store, None, ALL, texts=world.texts)
    there = tables(found, tmp_path)
    assert there.neurons.name[: len(CLASSES)].tolist() == list(CLASSES)
    assert np.isnan(there.neurons.rho).all()
    assert set(there.neurons.concept) == {None}
    assert (there.neurons.n_firing == -1).all()
    assert len(there.concepts.concept) == len(there.correlations.concept) == 0
    assert "rho" not in found.counts
    labelled = measure(None, world.store, world.labels, ALL)
    assert np.isnan(tables(labelled, tmp_path / "labelled").neurons.coherence).all(), "raw neurons have no decoder"
    assert (labelled.neurons["rho"][: len(CLASSES)] > 0.9).all()


def test_one_class_and_rare_ones_are_no_concepts(world: World):
    assert measure(sae_of(), world.store, Labels.of_classes(["all"] * N), Concepts()).concepts == {}
    rare = Labels.of_classes([CLASSES[one] if row >= 9 else "rare" for row, one in enumerate(world.classes)])
    found = measure(sae_of(), world.store, rare, Concepts())
    assert found.concepts["concept"] == CLASSES
    assert found.concepts["n_known"].tolist() == [N] * len(CLASSES), "images of a rare class are known not to show them"


def test_neurons_of_few_images_do_not_raise_the_purity(world: World):
    """Latents 4 to 15 of another SAE fire on the largest 3 of the 600 images."""
    rare = sae_of()
    rare.b_enc[len(CLASSES) : D] = -torch.tensor(np.sort(world.x[:, len(CLASSES) : D], axis=0)[-4])
    common, few = (measure(sae, world.store, world.labels, Concepts()) for sae in (sae_of(), rare))
    assert few.neurons["n_firing"][len(CLASSES) : D].tolist() == [3] * 12
    purity = few.neurons["purity"][len(CLASSES) : D]
    assert (purity >= 1 / 3).all()
    assert few.counts["purity"] == pytest.approx((len(CLASSES) + purity.sum()) / D)
    assert few.counts["purity_16"] == 1 > common.counts["purity_16"] == common.counts["purity"]
    assert few.counts["shuffled"]["purity"] > few.counts["shuffled"]["purity_16"]


def test_a_dead_sae_has_no_scores(world: World, tmp_path):
    found = measure(sae_of(alive=False), world.store, world.labels, ALL, texts=world.texts)
    there = tables(found, tmp_path)
    assert found.counts["n_live"] == 0
    for column in ("rho", "entropy_balanced", "purity", "overlap", "coherence", "name_score"):
        assert np.isnan(getattr(there.neurons, column)).all()
    assert set(there.neurons.name) == {None}
    assert (there.concepts.neuron == -1).all()
    assert np.isnan(there.concepts.rho).all()
    assert (there.concepts.n_images > 0).all()


def test_an_image_may_show_two_concepts_and_some_are_unknown(world: World):
    """Coordinates 0 and 1 are made concepts of their own, with an image in five unknown of the second."""
    shown = np.stack([world.classes == 0, (world.classes == 0) | (world.classes == 1)], axis=1).astype(float)
    shown[np.arange(N) % 5 == 0, 1] = np.nan
    labels = Labels.of(shown, ["apple", "fruit or bird"])
    found = measure(sae_of(), world.store, labels, Concepts())
    assert found.concepts["neuron"][0] == 0
    assert found.concepts["neuron"][1] in (0, 1)
    assert found.neurons["concept"][:2].tolist() == ["apple", "fruit or bird"]
    assert found.neurons["purity"][0] == 1
    assert found.concepts["n_known"].tolist() == [N, N - N // 5]
    assert (found.concepts["rho"] > 0.5).all()


def test_many_classes_cost_no_matrix_and_only_some_are_drawn(world: World):
    labels = Labels.of_classes([f"class {row % 50}" for row in range(N)])  # 12 images each
    found = measure(sae_of(), world.store, labels, Concepts(max_concepts=5), seed=1)
    assert len(found.concepts["concept"]) == 50
    assert np.isfinite(found.concepts["rho"]).all()
    drawn = found.concepts["n_rows"] >= 0
    assert drawn.sum() == 5
    assert np.isfinite(found.concepts["fms_1"]).tolist() == drawn.tolist()
    others = measure(sae_of(), world.store, labels, Concepts(max_concepts=5), seed=2)
    assert (others.concepts["n_rows"] >= 0).tolist() != drawn.tolist()


PATHS = {"apple": ("plant", "fruit", "apple"), "bird": ("animal", "bird", "bird"), "cat": ("animal", "mammal", "cat"),
         "dog": ("animal", "mammal", "dog")}  # fmt: skip


def test_classes_meet_at_the_bottom_of_a_taxonomy_and_other_latents_above(world: World, tmp_path):
    paths = [PATHS[CLASSES[one]] for one in world.classes]
    found = measure(sae_of(), world.store, None, Concepts(), paths=paths, group_sizes=[len(CLASSES), 12, 24])
    there = tables(found, tmp_path).hierarchy
    assert there is not None
    assert (there.lca_mean[: len(CLASSES)] == 3).all()
    assert (there.lca_mode[: len(CLASSES)] == 3).all()
    codes = np.pad(world.x, ((0, 0), (0, N_LATENTS - D))).astype(float)
    top = np.argsort(-codes, axis=0, kind="stable")[:16].T
    np.testing.assert_array_equal(there.lca_mean[:D], lca_depth(top, paths)[:D])
    assert np.isnan(there.lca_mean[D:]).all()
    assert (there.lca_mode[D:] == -1).all()
    assert there.group.tolist() == [0] * 4 + [1] * 12 + [2] * 24
    assert found.counts["depths"] == [3.0, pytest.approx(there.lca_mean[4:16].mean()), None]
    assert found.counts["depth"] == pytest.approx(there.lca_mean[:D].mean())
    assert 0.5 < found.counts["depths"][1] < 2


def test_images_without_a_path_have_no_depth(world: World, tmp_path):
    paths = [None if CLASSES[one] == "dog" else PATHS[CLASSES[one]] for one in world.classes]
    found = measure(None, world.store, None, Concepts(), paths=paths)
    depth = found.hierarchy["lca_mean"]
    assert np.isnan(depth).tolist() == [False] * 3 + [True] + [False] * 12
    assert found.counts["depths"] == [pytest.approx(np.nanmean(depth))], "raw neurons have one level"
    without = measure(None, world.store, None, Concepts())
    assert tables(without, tmp_path).hierarchy is None
    assert "depths" not in without.counts
    assert np.isnan(tables(without, tmp_path).score("lca_mean")).all()


def test_q_star_comes_with_that_of_other_ridges(world: World):
    counts = measure(sae_of(), world.store, None, Concepts()).counts
    l0 = (world.x > 0).sum(axis=1)
    moment = SecondMoment(D)
    moment.add(world.x)
    for key, ridge in (
        ("q_star_tenth_ridge", RIDGE / 10),
        ("q_star_atom", RIDGE),
        ("q_star_tenfold_ridge", RIDGE * 10),
    ):
        expected = q_star(np.eye(D), moment.matrix(), l0, ridge=ridge).atom
        assert counts[key] == expected
    assert counts["moment_rows"] == N


def test_names_rest_on_no_image_that_is_judged(world: World):
    found = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts)
    split = halves(world.labels, 0)
    firing = (world.x[split.fitted, 0] > 0).sum()
    assert found.neurons["name_images"][0] == min(firing, 100)


def test_a_concept_file_may_give_an_image_two_concepts(world: World, tmp_path):
    ids = [f"{row:03}.png" for row in range(N)]
    rows = [f"{name},{int(one == 0)},{int(one in (0, 1))}," for name, one in zip(ids, world.classes, strict=True)]
    (tmp_path / "concepts.csv").write_text("\n".join(["image_id,apple,edible,unknown", *rows]))
    labels = read_concepts(str(tmp_path / "concepts.csv"), Folder(tmp_path), ids)
    found = measure(sae_of(), world.store, labels, Concepts())
    assert list(found.concepts["concept"]) == ["apple", "edible"], "nothing is known of the third"
    assert found.concepts["n_images"].tolist() == [(world.classes == 0).sum(), (world.classes < 2).sum()]
    assert found.neurons["concept"][0] == "apple"
    assert found.neurons["concept"][1] == "edible"
    assert found.neurons["rho"][0] > 0.9 > found.neurons["rho"][1] > 0.3


def test_ten_thousand_classes_are_measured_without_a_matrix_of_images_and_classes(write_store, tmp_path):
    """Latent 0 is the last class; 100,000 images x 10,000 classes would take 8 GB."""
    n, n_classes, d = 100_000, 10_000, 4
    classes = np.arange(n) % n_classes
    rng = np.random.default_rng(0)
    x = np.where(rng.random((n, d)) < 0.01, rng.random((n, d)), 0).astype(np.float32)
    x[:, 0] = classes == n_classes - 1
    store = write_store(tmp_path, [(np.arange(n), np.full(n, -1), x)])
    asked = Concepts(measures=("labels", "probes", "sparse_probing", "fms"), max_concepts=2)
    found = measure(sae_of(d, d), store, Labels.of_classes([f"{one:05}" for one in classes]), asked)
    assert len(found.concepts["concept"]) == n_classes
    assert found.neurons["concept"][0] == f"{n_classes - 1:05}"
    assert found.neurons["rho"][0] == pytest.approx(1)
    assert found.concepts["neuron"][-1] == 0
    assert found.concepts["rho"][-1] == pytest.approx(1)
    assert found.neurons["entropy_balanced"][0] == pytest.approx(0, abs=1e-12)
    assert found.counts["n_found_concepts"] == 1
    assert (found.concepts["n_rows"] >= 0).sum() == 2


def test_names_of_other_images_are_refused(world: World, write_store, tmp_path):
    other = write_store(tmp_path, [(np.arange(5), np.full(5, -1), np.eye(5, 8))])
    texts = Texts.of(["a", "b"], np.eye(2, 8), other, {})
    with pytest.raises(SaeRayError, match="are of other images than the activations"):
        measure(sae_of(), world.store, None, Concepts(), texts=texts)


def test_maps_that_hang_together_are_told_from_noise(write_store, tmp_path):
    """Coordinate 0 marks the left half of 4 × 4 patches, coordinate 1 a chequerboard, coordinate 2 the whole image."""
    n, side = 30, 4
    row, column = np.divmod(np.arange(side * side), side)
    maps = np.stack([column < 2, (row + column) % 2 == 0, np.ones(16), np.zeros(16)], axis=1).astype(np.float32)
    image, token = np.repeat(np.arange(n), 17), np.tile(np.arange(17), n)  # the first token is no patch
    x = np.tile(np.concatenate([np.zeros((1, 4), np.float32), maps]), (n, 1)) * (1 + image[:, None])
    store = write_store(tmp_path, [(image, token, x.astype(np.float32))])
    for sae in (sae_of(4, 4), None):
        spatial = measure(sae, store, None, Concepts(), patches=Patches(side, side, 1)).neurons["spatial"]
        assert spatial[0] > 0.6
        assert spatial[1] == -1
        assert np.isnan(spatial[2:]).all()


def test_latents_that_another_seed_finds_again_are_stable(world: World):
    """The other SAE has all directions but one, in another order and with other signs for none."""
    others = np.random.default_rng(0).permutation(np.eye(D)[1:])
    found = measure(sae_of(), world.store, None, Concepts(), counterpart=others)
    assert np.isnan(found.neurons["stability"]).sum() == 1 + N_LATENTS - D
    np.testing.assert_allclose(found.neurons["stability"][1:D], 1)
    assert found.counts["stability"] == pytest.approx(1)
    assert found.counts["stability_random"] < 0.8


def test_every_column_is_written(world: World):
    counterpart = np.eye(D)
    found = measure(sae_of(), world.store, world.labels, Concepts(), texts=world.texts, counterpart=counterpart)
    assert set(found.neurons) == set(NEURONS_SCHEMA.names) - {"spatial"}, "which needs patches"
    assert set(found.concepts) == set(CONCEPTS_SCHEMA.names)
