"""The gradients of a learned threshold."""

from __future__ import annotations

import torch


class JumpReLUFunction(torch.autograd.Function):
    """(z * H(z - threshold), H(z - threshold)) with the pseudo-derivatives of arXiv 2407.14435, eq. 11 and 12."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        active = z > threshold
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(active & (z > 0), z, 0.0), active.to(z.dtype)

    @staticmethod
    def backward(ctx, grad_codes, grad_active):  # pyright: ignore[reportIncompatibleMethodOverride]
        z, threshold = ctx.saved_tensors
        window = ((z - threshold).abs() < ctx.bandwidth / 2).to(z.dtype) / ctx.bandwidth
        grad_threshold = -(window * (threshold * grad_codes + grad_active)).sum(0)
        return grad_codes * ((z > threshold) & (z > 0)), grad_threshold, None
