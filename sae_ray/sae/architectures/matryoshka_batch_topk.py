"""Matryoshka BatchTopK."""

from __future__ import annotations

from sae_ray.sae.architectures.batch_topk import BatchTopK


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose every nested prefix of the dictionary reconstructs (Bussmann et al. 2025, arXiv 2503.17547).

    One selection serves all prefixes. With a single prefix it is BatchTopK: the group sizes are all that differs.
    """
