"""Models of every family with weights that are not zero, and SAEs for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_ray.sae import SAE
from tests.encoders.test_encoders import save_transformers

FAMILIES = ["clip", "siglip", "dinov2", "dinov2_registers"]


def random_sae(d_in: int, d_sae: int = 48, seed: int = 0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_enc = torch.randn(d_in, d_sae, generator=generator) / d_in**0.5
    b_dec = torch.randn(d_in, generator=generator)
    return SAE("relu", W_enc, W_enc.T.contiguous(), 0.1 * torch.randn(d_sae, generator=generator), b_dec)


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a small model of a family; no parameter is zero, and LayerScale is not one."""
    root, done = tmp_path_factory.mktemp("families"), {}

    def save(kind: str) -> Path:
        if kind not in done:
            from safetensors.torch import load_file, save_file

            path = root / kind
            save_transformers(path, kind)
            generator = torch.Generator().manual_seed(1)
            weights = {
                name: tensor + 0.2 * torch.randn(tensor.shape, generator=generator)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in load_file(path / "model.safetensors").items()
            }
            save_file(weights, path / "model.safetensors", {"format": "pt"})
            done[kind] = path
        return done[kind]

    return save
