"""What no step can do without: the encoder's product, and the optimizer's pass over parameters and moments.

The product is measured as we make it and as torch does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_ray.sae.product import affine

if TYPE_CHECKING:
    from torch import Tensor

    from bench.contestants.worker import Settings


class Product:
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        self.W_enc_t = W_enc_t
        self.b_enc = torch.zeros(settings.d_sae)

    def step(self, batch: Tensor) -> None:
        affine(batch, self.W_enc_t, self.b_enc)


class TorchProduct(Product):
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        super().__init__(settings, W_enc_t, W_dec, b_dec)
        self.pre = torch.empty(settings.batch, settings.d_sae)

    def step(self, batch: Tensor) -> None:
        torch.addmm(self.b_enc, batch, self.W_enc_t.T, out=self.pre)


class FusedAdam:
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        parameters = [torch.nn.Parameter(value.clone()) for value in (W_enc_t, W_dec, W_dec[:, 0], b_dec)]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        self.optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True)

    def step(self, batch: Tensor) -> None:
        self.optimizer.step()
