"""sae-ray: sparse autoencoders for vision-language models, from a folder of images to scored and steerable concepts."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.encoders import extract as extract
    from sae_ray.report import open_study as open_study
    from sae_ray.sae import evaluate as evaluate
    from sae_ray.sae import load_sae as load_sae
    from sae_ray.sae import open_tracker as open_tracker
    from sae_ray.sae import train_sae as train_sae
    from sae_ray.scores import monosemanticity as monosemanticity
    from sae_ray.steering import Intervention as Intervention
    from sae_ray.steering import load_llava as load_llava
    from sae_ray.study import Study as Study
    from sae_ray.study import import_activations as import_activations

__getattr__ = exports(
    __name__,
    {
        "encoders": ["extract"],
        "report": ["open_study"],
        "sae": ["evaluate", "load_sae", "open_tracker", "train_sae"],
        "scores": ["monosemanticity"],
        "steering": ["Intervention", "load_llava"],
        "study": ["Study", "import_activations"],
    },
)
