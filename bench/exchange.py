"""What ranks send each other per training step where they split the rows of a batch, and where they split the latents.

`python -m bench.exchange` writes `bench/results/exchange.json`. Bytes are counted in a run of gloo ranks.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from bench.record import Table, record
from bench.train import activations
from sae_ray.sae import Cell, CellTrainer, TrainingConfig
from sae_ray.sae.ranks import Ranks, Split

D_IN, K, BATCH, N_RANKS = 512, 20, 1024, 4
ARCHITECTURES = ("batch_topk", "matryoshka_batch_topk", "topk")
WIDTHS = (8192, 32768)


class CountedRanks(Ranks):
    """Ranks that count the bytes that each of them sends, where collectives go around a ring."""

    sent = 0.0

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        self.sent += (self.size - 1) * rows.nbytes
        return super().gather(rows)

    def exchange(self, rows: torch.Tensor) -> torch.Tensor:
        self.sent += (self.size - 1) / self.size * rows.nbytes
        return super().exchange(rows)

    def _reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType) -> torch.Tensor:
        self.sent += 2 * (self.size - 1) / self.size * tensor.nbytes
        return super()._reduce(tensor, op)


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, multiprocessing.get_context("spawn").Pool(N_RANKS) as pool:
        [rows, *_] = pool.starmap(work, [(f"file://{scratch}/rendezvous", rank) for rank in range(N_RANKS)], 1)
    title = f"MB that a rank sends per step: {N_RANKS} ranks, d_in {D_IN}, batch {BATCH}, k {K}, float32"
    columns = ["d_sae", "architecture", "ranks split", "none dead", "half dead"]
    print(record("exchange", [Table(title=title, columns=columns, rows=rows)]))
    print(title, *rows, sep="\n")


def work(rendezvous: str, rank: int) -> list[list[Any]]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rendezvous, timedelta(minutes=10), N_RANKS, rank)
    batches = torch.from_numpy(activations(3 * BATCH, 0)).split(BATCH)
    cases = product(WIDTHS, ARCHITECTURES, ("rows", "latents"))
    rows = [[*case, *sent(CountedRanks(dist.group.WORLD), *case, batches)] for case in cases]
    dist.destroy_process_group()
    return rows


def sent(ranks: CountedRanks, d_sae: int, name: str, by: str, batches: Sequence[torch.Tensor]) -> list[float]:
    """MB per step while no latent is dead, and while half of them are."""
    training = TrainingConfig(batch_size=BATCH, steps=10, warmup_steps=0, threshold_start_step=1)
    split = Split(**{by: ranks})
    trainer = CellTrainer(Cell(name, d_sae / D_IN, k=K, training=training), D_IN, split=split)
    sums = []
    for number, batch in enumerate(batches):
        ranks.sent = 0.0
        if number == 2:
            trainer.samples_since_fired[len(trainer.samples_since_fired) // 2 :] = training.dead_after_samples
        trainer.step(batch.chunk(split.rows.size)[split.rows.rank])
        sums.append(round(ranks.sent / 1e6, 1))
    return sums[1:]  # the first step also finds where `b_dec` starts


if __name__ == "__main__":
    main()
