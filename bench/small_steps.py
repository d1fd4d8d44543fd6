"""A BatchTopK step with few latents on one thread, beside the dense loop with autograd that one would write oneself.

`python -m bench.small_steps` writes `bench/results/small_steps.json`. Both take turns, step by step, from the same
weights on the same batches, and have to arrive at the same loss.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from bench.record import Table, record
from sae_ray.sae import Cell, CellTrainer, TrainingConfig

D_IN, BATCH, STEPS = 64, 512, 120
WIDTHS, KS = (64, 256, 1024), (5, 20)
STEADY = slice(20, None)
"""The first steps allocate."""
TRAINING = TrainingConfig(batch_size=BATCH, steps=1000, warmup_steps=0, learning_rate=1e-3, threshold_start_step=10)
CLOSE = 0.01
"""How far apart the losses may be, relative to each other."""


def main() -> None:
    torch.set_num_threads(1)
    rows: list[list[Any]] = []
    for d_sae in WIDTHS:
        for k in KS:
            ours, plain = race(d_sae, k)
            rows.append([d_sae, k, round(ours, 2), round(plain, 2), round(ours / plain, 2)])
            print(*rows[-1], flush=True)
    table = Table(
        title=f"One BatchTopK step on one thread: d_in {D_IN}, batch {BATCH}, milliseconds of CPU",
        columns=["d_sae", "k", "sae-ray", "plain loop", "ratio"],
        rows=rows,
    )
    print(record("small_steps", [table], {"command": "python -m bench.small_steps"}))


def race(d_sae: int, k: int) -> tuple[float, float]:
    """Milliseconds of our step and of a plain one."""
    torch.manual_seed(0)
    trainer = CellTrainer(Cell("batch_topk", d_sae / D_IN, k=k, training=TRAINING), D_IN)
    trainer.starts_at_median = False
    mixing = torch.randn(D_IN, D_IN) / 8
    batches = [torch.randn(BATCH, D_IN) @ mixing for _ in range(4)]
    contestants = {"ours": lambda x: trainer.step(x).reconstruction_loss, "plain": plain_step(trainer, k)}
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    losses = {}
    for number in range(STEPS):
        for name, step in contestants.items():
            started = time.process_time()
            losses[name] = step(batches[number % len(batches)])
            taken[name].append(1000 * (time.process_time() - started))
    if abs(losses["ours"] / losses["plain"] - 1) > CLOSE:
        sys.exit(f"d_sae {d_sae}, k {k}: the losses are {losses}")
    ours, plain = (median(taken[name][STEADY]) for name in contestants)
    return ours, plain


def plain_step(trainer: CellTrainer, k: int) -> Callable[[torch.Tensor], float]:
    """What trains the same SAE from the same weights, without AuxK, a threshold or metrics."""
    weights = {name: torch.nn.Parameter(one.detach().clone()) for name, one in trainer.weights.named().items()}
    W_enc_t, W_dec, b_enc, b_dec = (weights[name] for name in ("W_enc_t", "W_dec", "b_enc", "b_dec"))
    W_enc = torch.nn.Parameter(W_enc_t.detach().T.contiguous())
    parameters = [W_enc, W_dec, b_enc, b_dec]
    optimizer = torch.optim.Adam(parameters, lr=TRAINING.learning_rate, fused=True)
    since_fired = torch.zeros(len(W_dec), dtype=torch.int64)

    def step(x: torch.Tensor) -> float:
        pre = torch.relu((x - b_dec) @ W_enc + b_enc)
        top = pre.flatten().topk(k * len(x), sorted=False)
        codes = torch.zeros(pre.numel()).scatter(0, top.indices, top.values).view_as(pre)
        loss = (codes @ W_dec + b_dec - x).square().sum(1).mean()
        since_fired.add_(len(x)).masked_fill_((codes > 0).any(0), 0)
        optimizer.zero_grad()
        loss.backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(parameters, TRAINING.gradient_clip)
        optimizer.step()
        with torch.no_grad():
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.item()

    return step


if __name__ == "__main__":
    main()
