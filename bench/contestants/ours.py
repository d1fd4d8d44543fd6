"""sae-ray's training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_ray.sae import Cell, CellTrainer, TrainingConfig

if TYPE_CHECKING:
    from torch import Tensor

    from bench.contestants.worker import Settings


class BatchTopK:
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        training = TrainingConfig(
            batch_size=settings.batch,
            steps=settings.steps,
            learning_rate=settings.learning_rate,
            warmup_steps=0,
            threshold_beta=settings.threshold_beta,
            threshold_start_step=1,
            dtype=settings.dtype,
        )
        cell = Cell("batch_topk", settings.d_sae / settings.d_in, k=settings.k, training=training)
        self.trainer = CellTrainer(cell, settings.d_in, settings.device)
        for weight, value in (("W_dec", W_dec), ("W_enc_t", W_enc_t), ("b_dec", b_dec)):
            self.trainer.weights.named()[weight].data.copy_(value)

    def step(self, batch: Tensor) -> None:
        self.trainer.advance(batch)

    def mark_dead(self, count: int) -> None:
        """Counts the last `count` latents as dead, unless they fire in the next step."""
        self.trainer.samples_since_fired[-count:] = self.trainer.cell.training.dead_after_samples

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        """Reconstructions by inference codes, and how many latents were active in all."""
        sae = self.trainer.export(1.0)
        codes = sae.encode_sparse(x)
        return sae.decode(codes), len(codes.values)
