"""Studies: a whole experiment as one validated object, the steps it amounts to, and what it found."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.study.config import Study as Study
    from sae_ray.study.importing import import_activations as import_activations
    from sae_ray.study.plan import StudyPlan as StudyPlan
    from sae_ray.study.summary import summarise as summarise

__getattr__ = exports(
    __name__,
    {
        "config": ["Study"],
        "importing": ["import_activations"],
        "plan": ["StudyPlan"],
        "summary": ["summarise"],
    },
)
