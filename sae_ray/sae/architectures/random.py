"""A baseline: BatchTopK before its first step."""

from __future__ import annotations

from sae_ray.sae.architectures.batch_topk import BatchTopK


class Random(BatchTopK):
    """BatchTopK without training: random directions, the encoder their transpose, `b_dec` the geometric median of the
    first batch. Its steps only serve to find the threshold.
    """

    name = "random"
    uses = frozenset(
        {"batch_size", "steps", "dtype", "centre", "threshold", "threshold_beta", "threshold_start_step", "init"}
    )
    frozen = frozenset({"W_enc_t", "W_dec", "b_enc", "b_dec"})
    revives = False
