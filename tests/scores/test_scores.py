"""Scores of an SAE on images: sparse and block by block, yet equal to the dense computation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.sae import SAE, SparseCodes
from sae_ray.scores.scoring import image_blocks, majority, n_neurons, read_block, score_store
from sae_ray.scores.statistics import (
    HISTOGRAM_EDGES,
    BlockImages,
    Entries,
    NeuronStats,
    monosemanticity,
    neuron_blocks,
    pool_codes,
    pool_dense,
    pool_tokens,
)
from sae_ray.scores.tables import histogram_table, score_table, top_images_table
from sae_ray.store.activations import ActivationStore

WriteStore = Callable[..., ActivationStore]
D, JUDGE_WIDTH, D_SAE = 6, 5, 12


def make_sae(d_in: int = D, seed: int = 0) -> SAE:
    """Thirteen in a hundred latents fire; latent 0 never does."""
    generator = torch.Generator().manual_seed(seed)
    b_enc = torch.full((D_SAE,), -1.0)
    b_enc[0] = -1e9
    return SAE(
        "batch_topk",
        W_enc=torch.randn(d_in, D_SAE, generator=generator),
        W_dec=torch.randn(D_SAE, d_in, generator=generator),
        b_enc=b_enc,
        b_dec=torch.randn(d_in, generator=generator),
        threshold=torch.full((D_SAE,), 1.0),
        k=2,
    )


def make_parts(sizes: list[int], n_tokens: int, d: int, seed: int = 0, skipped: tuple[int, ...] = ()) -> list:
    """Parts of as many images; the images `skipped` were rejected."""
    rng = np.random.default_rng(seed)
    parts = []
    first = 0
    for size in sizes:
        images = np.array([image for image in range(first, first + size) if image not in skipped], dtype=int)
        token = np.tile(np.arange(n_tokens) if n_tokens > 1 else [-1], len(images))
        activation = rng.normal(size=(len(images) * n_tokens, d)).astype("float32")
        parts.append((np.repeat(images, n_tokens), token, activation))
        first += size
    return parts


def dense_values(sae: SAE | None, parts: list, n_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Image index, and per image and neuron the mean and the largest of its tokens' codes."""
    activation = np.concatenate([part[2] for part in parts])
    codes = activation if sae is None else sae.encode(torch.from_numpy(activation)).numpy()
    codes = codes.reshape(-1, n_tokens, codes.shape[1]).astype("float64")
    return np.unique(np.concatenate([part[0] for part in parts])), codes.mean(axis=1), codes.max(axis=1)


