"""sae-ray: sparse autoencoders for vision-language models, from a folder of images to scored and steerable concepts."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sae_ray.sae import load_sae
    from sae_ray.statistics import monosemanticity
    from sae_ray.steering import Intervention, load_llava
    from sae_ray.study import Study

_HOMES = {
    "Intervention": "sae_ray.steering",
    "Study": "sae_ray.study",
    "load_llava": "sae_ray.steering",
    "load_sae": "sae_ray.sae",
    "monosemanticity": "sae_ray.statistics",
}

__all__ = ["Intervention", "Study", "load_llava", "load_sae", "monosemanticity"]


def __getattr__(name: str):
    # Imported on first use: the package opens in milliseconds and where only the numeric rooms' needs are installed.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'sae_ray' has no attribute {name!r}")
