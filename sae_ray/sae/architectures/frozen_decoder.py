"""A baseline: BatchTopK whose directions are random."""

from __future__ import annotations

from sae_ray.sae.architectures.batch_topk import BatchTopK


class FrozenDecoder(BatchTopK):
    """BatchTopK whose decoder stays as it was drawn; encoder and biases are trained.

    What it reaches needs no learned directions: a trained SAE should be compared with it (Korznikov et al. 2026, arXiv
    2602.14111).
    """

    name = "frozen_decoder"
    frozen = frozenset({"W_dec"})