def double_loop(values: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    similarity = np.triu(unit @ unit.T, k=1)
    scores = []
    for column in values.T:
        shifted = column - column.min()
        pairs = np.triu(np.outer(shifted, shifted), k=1)
        scores.append((pairs * similarity).sum() / pairs.sum() if (shifted > 0).sum() >= 2 else np.nan)
    return np.array(scores)


def top_images(values: np.ndarray, image_index: np.ndarray, n_top: int) -> list[list[tuple[int, float]]]:
    """Per neuron the images that are not 0, by falling value and rising index."""
    ranked = []
    for column in values.T:
        order = sorted(np.flatnonzero(column), key=lambda image: (-column[image], image_index[image]))[:n_top]
        ranked.append([(int(image_index[image]), column[image]) for image in order])
    return ranked


def entries_of(values: np.ndarray) -> Entries:
    """The sparse form of one value per image and neuron."""
    neuron, image = np.nonzero(values.T)
    return Entries(image, neuron, values[image, neuron], values[image, neuron])


def statistics(
    values: np.ndarray,
    image_index: np.ndarray,
    embeddings: np.ndarray | None,
    n_top: int,
    blocks: Sequence[slice] = (slice(None),),
) -> NeuronStats:
    """Of one value per image and neuron, the blocks of images added one after the other."""
    stats = NeuronStats(values.shape[1], 0 if embeddings is None else embeddings.shape[1], n_top)
    for rows in blocks:
        if embeddings is None:
            images = BlockImages.unjudged(image_index[rows])
        else:
            images = BlockImages.of(image_index[rows], embeddings[rows])
        stats.add(entries_of(values[rows]), images)
    return stats


def check_equal(stats: list[NeuronStats], image_index, mean, largest, embeddings, n_top: int) -> None:
    """The tables against the dense computation."""
    table = {name: column.to_numpy() for name, column in zip(*_columns(score_table(stats)), strict=True)}
    np.testing.assert_array_equal(table["neuron"], np.arange(mean.shape[1]))
    np.testing.assert_array_equal(table["n_active"], (mean > mean.min(axis=0)).sum(axis=0))
    np.testing.assert_array_equal(table["n_firing"], (mean > 0).sum(axis=0))
    np.testing.assert_array_equal(table["frequency"], (mean > 0).mean(axis=0))
    np.testing.assert_allclose(table["ms"], double_loop(mean, embeddings), atol=1e-6)
    np.testing.assert_allclose(table["mean"], mean.mean(axis=0), atol=1e-6)
    firing = np.where(mean > 0, mean, 0).sum(axis=0) / np.maximum((mean > 0).sum(axis=0), 1)
    np.testing.assert_allclose(table["mean_active"], firing, atol=1e-6)
    np.testing.assert_allclose(table["max_image"], mean.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(table["max_token"], largest.max(axis=0), atol=1e-6)

    found: list[list[tuple[int, float]]] = [[] for _ in range(mean.shape[1])]
    for row in top_images_table(stats).to_pylist():
        assert row["rank"] == len(found[row["neuron"]])
        found[row["neuron"]].append((row["image_index"], row["activation"]))
    for mine, expected in zip(found, top_images(mean, image_index, n_top), strict=True):
        assert [image for image, _ in mine] == [image for image, _ in expected]
        np.testing.assert_allclose([value for _, value in mine], [value for _, value in expected], atol=1e-6)

    bins = [(row["neuron"], row["low"], row["high"], row["n_images"]) for row in histogram_table(stats).to_pylist()]
    edges = HISTOGRAM_EDGES.tolist()
    assert bins == [
        (neuron, low, high, count)
        for neuron, column in enumerate(mean.T)
        for low, high in pairwise(edges)
        if (count := ((column >= low) & (column < high)).sum())
    ]


def _columns(table) -> tuple[list[str], list]:
    return table.column_names, table.columns


@given(st.data())
def test_tokens_are_pooled_to_means_and_maxima_of_codes(data: st.DataObject):
    tokens_per_image = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    row_image = np.repeat(np.arange(len(tokens_per_image)), tokens_per_image)
    values = st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5]) | st.floats(-10, 10)
    codes = data.draw(arrays.arrays("float64", (len(row_image), 3), elements=values))
    row, neuron = np.nonzero(codes)
    shuffled = np.array(data.draw(st.permutations(range(len(row)))), dtype=int)
    row, neuron = row[shuffled], neuron[shuffled]
    entries = pool_tokens(row_image, row, neuron, codes[row, neuron])

    per_image = [codes[row_image == image] for image in range(len(tokens_per_image))]
    pairs = [(k, image) for k in range(3) for image, rows in enumerate(per_image) if rows[:, k].any()]
    assert list(zip(entries.neuron.tolist(), entries.image.tolist(), strict=True)) == pairs
    np.testing.assert_allclose(entries.value, [per_image[image][:, k].mean() for k, image in pairs], atol=1e-12)
    assert entries.token_max.tolist() == [per_image[image][:, k].max() for k, image in pairs]
    dense = pool_dense(row_image, codes)
    for name in ("image", "neuron", "token_max"):
        np.testing.assert_array_equal(getattr(dense, name), getattr(entries, name))
    np.testing.assert_allclose(dense.value, entries.value, atol=1e-12)


