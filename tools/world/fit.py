"""The one training loop of the world's models."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import nn
from tqdm import trange


def fit(
    name: str,
    parameters: Iterable[nn.Parameter],
    loss_on: Callable[[torch.Tensor], torch.Tensor],
    n_images: int,
    steps: int,
    batch: int,
    peak_lr: float,
) -> None:
    """Minimises `loss_on(rows)`, where `rows` int64 [batch] runs through shuffled epochs of `n_images` images.

    AdamW on one cycle: the learning rate goes up over a tenth of the steps and down along a cosine, momentum the other
    way. The gradient norm is clipped at 1.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=peak_lr, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_lr, steps, pct_start=0.1)
    order = torch.cat([torch.randperm(n_images) for _ in range(steps * batch // n_images + 1)])
    progress = trange(steps, desc=name)
    for step in progress:
        loss = loss_on(order[step * batch : (step + 1) * batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
