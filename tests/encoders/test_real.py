"""Photographs and weights that are not in the repository: `make test-real REAL=DIR`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sae_ray.encoders import load_encoder, load_preprocess
from sae_ray.encoders.sites import Site

REAL = os.environ.get("SAE_RAY_REAL", "")
N_PER_CLASS = 12
pytestmark = [pytest.mark.real, pytest.mark.skipif(not REAL, reason="SAE_RAY_REAL names no folder")]


@pytest.fixture(scope="module")
def photographs() -> list[tuple[str, Image.Image]]:
    """Class and photograph."""
    found = []
    for folder in sorted((Path(REAL) / "imagenette" / "val").iterdir()):
        for file in sorted(folder.iterdir())[:N_PER_CLASS]:
            with Image.open(file) as image:
                found.append((folder.name, image.convert("RGB")))
    return found


def neighbours_agree(spec: str, site: Site, photographs: list[tuple[str, Image.Image]]) -> float:
    """The share of photographs whose five nearest, by the cosine, mostly show the same class."""
    encoder, preprocess = load_encoder(spec), load_preprocess(spec)
    vectors = []
    for start in range(0, len(photographs), 50):
        images = [image for _, image in photographs[start : start + 50]]
        pixels = torch.from_numpy(np.stack([preprocess(image) for image in images]))
        vectors.append(encoder.tap(pixels, [site], [str(i) for i in range(len(images))], 0)[site].activation)
    unit = torch.nn.functional.normalize(torch.cat(vectors) - torch.cat(vectors).mean(0), dim=1)
    likeness = unit @ unit.T
    likeness.fill_diagonal_(-1)
    _, classes = np.unique([name for name, _ in photographs], return_inverse=True)
    near = classes[likeness.topk(5).indices.numpy()]
    voted = np.array([np.bincount(row).argmax() for row in near])
    return float((voted == classes).mean())


def test_a_judge_of_timm_knows_the_classes_of_photographs(photographs):
    assert neighbours_agree(f"timm:local-dir:{REAL}/efficientnet-lite0", Site("pooled"), photographs) > 0.85


def test_a_vision_transformer_knows_them_in_its_last_but_one_block(photographs):
    spec = f"{REAL}/dinov2-small"
    deep, shallow = (neighbours_agree(spec, Site("residual", layer, "cls"), photographs) for layer in (10, 1))
    assert deep > 0.6
    assert deep > shallow + 0.1
