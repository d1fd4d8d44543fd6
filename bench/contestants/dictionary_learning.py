"""`dictionary_learning`'s training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer

if TYPE_CHECKING:
    from torch import Tensor

    from bench.contestants.worker import Settings


class BatchTopK:
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        self.trainer = BatchTopKTrainer(
            steps=settings.steps,
            activation_dim=settings.d_in,
            dict_size=settings.d_sae,
            k=settings.k,
            layer=0,
            lm_name="none",
            lr=settings.learning_rate,
            warmup_steps=0,
            threshold_beta=settings.threshold_beta,
            threshold_start_step=1,
            device=settings.device,
        )
        autoencoder = self.trainer.ae
        autoencoder.decoder.weight.data.copy_(W_dec.T)
        autoencoder.encoder.weight.data.copy_(W_enc_t)
        autoencoder.b_dec.data.copy_(b_dec)
        self.n_steps = 0

    def step(self, batch: Tensor) -> None:
        self.trainer.update(self.n_steps, batch)
        self.n_steps += 1

    def mark_dead(self, count: int) -> None:
        self.trainer.num_tokens_since_fired[-count:] = self.trainer.dead_feature_threshold

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        codes = self.trainer.ae.encode(x, use_threshold=True)
        return self.trainer.ae.decode(codes), int((codes > 0).sum())
