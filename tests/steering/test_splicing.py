"""Reconstructions inside encoders, against the layers run by hand, and on the world's CLIP."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_ray.encoders import Encoder, load_encoder
from sae_ray.encoders.sites import Site
from sae_ray.encoders.text import load_text_encoder
from sae_ray.errors import UsageError
from sae_ray.sae import SAE
from sae_ray.steering.splicing import (
    PROJECTION,
    Spliced,
    count_spliced,
    linear_probe,
    outputs_at,
    outputs_of,
    zero_shot,
)
from sae_ray.world.render import SHAPES, article, attributes, render
from sae_ray.world.write import MODELS

CLIP = str(MODELS / "clip")
RANDOM = Site.parse("layer3:random:4")


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(CLIP)


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return torch.stack([torch.from_numpy(np.array(render(index))).permute(2, 0, 1) for index in range(300)])


@pytest.fixture(scope="module")
def classes() -> Tensor:
    shown = [attributes(index).shape for index in range(300)]
    return torch.tensor([-1 if shape is None else list(SHAPES).index(shape) for shape in shown])


@pytest.fixture(scope="module")
def by_name():
    return zero_shot(load_text_encoder(CLIP).embed_texts([f"a photo of {article(shape)}" for shape in SHAPES]))


def lossless(d: int, kept: float = 1.0) -> SAE:
    """Codes are the positive and negative parts of the activation; the reconstruction is `kept` of it."""
    eye = torch.eye(d)
    both = torch.cat([eye, -eye])
    return SAE("relu", both.T.contiguous(), kept * both, torch.zeros(2 * d), torch.zeros(d))


def widths(encoder: Encoder, site: Site) -> int:
    width = encoder.info.width(site.point)
    assert width is not None
    return width


@pytest.mark.parametrize("site", [PROJECTION, RANDOM, Site.parse("layer1:cls"), Site.parse("layer4:all")])
def test_a_lossless_sae_recovers_all_and_one_that_says_nothing_nothing(site, encoder, pixels, classes, by_name):
    d = widths(encoder, site)
    mean = torch.randn(d, generator=torch.Generator().manual_seed(0))
    outputs = outputs_at(encoder, pixels, site)
    found = count_spliced(outputs, lossless(d), mean, by_name, classes)
    assert found.n_images == int((classes >= 0).sum()) < len(classes)
    assert found.original == found.reconstruction > found.ablation
    assert found.recovered == 1
    silent = SAE("relu", torch.zeros(d, 4), torch.zeros(4, d), torch.zeros(4), mean)
    found = count_spliced(outputs, silent, mean, by_name, classes)
    assert (found.reconstruction, found.recovered) == (found.ablation, 0)


def test_zero_shot_accuracy_is_that_of_the_model_card(encoder, pixels, classes, by_name):
    found = count_spliced(outputs_at(encoder, pixels, RANDOM), lossless(128), torch.zeros(128), by_name, classes)
    assert found.accuracy[0] > 0.88  # .93 of all held-out images
    assert max(found.accuracy[2:]) < 0.2  # without its image the CLIP says the same of all


@pytest.mark.parametrize(("tokens", "edited"), [("cls", slice(1)), ("random:4", slice(None))])
def test_the_rest_of_the_encoder_runs_on_edited_tokens(tokens: str, edited: slice, encoder: Encoder, pixels: Tensor):
    site = Site.parse(f"layer2:{tokens}")
    sae = lossless(128, kept=0.5)
    with torch.no_grad():
        whole = Site.parse("layer2:all")
        stream = encoder.tap(pixels, [whole], [""] * 300, 0)[whole].activation.view(300, 17, 128).clone()
        stream[:, edited] *= 0.5
        module: Any = encoder.tower.module
        for block in encoder.tower.blocks[3:]:
            stream = block(stream, attention_mask=None)
        expected = module.visual_projection(module.vision_model.post_layernorm(stream[:, 0]))
    outputs = outputs_at(encoder, pixels, site)
    before = outputs(None)
    assert torch.allclose(outputs(lambda x: sae.decode(sae.encode(x))), expected, atol=1e-5)
    assert torch.equal(outputs(None), before)  # no hook is left behind
    assert not torch.allclose(before, expected, atol=0.1)


def test_stored_embeddings_need_no_encoder(encoder, pixels, classes, by_name):
    embeddings = encoder.tap(pixels, [PROJECTION], [""] * 300, 0)[PROJECTION].activation
    generator = torch.Generator().manual_seed(1)
    W = torch.randn(64, 32, generator=generator) / 8
    sae = SAE("topk", W, W.T.contiguous(), torch.zeros(32), embeddings.mean(0), k=8)
    mean = embeddings.mean(0)
    found = count_spliced(outputs_of(embeddings), sae, mean, by_name, classes)
    assert found == count_spliced(outputs_at(encoder, pixels, PROJECTION), sae, mean, by_name, classes)
    assert found.ablation < found.reconstruction < found.original
    halves = [
        count_spliced(outputs_of(embeddings[rows]), sae, mean, by_name, classes[rows])
        for rows in (slice(0, 111), slice(111, None))
    ]
    assert Spliced.merged(halves) == found


def test_a_linear_probe_stands_in_for_texts(encoder, pixels, classes):
    embeddings = encoder.tap(pixels, [PROJECTION], [""] * 300, 0)[PROJECTION].activation
    probe = linear_probe(embeddings[:200], classes[:200])
    found = count_spliced(
        outputs_at(encoder, pixels[200:], RANDOM), lossless(128), torch.zeros(128), probe, classes[200:]
    )
    assert found.accuracy[0] > 0.75
    assert found.recovered == 1
    with pytest.raises(UsageError, match="two"):
        linear_probe(embeddings[:20], torch.zeros(20, dtype=torch.int64))


def test_nothing_is_recovered_where_nothing_is_lost():
    assert math.isnan(Spliced(10, 5, 5, 5, 4).recovered)
    assert math.isnan(Spliced(0, 0, 0, 0, 0).accuracy[0])


@pytest.mark.parametrize("site", ["layer3:mean", "pooled"])
def test_sites_that_the_output_is_not_computed_from_are_refused(site: str, encoder: Encoder, pixels: Tensor):
    with pytest.raises(UsageError, match="cannot be spliced"):
        outputs_at(encoder, pixels, Site.parse(site))


def test_another_width_is_refused(encoder, pixels, classes, by_name):
    with pytest.raises(UsageError, match="mean has the shape"):
        count_spliced(outputs_at(encoder, pixels, RANDOM), lossless(128), torch.zeros(64), by_name, classes)
    with pytest.raises(UsageError, match="128 wide"):
        count_spliced(outputs_at(encoder, pixels, RANDOM), lossless(64), torch.zeros(64), by_name, classes)
