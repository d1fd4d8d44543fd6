"""Sparse autoencoders: training them, using them, and what they look like on disk."""

from sae_ray.sae.config import ArchitectureName, Cell, TrainingConfig
from sae_ray.sae.formats import load_sae, save_sae
from sae_ray.sae.metrics import Fidelity, FidelitySummary, LatentStatistics, evaluate
from sae_ray.sae.model import SAE
from sae_ray.sae.sparse import SparseCodes
from sae_ray.sae.training import CellTrainer, NonFiniteLoss, StepMetrics

__all__ = [
    "SAE",
    "ArchitectureName",
    "Cell",
    "CellTrainer",
    "Fidelity",
    "FidelitySummary",
    "LatentStatistics",
    "NonFiniteLoss",
    "SparseCodes",
    "StepMetrics",
    "TrainingConfig",
    "evaluate",
    "load_sae",
    "save_sae",
]
