"""Latents that write in the same direction: the nearest decoder rows by cosine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from sae_ray.sae import SAE

N_NEAREST = 8
ENTRIES = 2**26
"""Maximum number of cosines in memory."""


def nearest_latents(
    sae: SAE, latents: Int[np.ndarray, " latents"], among: Int[np.ndarray, " live"]
) -> tuple[Int[np.ndarray, "latents near"], Float[np.ndarray, "latents near"]]:
    """The latents of `among` whose decoder rows are nearest to those of `latents`, nearest first, and the cosines.

    A latent is not its own neighbour. Returns `N_NEAREST` neighbours, or fewer if `among` has fewer other latents.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.nn.functional.normalize(sae.W_dec.to(device, torch.float32), dim=1)
    candidates = torch.from_numpy(np.asarray(among, dtype=np.int64)).to(device)
    found, cosines = [], []
    size = max(1, ENTRIES // max(1, len(candidates)))
    for start in range(0, len(latents), size):
        asked = torch.from_numpy(np.asarray(latents[start : start + size], dtype=np.int64)).to(device)
        cosine = rows[asked] @ rows[candidates].T
        cosine[asked[:, None] == candidates[None, :]] = -torch.inf
        best = cosine.topk(min(N_NEAREST, len(candidates) - 1), dim=1)
        found.append(candidates[best.indices].cpu().numpy())
        cosines.append(best.values.cpu().numpy())
    return np.concatenate(found), np.concatenate(cosines)
