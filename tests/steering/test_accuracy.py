"""Accuracies over a whole set of images, stored or encoded, in batches, by names or by a probe."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_ray.concepts import Labels, halves
from sae_ray.encoders import Encoder, load_encoder, load_preprocess
from sae_ray.encoders.sites import Site
from sae_ray.encoders.text import load_text_encoder
from sae_ray.images.part import Preparation
from sae_ray.images.rendering import Rendering
from sae_ray.sae import SAE
from sae_ray.steering.accuracy import ByName, encoded_batches, mean_activation, recovered, stored_batches
from sae_ray.steering.splicing import PROJECTION, count_spliced, linear_probe, outputs_at, outputs_of, zero_shot
from sae_ray.store.activations import ActivationStore
from sae_ray.store.files import Folder
from sae_ray.world.render import SHAPES, article, attributes, render
from sae_ray.world.write import MODELS

CLIP = str(MODELS / "clip")
N = 150
BROKEN = 7
"""An image that cannot be read."""


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(CLIP)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("images"))
    for index in range(N):
        file = BytesIO()
        render(index).save(file, "PNG")
        folder.write_bytes(f"{index:03}.png", b"no image" if index == BROKEN else file.getvalue())
    return folder


@pytest.fixture(scope="module")
def classes() -> np.ndarray:
    shown = [attributes(index).shape for index in range(N)]
    return np.array([-1 if shape is None else list(SHAPES).index(shape) for shape in shown])


@pytest.fixture(scope="module")
def texts() -> np.ndarray:
    return load_text_encoder(CLIP).embed_texts([f"a photo of {article(shape)}" for shape in SHAPES]).numpy()


@pytest.fixture(scope="module")
def embeddings(encoder: Encoder) -> torch.Tensor:
    pixels = torch.stack([torch.from_numpy(np.array(render(index))).permute(2, 0, 1) for index in range(N)])
    return encoder.tap(pixels, [PROJECTION], [""] * N, 0)[PROJECTION].activation.clone()


@pytest.fixture(scope="module")
def store(embeddings: torch.Tensor, write_store, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    parts = [np.array([row for row in part if row != BROKEN]) for part in np.split(np.arange(N), [40, 90])]
    x = embeddings.numpy()
    return write_store(tmp_path_factory.mktemp("root"), [(part, np.full(len(part), -1), x[part]) for part in parts])


def sae_of(d: int) -> SAE:
    W = torch.randn(d, 32, generator=torch.Generator().manual_seed(1)) / d**0.5
    return SAE("topk", W, W.T.contiguous(), torch.zeros(32), torch.zeros(d), k=8)


def kept(classes: np.ndarray) -> np.ndarray:
    return np.where(np.arange(N) == BROKEN, -1, classes)


def test_stored_outputs_are_judged_like_those_in_memory(store, embeddings, classes, texts):
    sae, mean = sae_of(64), mean_activation(store)
    torch.testing.assert_close(mean, embeddings[np.arange(N) != BROKEN].mean(0))
    told: list[int] = []
    found = recovered(sae, mean, stored_batches(store), classes, ByName(classes, texts), after_images=told.append)
    assert found is not None
    shown = torch.from_numpy(kept(classes))
    assert found.spliced == count_spliced(outputs_of(embeddings), sae, mean, zero_shot(torch.from_numpy(texts)), shown)
    assert found.classifier == "zero_shot"
    assert found.counts["spliced_images"] == told[-1] == (kept(classes) >= 0).sum()
    original, reconstruction, ablation, zero = found.spliced.accuracy
    assert found.counts["spliced_original"] == original > reconstruction == found.counts["spliced"]
    assert found.counts["spliced_mean"] == ablation
    assert found.counts["spliced_zero"] == zero


@pytest.mark.parametrize("site", ["layer2:cls", "layer3:random:4"])
def test_encoded_images_are_judged_in_batches_like_all_at_once(site, encoder, images, classes, texts, monkeypatch):
    monkeypatch.setattr("sae_ray.steering.accuracy.BATCH", 64)
    ids = [f"{index:03}.png" for index in range(N)]
    where, sae, mean = Site.parse(site), sae_of(128), torch.full((128,), 0.1)
    preparation = Preparation(load_preprocess(CLIP))
    batches = encoded_batches(encoder, preparation, images, ids, Rendering(), where, PROJECTION)
    found = recovered(sae, mean, batches, classes, ByName(classes, texts))
    assert found is not None
    pixels = torch.stack([torch.from_numpy(np.array(render(index))).permute(2, 0, 1) for index in range(N)])
    by_name, shown = zero_shot(torch.from_numpy(texts)), torch.from_numpy(kept(classes))
    assert found.spliced == count_spliced(outputs_at(encoder, pixels, where), sae, mean, by_name, shown)


def test_a_probe_is_fitted_on_one_half_and_judged_on_the_other(store, embeddings, classes):
    sae, mean, rough = sae_of(64), mean_activation(store), np.where(classes < 0, -1, classes // 8)
    found = recovered(sae, mean, stored_batches(store), rough, None, seed=5)
    assert found is not None
    assert found.classifier == "linear_probe"
    split, shown = halves(Labels.of(rough), 5), torch.from_numpy(kept(rough))
    fitted = np.setdiff1d(split.fitted, [BROKEN])
    judged = np.setdiff1d(split.judged, [BROKEN])
    probe = linear_probe(embeddings[fitted], shown[fitted])
    assert found.spliced == count_spliced(outputs_of(embeddings[judged]), sae, mean, probe, shown[judged])
    assert found.spliced.accuracy[0] > 0.7


def test_a_class_without_a_name_is_left_out_and_one_class_is_none(store, classes, texts):
    some = np.where(classes < 4, classes, -1)
    found = recovered(sae_of(64), torch.zeros(64), stored_batches(store), classes, ByName(some, texts[:4]))
    assert found is not None
    assert found.spliced.n_images == (kept(some) >= 0).sum()
    alone = np.where(classes == 0, 0, -1)
    for by_name in (ByName(alone, texts[:2]), None):
        assert recovered(sae_of(64), torch.zeros(64), stored_batches(store), alone, by_name) is None


def test_the_mean_of_a_large_store_is_that_of_parts_spread_over_it(write_store, tmp_path: Path, monkeypatch):
    monkeypatch.setattr("sae_ray.steering.accuracy.MEAN_ROWS", 20)
    parts = [(np.arange(10) + 10 * part, np.full(10, -1), np.full((10, 2), float(part))) for part in range(4)]
    assert mean_activation(write_store(tmp_path, parts)).tolist() == [1.0, 1.0]  # of parts 0 and 2
