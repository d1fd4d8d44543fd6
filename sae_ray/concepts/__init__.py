"""Concepts: what neurons mean, judged by the labels of their top images or by a text that describes these."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.concepts.agreeing import Agreement as Agreement
    from sae_ray.concepts.agreeing import Pairs as Pairs
    from sae_ray.concepts.agreeing import agreement as agreement
    from sae_ray.concepts.benchmark import read_benchmark as read_benchmark
    from sae_ray.concepts.labelling import Concept as Concept
    from sae_ray.concepts.labelling import best_of_each as best_of_each
    from sae_ray.concepts.labelling import image_classes as image_classes
    from sae_ray.concepts.labelling import label_concepts as label_concepts
    from sae_ray.concepts.labelling import mean_embeddings as mean_embeddings
    from sae_ray.concepts.labelling import search as search
    from sae_ray.concepts.naming import class_names as class_names
    from sae_ray.concepts.naming import class_of as class_of

__getattr__ = exports(
    __name__,
    {
        "agreeing": ["Agreement", "Pairs", "agreement"],
        "benchmark": ["read_benchmark"],
        "labelling": ["Concept", "best_of_each", "image_classes", "label_concepts", "mean_embeddings", "search"],
        "naming": ["class_names", "class_of"],
    },
)
