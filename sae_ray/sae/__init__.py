"""Sparse autoencoders: their architectures, training, use, and what they look like on disk.

`CellTrainer` trains one SAE of a grid, `train_cells` a bundle of them on one stream. `SAE` is a trained one, `load_sae`
opens one, and `evaluate` measures how faithful it is. `train_sae` trains one on vectors from anywhere."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.sae.bundle import BundleJob as BundleJob
    from sae_ray.sae.bundle import CellJob as CellJob
    from sae_ray.sae.bundle import CellReport as CellReport
    from sae_ray.sae.bundle import train_cells as train_cells
    from sae_ray.sae.config import Cell as Cell
    from sae_ray.sae.config import TrainingConfig as TrainingConfig
    from sae_ray.sae.fitting import TrainedSAE as TrainedSAE
    from sae_ray.sae.fitting import train_sae as train_sae
    from sae_ray.sae.formats import export_sae as export_sae
    from sae_ray.sae.formats import load_sae as load_sae
    from sae_ray.sae.formats import save_latents as save_latents
    from sae_ray.sae.formats import save_sae as save_sae
    from sae_ray.sae.metrics import Fidelity as Fidelity
    from sae_ray.sae.metrics import FidelitySummary as FidelitySummary
    from sae_ray.sae.metrics import LatentStatistics as LatentStatistics
    from sae_ray.sae.metrics import evaluate as evaluate
    from sae_ray.sae.metrics import evaluate_store as evaluate_store
    from sae_ray.sae.metrics import measure_latents as measure_latents
    from sae_ray.sae.model import SAE as SAE
    from sae_ray.sae.sparse import SparseCodes as SparseCodes
    from sae_ray.sae.training import CellTrainer as CellTrainer
    from sae_ray.sae.training import NonFiniteLoss as NonFiniteLoss
    from sae_ray.sae.training import StepMetrics as StepMetrics

__getattr__ = exports(
    __name__,
    {
        "bundle": ["BundleJob", "CellJob", "CellReport", "train_cells"],
        "config": ["Cell", "TrainingConfig"],
        "fitting": ["TrainedSAE", "train_sae"],
        "formats": ["export_sae", "load_sae", "save_latents", "save_sae"],
        "metrics": ["Fidelity", "FidelitySummary", "LatentStatistics", "evaluate", "evaluate_store", "measure_latents"],
        "model": ["SAE"],
        "sparse": ["SparseCodes"],
        "training": ["CellTrainer", "NonFiniteLoss", "StepMetrics"],
    },
)
