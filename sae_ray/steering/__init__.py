"""Steering: edits of SAE latents inside a LLaVA's vision tower, and the answers they bring about."""

from sae_ray.steering.interventions import Intervention, LatentEdit, TowerEdit, load_max_token
from sae_ray.steering.llava import MAX_NEW_TOKENS, ONE_WORD, Llava, load_llava

__all__ = [
    "MAX_NEW_TOKENS",
    "ONE_WORD",
    "Intervention",
    "LatentEdit",
    "Llava",
    "TowerEdit",
    "load_llava",
    "load_max_token",
]
