"""The active latents of a wide SAE on a GPU: float32 codes at little more than the cost of a bfloat16 product.

The bfloat16 product screens: it finds every entry that could be above its threshold within a bound of its error. These
few are computed again in float32, each by itself, and decide. So a row's codes do not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from sae_ray.sae.kernels import kernels_for
from sae_ray.sae.sparse import Pattern

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

    from sae_ray.sae.model import SAE

WIDE = 256
"""Latents per active one from which on screening pays: an entry by itself costs as much as many in a product."""


def pays(sae: SAE) -> bool:
    """Whether the SAE is on a GPU, has a threshold, and few of its latents are active."""
    few = sae.threshold is not None and sae.k is not None and sae.d_sae >= WIDE * sae.k
    return few and sae.W_enc.dtype == torch.float32 and kernels_for(sae.W_enc) is not None


def screening(sae: SAE) -> Callable[[Tensor], tuple[Int[Tensor, " nnz"], Float[Tensor, " nnz"]]]:
    """Makes what finds the active entries of centred rows `[n, d_in]`: ascending flat indices, and values.

    Rounding two numbers to bfloat16 changes their product by at most `2**-7 + 2**-16` of it; adding up `d_in` products
    in float32 errs by at most `d_in * 2**-23` of the sum of their magnitudes. That sum is at most the product of the
    lengths of row and encoder (Cauchy and Schwarz).
    """
    assert sae.threshold is not None
    threshold, W_enc_t = sae.threshold.clamp_min(0), sae.W_enc.T.contiguous()
    lengths = W_enc_t.norm(dim=1)
    unit = (W_enc_t / lengths.clamp_min(torch.finfo(lengths.dtype).tiny).unsqueeze(1)).bfloat16()
    # Without an encoder the bias alone decides: divided by 0 it is infinite, and 0 stays below.
    bound = torch.nan_to_num((threshold - sae.b_enc) / lengths, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    error = 1.05 * (2**-7 + 2**-16 + sae.d_in * 2**-23)

    def active(centred: Float[Tensor, "n d_in"]) -> tuple[Tensor, Tensor]:
        rough = _product(centred.bfloat16(), unit)
        rough += error * centred.norm(dim=1, keepdim=True)
        flat = (rough > bound).flatten().nonzero().squeeze(1)
        pattern = Pattern.of_flat(flat, len(centred), sae.d_sae)
        values = pattern.dots(centred, W_enc_t) + sae.b_enc[pattern.latents]
        kept = values > threshold[pattern.latents]
        return flat[kept], values[kept]

    return active


def _product(x: Tensor, weight: Tensor) -> Float[Tensor, "n d_sae"]:
    """`x @ weight.T` of bfloat16, added up in float32."""
    return torch.mm(x, weight.T, out_dtype=torch.float32) if x.is_cuda else x.float() @ weight.float().T
