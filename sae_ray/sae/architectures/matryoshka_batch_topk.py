"""Matryoshka BatchTopK."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from sae_ray.errors import check
from sae_ray.sae.architectures.base import OwnSettings
from sae_ray.sae.architectures.batch_topk import BatchTopK


@dataclass(frozen=True)
class MatryoshkaSettings(OwnSettings):
    """Settings of Matryoshka BatchTopK."""

    group_fractions: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5625)
    """Shares of the dictionary that the nested prefixes add one after the other; they sum to 1."""

    table: ClassVar[str] = "architectures.matryoshka_batch_topk"
    """Where they stand in a study file."""

    def __post_init__(self):
        fit = all(share > 0 for share in self.group_fractions) and math.isclose(sum(self.group_fractions), 1)
        check(fit, f"{self.table}.group_fractions", self.group_fractions, "make it numbers above 0 that sum to 1")


class MatryoshkaBatchTopK(BatchTopK):
    """BatchTopK whose every nested prefix of the dictionary reconstructs (Bussmann et al. 2025, arXiv 2503.17547).

    One selection serves all prefixes. With a single prefix it is BatchTopK: the group sizes are all that differs.
    """

    name = "matryoshka_batch_topk"
    Settings = MatryoshkaSettings

    @classmethod
    def groups(cls, settings: MatryoshkaSettings, d_sae: int) -> list[int]:
        """The remainder goes to the last group."""
        sizes = [int(share * d_sae) for share in settings.group_fractions[:-1]]
        sizes.append(d_sae - sum(sizes))
        check(min(sizes) >= 1, f"{settings.table}.group_fractions", settings.group_fractions,
              f"make it large enough for one latent each of {d_sae}")  # fmt: skip
        return sizes
