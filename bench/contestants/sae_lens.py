"""SAELens's training step."""

from __future__ import annotations

import tempfile
from typing import TYPE_CHECKING

from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

if TYPE_CHECKING:
    from torch import Tensor

    from bench.contestants.worker import Settings


class BatchTopK:
    def __init__(self, settings: Settings, W_enc_t: Tensor, W_dec: Tensor, b_dec: Tensor):
        config = BatchTopKTrainingSAEConfig(
            d_in=settings.d_in,
            d_sae=settings.d_sae,
            k=settings.k,
            topk_threshold_lr=1 - settings.threshold_beta,
            aux_loss_coefficient=1 / 32,
            decoder_init_norm=1.0,
            device=settings.device,
        )
        self.sae = BatchTopKTrainingSAE(config)
        for weight, value in (("W_dec", W_dec), ("W_enc", W_enc_t.T), ("b_dec", b_dec)):
            getattr(self.sae, weight).data.copy_(value)
        self.trainer = SAETrainer(
            SAETrainerConfig(
                total_training_samples=settings.steps * settings.batch,
                train_batch_size_samples=settings.batch,
                lr=settings.learning_rate,
                lr_end=settings.learning_rate,
                device=settings.device,
            ),
            self.sae,
            data_provider=iter(()),
        )

    def step(self, batch: Tensor) -> None:
        self.trainer.step(batch)
        self.trainer.n_training_steps += 1

    def mark_dead(self, count: int) -> None:
        self.trainer.n_forward_passes_since_fired[-count:] = self.trainer.cfg.dead_feature_window + 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        with tempfile.TemporaryDirectory() as folder:
            self.sae.save_inference_model(folder)
            inference = SAE.load_from_disk(folder, device=str(x.device))
        codes = inference.encode(x)
        return inference.decode(codes), int((codes > 0).sum())