@pytest.mark.parametrize("silent", [0.0, 0.5, 0.98, 1.0])
def test_codes_are_pooled_where_they_are_to_the_same_bits(device: str, silent: float):
    """Of values so far apart that the order of a sum shows; images without codes, and none at all."""
    dice = np.random.default_rng(0)
    for n_images in (1, 7, 30):
        row_image = np.repeat(np.arange(n_images), dice.integers(1, 100, n_images))
        dense = np.exp(15 * dice.standard_normal((len(row_image), 3))).astype(np.float32)
        dense[dice.random(dense.shape) < silent] = 0
        row, neuron = np.nonzero(dense)
        columns = (torch.from_numpy(column).to(device) for column in (row, neuron, dense[row, neuron]))
        found = pool_codes(row_image, SparseCodes(*columns, len(dense), 3))
        expected = pool_tokens(row_image, row, neuron, dense[row, neuron])
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@given(st.data())
def test_statistics_of_any_split_equal_those_of_one_block(data: st.DataObject):
    n = data.draw(st.integers(2, 12))
    # Few values, so that ties are common; zeros, and negative ones as raw neurons have.
    kind = data.draw(st.sampled_from([[0.0, 0.0, 0.0, 1.0, 2.0], [-2.0, -1.0, 0.0, 1.0, 3.0], [-3.0, -2.0, -1.0]]))
    values = data.draw(arrays.arrays("float64", (n, 3), elements=st.sampled_from(kind)))
    embeddings = data.draw(arrays.arrays("float64", (n, 2), elements=st.sampled_from([-2.0, 0.5, 1.0, 3.0])))
    image_index = np.cumsum(data.draw(arrays.arrays("int64", n, elements=st.integers(1, 5))))
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))  # blocks of rejects alone are empty
    blocks = [slice(*bounds) for bounds in zip([0, *cuts], [*cuts, n], strict=True)]

    whole = statistics(values, image_index, embeddings, 3)
    split = statistics(values, image_index, embeddings, 3, blocks)
    np.testing.assert_array_equal(split.n_active, whole.n_active)
    np.testing.assert_array_equal(split.n_firing, whole.n_firing)
    np.testing.assert_array_equal(split.top_image, whole.top_image)
    np.testing.assert_array_equal(split.top_value, whole.top_value)
    np.testing.assert_array_equal(split.histogram, whole.histogram)
    np.testing.assert_allclose(split.monosemanticity(), whole.monosemanticity(), atol=1e-6)
    check_equal([split], image_index, values, values, embeddings, n_top=3)


