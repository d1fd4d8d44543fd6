"""The MonoSemanticity score against the pairwise double loop of the paper and against the reference's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import load_file

import sae_ray
from sae_ray.errors import UsageError
from sae_ray.scores.statistics import monosemanticity

GOLDEN = Path(__file__).parents[1] / "golden" / "monosemanticity.safetensors"


def double_loop(activations: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    """The mean similarity of all pairs of images, weighted by the product of their min-max scaled activations."""
    embeddings = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores = np.full(activations.shape[1], np.nan)
    for neuron, values in enumerate(activations.T):
        if (values > values.min(initial=np.inf)).sum() < 2:
            continue
        scaled = (values - values.min()) / (values.max() - values.min())
        weighted = weights = 0.0
        for n in range(len(values)):
            for m in range(n + 1, len(values)):
                weighted += scaled[n] * scaled[m] * (embeddings[n] @ embeddings[m])
                weights += scaled[n] * scaled[m]
        scores[neuron] = weighted / weights
    return scores


def scores_of(activations: np.ndarray, embeddings: np.ndarray) -> np.ndarray:
    return monosemanticity(torch.from_numpy(activations), torch.from_numpy(embeddings)).numpy()


def random(n: int, neurons: int, d: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, neurons)), rng.normal(size=(n, d))


def test_the_reference_gets_the_same_scores():
    golden = load_file(GOLDEN)
    scores = monosemanticity(golden["activations"], golden["embeddings"])
    assert scores.dtype == torch.float64
    values = golden["activations"]
    dead = (values > values.min(0).values).sum(0) < 2
    assert dead.tolist() == [True, True, False, False, True, *[False] * 43]
    assert torch.equal(scores.isnan(), dead)
    torch.testing.assert_close(scores[~dead], golden["ms"].double()[~dead], atol=1e-6, rtol=0)


def test_neurons_of_every_kind_equal_the_double_loop():
    activations, embeddings = random(20, 8)
    activations[:, 1] -= 10  # negative everywhere
    activations[:, 2] = np.maximum(activations[:, 2], 0)  # sparse
    activations[:, 3] = 0.25  # constant
    activations[:, 4] = 0
    activations[:, 5] = np.where(np.arange(20) == 3, 2.0, 0.0)  # one image
    activations[:, 6] = np.where(np.arange(20) % 9 == 0, activations[:, 6] - 5, 0)  # below zero on three images
    activations[:, 7] = np.where(np.arange(20) == 3, -2.0, 0.0)  # above its minimum everywhere but there
    scores = scores_of(activations, embeddings)
    np.testing.assert_allclose(scores, double_loop(activations, embeddings), atol=1e-12)
    assert np.isnan(scores).tolist() == [False, False, False, True, True, True, False, False]


@given(st.data())
def test_any_activations_equal_the_double_loop(data: st.DataObject):
    n, neurons, d = (data.draw(st.integers(low, high)) for low, high in ((1, 8), (1, 4), (1, 3)))
    # Whole numbers make ties with the minimum common.
    # Steps of .01: a sum of squares in float64 cannot hold a value 1e-16 times the largest.
    values = st.integers(-3, 3).map(float) | st.integers(-100_000, 100_000).map(lambda hundredths: hundredths / 100)
    activations = data.draw(arrays.arrays("float64", (n, neurons), elements=values))
    lengths = st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3)
    embeddings = data.draw(arrays.arrays("float64", (n, d), elements=lengths))
    scores, expected = scores_of(activations, embeddings), double_loop(activations, embeddings)
    np.testing.assert_allclose(scores, expected, atol=1e-9)
    assert np.all(np.isnan(scores) | (np.abs(scores) <= 1 + 1e-9))


def test_two_images_score_their_similarity():
    embeddings = np.array([[3.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    activations = np.array([[5.0, 0.0], [0.1, 7.0], [0.0, 7.0]])
    np.testing.assert_allclose(scores_of(activations, embeddings), [np.sqrt(0.5), np.sqrt(0.5)], atol=1e-15)


def test_alike_images_score_one_and_opposite_ones_below_zero():
    activations = np.array([[1.0], [2.0], [0.5], [0.0]])
    alike = np.array([[2.0, 1.0], [4.0, 2.0], [1.0, 0.5], [0.0, -1.0]])
    np.testing.assert_allclose(scores_of(activations, alike), [1.0], atol=1e-15)
    opposite = np.array([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    assert scores_of(activations, opposite)[0] < 0


def test_scale_and_offset_of_activations_and_length_of_embeddings_do_not_matter():
    activations, embeddings = random(30, 5)
    scores = scores_of(activations, embeddings)
    lengths = np.geomspace(1e-3, 1e3, 30)[:, None]
    np.testing.assert_allclose(scores_of(activations * np.geomspace(1e-6, 1e6, 5), embeddings), scores, atol=1e-12)
    np.testing.assert_allclose(scores_of(activations + 7, embeddings * lengths), scores, atol=1e-12)
    assert not np.allclose(scores_of(activations, -np.abs(embeddings)), scores)


def test_values_far_from_zero_keep_their_score():
    activations, embeddings = random(30, 3)
    far = np.round(activations * 1024) / 1024 + 2.0**30  # exact in float64
    np.testing.assert_allclose(scores_of(far, embeddings), scores_of(far - 2.0**30, embeddings), atol=1e-12)


def test_several_blocks_of_neurons_equal_one(monkeypatch: pytest.MonkeyPatch):
    activations, embeddings = random(15, 10)
    whole = scores_of(activations, embeddings)
    monkeypatch.setattr("sae_ray.scores.statistics.BLOCK_BYTES", 8 * 6 * 3)  # three neurons each
    np.testing.assert_allclose(scores_of(activations, embeddings), whole, atol=1e-12)


def test_the_package_offers_the_function_however_often_it_is_asked():
    assert sae_ray.monosemanticity is sae_ray.monosemanticity is monosemanticity


@pytest.mark.parametrize("shape", [(0, 3), (1, 3), (4, 0)])
def test_too_few_images_or_no_neurons_are_no_error(shape: tuple[int, int]):
    scores = monosemanticity(torch.ones(shape), torch.ones(shape[0], 2))
    assert scores.shape == (shape[1],)
    assert scores.isnan().all()


def test_arrays_are_taken_like_tensors():
    activations, embeddings = torch.rand(9, 4), torch.randn(9, 3)
    expected = monosemanticity(activations, embeddings)
    assert torch.equal(monosemanticity(activations.numpy(), embeddings.numpy()), expected)


def test_tensors_of_any_dtype_are_taken():
    activations, embeddings = torch.randint(-4, 4, (12, 3)), torch.randn(12, 4)
    scores = monosemanticity(activations.double(), embeddings.bfloat16())
    for dtype in (torch.int64, torch.float16, torch.bfloat16):
        got = monosemanticity(activations.to(dtype), embeddings.bfloat16().requires_grad_())
        torch.testing.assert_close(got, scores)


@pytest.mark.parametrize(
    ("activations", "embeddings", "message"),
    [
        (torch.ones(3, 2), torch.ones(4, 2), r"activations \(3, 2\) and embeddings \(4, 2\) must be two matrices"),
        (torch.ones(3), torch.ones(3, 2), r"activations \(3,\) and embeddings \(3, 2\) must be two matrices"),
        (torch.ones(3, 2), torch.ones(3, 2, 1), "must be two matrices"),
        (torch.tensor([[1.0], [torch.nan]]), torch.ones(2, 2), "must be finite; remove the rows"),
        (torch.ones(2, 1), torch.tensor([[1.0], [torch.inf]]), "must be finite; remove the rows"),
    ],
)
def test_what_cannot_be_scored_is_refused(activations: torch.Tensor, embeddings: torch.Tensor, message: str):
    with pytest.raises(UsageError, match=message):
        monosemanticity(activations, embeddings)
