"""Scores: what a neuron responds to, from one pass over a set of images.

`statistics` accumulates sums and extremes block by block and computes MonoSemanticity from them. `scoring` makes the
blocks, from an SAE or from raw activations, and the tables that are written."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.scores.scoring import histogram_table as histogram_table
    from sae_ray.scores.scoring import majority as majority
    from sae_ray.scores.scoring import score_store as score_store
    from sae_ray.scores.scoring import score_table as score_table
    from sae_ray.scores.scoring import top_images_table as top_images_table
    from sae_ray.scores.statistics import NeuronStats as NeuronStats
    from sae_ray.scores.statistics import monosemanticity as monosemanticity

__getattr__ = exports(
    __name__,
    {
        "scoring": ["score_store", "score_table", "top_images_table", "histogram_table", "majority"],
        "statistics": ["NeuronStats", "monosemanticity"],
    },
)