def test_ties_go_to_the_lower_image_whichever_block_it_is_in():
    values = np.array([[1.0], [2.0], [2.0], [0.0], [2.0], [1.0]])
    stats = statistics(values, 10 + np.arange(6), None, 4, (slice(0, 2), slice(2, 5), slice(5, 6)))
    assert stats.top_image.tolist() == [[11, 12, 14, 10]]
    assert stats.top_value.tolist() == [[2.0, 2.0, 2.0, 1.0]]


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("raw", [False, True], ids=["SAE", "raw neurons"])
def test_a_store_is_scored_like_the_dense_computation(
    tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch, device: str, raw: bool, n_tokens: int
):
    sizes, skipped = [8, 8, 8, 8, 5], (0, 9, *range(16, 24))  # the third part has rejects alone
    sae = None if raw else make_sae()
    parts = make_parts(sizes, n_tokens, D, skipped=skipped)
    judged = make_parts(sizes, 1, JUDGE_WIDTH, seed=1, skipped=skipped)
    store = write_store(tmp_path, parts, images_per_part=8)
    embeddings = write_store(tmp_path, judged, images_per_part=8, label="embeddings")
    dense = dense_values(sae, parts, n_tokens)
    expected = (*dense, np.concatenate([part[2] for part in judged]))
    sae = sae and sae.to(device)

    [whole] = image_blocks(store)
    assert [part for part, _ in whole] == [0, 1, 2, 3, 4]
    one_block = score_store(sae, store, embeddings, n_top=4)
    assert len(one_block) == 1
    check_equal(one_block, *expected, n_top=4)

    monkeypatch.setattr("sae_ray.scores.scoring.IMAGES_PER_BLOCK", 17)  # two parts of eight
    assert [[part for part, _ in block] for block in image_blocks(store)] == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr("sae_ray.scores.statistics.BLOCK_BYTES", 8 * JUDGE_WIDTH * 5)  # five neurons
    several = score_store(sae, store, embeddings, n_top=4)
    assert len(several) == -(-n_neurons(sae, store) // 5)
    check_equal(several, *expected, n_top=4)
    assert top_images_table(several).equals(top_images_table(one_block))
    assert histogram_table(several).equals(histogram_table(one_block))

    monkeypatch.setattr("sae_ray.store.activations.PIECE_BYTES", 3 * n_tokens * D * 4)  # three images
    monkeypatch.setattr("sae_ray.scores.scoring.PIECE_BYTES", 3 * n_tokens * D * 4)
    assert [len(block) for block in image_blocks(store)] == [1] * (3 + 3 + 1 + 3 + 2)
    in_pieces = score_store(sae, store, embeddings, n_top=4)
    check_equal(in_pieces, *expected, n_top=4)
    for name in ("neuron", "rank", "image_index"):  # products of fewer rows round differently
        assert top_images_table(in_pieces)[name].equals(top_images_table(one_block)[name])


def test_a_block_is_read_once_for_all_saes(tmp_path: Path, write_store: WriteStore, monkeypatch: pytest.MonkeyPatch):
    store = write_store(tmp_path, make_parts([8, 8], 3, D), "float16", images_per_part=8)
    saes = [make_sae(seed=1), None, make_sae(seed=2)]
    [block] = image_blocks(store)
    alone = [read_block([sae], store, None, block)[1][0] for sae in saes]
    read, original = [], ActivationStore.read

    def counted(self: ActivationStore, number: int, images: range | None = None):
        read.append(number)
        return original(self, number, images)

    monkeypatch.setattr(ActivationStore, "read", counted)
    _, together = read_block(saes, store, None, block)
    assert read == [0, 1]
    for ours, theirs in zip(together, alone, strict=True):
        for column, other in zip(chain(*ours), chain(*theirs), strict=True):
            np.testing.assert_array_equal(column, other)


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_a_gpu_scores_the_same_every_time(tmp_path: Path, write_store: WriteStore, architecture: str):
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(64, 512, generator=generator) / 8
    threshold = torch.ones(512) if architecture == "jumprelu" else None
    sae = SAE(architecture, W_enc, W_enc.T.contiguous(), torch.zeros(512), torch.zeros(64), threshold, k=8).to("cuda")
    store = write_store(tmp_path, make_parts([64] * 4, 3, 64), "float16", images_per_part=64)
    embeddings = write_store(tmp_path, make_parts([64] * 4, 1, JUDGE_WIDTH, seed=1), label="embeddings")
    once, again = (score_store(sae, store, embeddings, n_top=4) for _ in range(2))
    for table in (score_table, top_images_table, histogram_table):
        for column, other in zip(table(once).columns, table(again).columns, strict=True):
            np.testing.assert_array_equal(column.to_numpy(), other.to_numpy())
    assert score_table(once)["n_firing"].to_numpy().sum() > 4000


def test_every_firing_image_is_in_a_bin_however_far_out_it_lies():
    values = np.array([[0.0], [-1.0], [1e-30], [2.0**-16], [1.0], [1.4], [1.5], [2.0**16], [1e30]])
    stats = statistics(values, np.arange(9), None, 1)
    first, octave = 2.0**-16, 2**0.5
    assert [list(row.values())[1:] for row in histogram_table([stats]).to_pylist()] == [
        [first, pytest.approx(first * octave), 2],
        [1.0, pytest.approx(octave), 2],
        [pytest.approx(octave), 2.0, 1],
        [pytest.approx(2.0**16 / octave), 2.0**16, 2],
    ]
    assert stats.histogram.sum() == stats.n_firing[0] == 7


def test_a_dead_latent_has_no_score(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, make_parts([20], 1, D))
    embeddings = write_store(tmp_path, make_parts([20], 1, JUDGE_WIDTH), label="embeddings")
    stats = score_store(make_sae(), store, embeddings, n_top=4)
    dead = score_table(stats).slice(0, 1).to_pylist()[0]
    assert np.isnan(dead.pop("ms"))
    assert set(dead.values()) == {0}
    assert 0 not in top_images_table(stats)["neuron"].to_pylist()
    assert 0 not in histogram_table(stats)["neuron"].to_pylist()
    assert len(set(top_images_table(stats)["neuron"].to_pylist())) > 5


def test_a_pass_for_pictures_needs_no_judge(tmp_path: Path, write_store: WriteStore):
    parts = make_parts([20], 2, D)
    store = write_store(tmp_path, parts)
    stats = score_store(make_sae(), store, None, n_top=4)
    image_index, mean, _ = dense_values(make_sae(), parts, 2)
    assert np.isnan(score_table(stats)["ms"].to_numpy()).all()
    assert score_table(stats)["n_firing"].to_pylist() == (mean > 0).sum(axis=0).tolist()
    found = [row["image_index"] for row in top_images_table(stats).to_pylist()]
    assert found == [image for ranked in top_images(mean, image_index, 4) for image, _ in ranked]


@pytest.mark.parametrize(
    "judged",
    [
        make_parts([4, 4], 1, JUDGE_WIDTH, skipped=(1,)),  # another image was rejected
        make_parts([4], 1, JUDGE_WIDTH),  # fewer images
        make_parts([4, 4, 4], 1, JUDGE_WIDTH),  # more images
        make_parts([5, 3], 1, JUDGE_WIDTH),  # other parts
    ],
    ids=["other images", "fewer", "more", "other parts"],
)
def test_embeddings_of_other_images_are_refused(tmp_path: Path, write_store: WriteStore, judged: list):
    store = write_store(tmp_path, make_parts([4, 4], 2, D))
    embeddings = write_store(tmp_path, judged, label="embeddings")
    with pytest.raises(SaeRayError, match="do not contain the same images") as raised:
        score_store(make_sae(), store, embeddings, n_top=4)
    assert str(store.folder) in str(raised.value)
    assert str(embeddings.folder) in str(raised.value)


def test_an_embedding_of_length_zero_is_refused_by_the_pass_and_by_the_function(
    tmp_path: Path, write_store: WriteStore
):
    parts, judged = make_parts([8, 8], 1, D), make_parts([8, 8], 1, JUDGE_WIDTH, seed=1)
    judged[1][2][3] *= 1e-30  # short, but with a direction
    store = write_store(tmp_path, parts)
    _, codes, _ = dense_values(None, parts, 1)

    def both(label: str) -> list[Callable[[], np.ndarray]]:
        embeddings = write_store(tmp_path, judged, label=label)
        dense = torch.from_numpy(np.concatenate([part[2] for part in judged]))
        return [
            lambda: score_store(None, store, embeddings, n_top=4)[0].monosemanticity(),
            lambda: monosemanticity(torch.from_numpy(codes), dense).numpy(),
        ]

    of_pass, of_function = (scores() for scores in both("short"))
    np.testing.assert_allclose(of_pass, of_function, atol=1e-12)
    assert np.isfinite(of_pass).all()
    judged[1][2][3] = 0
    for scores, judge in zip(both("zero"), (r"\(embeddings in .*zero-.*\) ", ""), strict=True):
        with pytest.raises(SaeRayError, match=rf"^the judge {judge}gives the image with image_index 11 an embedding"):
            scores()


def test_an_sae_of_another_width_is_refused(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, make_parts([4], 1, D))
    for refused in (
        lambda: n_neurons(make_sae(d_in=7), store),
        lambda: score_store(make_sae(d_in=7), store, None, n_top=4),
    ):
        with pytest.raises(UsageError, match=r"width 7, .* has width 6; choose the site it was trained on"):
            refused()
    assert n_neurons(make_sae(), store) == D_SAE
    assert n_neurons(None, store) == D


@pytest.mark.parametrize(("n", "width", "size"), [(100, 1024, 32), (100, 1, 100), (3, 10**9, 1), (100, 0, 100)])
def test_blocks_of_neurons_stay_within_their_size(monkeypatch: pytest.MonkeyPatch, n: int, width: int, size: int):
    monkeypatch.setattr("sae_ray.scores.statistics.BLOCK_BYTES", 32 * 8 * 1024)
    blocks = list(neuron_blocks(n, width))
    assert [neuron for block in blocks for neuron in block] == list(range(n))
    assert max(map(len, blocks)) == size


def test_a_part_of_more_images_than_a_block_is_a_block(tmp_path: Path, write_store: WriteStore):
    store = write_store(tmp_path, make_parts([4, 4], 1, D), images_per_part=5000)
    assert image_blocks(store) == [[(0, range(4))], [(1, range(4))]]


@given(st.lists(st.lists(st.integers(-1, 2), max_size=6), min_size=1, max_size=5))
def test_the_majority_is_the_commonest_label(labels_of: list[list[int]]):
    neuron = np.repeat(np.arange(len(labels_of)), [len(labels) for labels in labels_of])
    label = np.array([one for labels in labels_of for one in labels], dtype=np.int64)
    found, share = majority(neuron, label, len(labels_of) + 1)
    assert (found[-1], share[-1]) == (-1, 0)
    for labels, most, part in zip(labels_of, found, share, strict=False):
        counts = Counter(one for one in labels if one >= 0)
        if not counts:
            assert (most, part) == (-1, 0)
            continue
        assert most == min(one for one, count in counts.items() if count == max(counts.values()))
        assert part == pytest.approx(counts[most] / len(labels))
