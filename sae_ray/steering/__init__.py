"""Steering: edits of SAE latents inside a LLaVA's vision tower, and the answers they bring about."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.steering.config import MAX_NEW_TOKENS as MAX_NEW_TOKENS
    from sae_ray.steering.config import ONE_WORD as ONE_WORD
    from sae_ray.steering.interventions import Condition as Condition
    from sae_ray.steering.interventions import Intervention as Intervention
    from sae_ray.steering.interventions import LatentEdit as LatentEdit
    from sae_ray.steering.interventions import TowerEdit as TowerEdit
    from sae_ray.steering.interventions import load_max_token as load_max_token
    from sae_ray.steering.llava import Llava as Llava
    from sae_ray.steering.llava import load_llava as load_llava
    from sae_ray.steering.regions import Box as Box
    from sae_ray.steering.regions import Region as Region

__getattr__ = exports(
    __name__,
    {
        "config": ["MAX_NEW_TOKENS", "ONE_WORD"],
        "interventions": ["Condition", "Intervention", "LatentEdit", "TowerEdit", "load_max_token"],
        "llava": ["Llava", "load_llava"],
        "regions": ["Box", "Region"],
    },
)
