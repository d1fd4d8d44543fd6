"""Scores: what a neuron responds to, from one pass over a set of images.

`statistics` accumulates sums and extremes block by block and computes MonoSemanticity from them. `scoring` makes the
blocks, from an SAE or from raw activations. `tables` writes the results and reads them."""

from typing import TYPE_CHECKING

from sae_ray.lazy import exports

if TYPE_CHECKING:
    from sae_ray.scores.scoring import majority as majority
    from sae_ray.scores.scoring import score_store as score_store
    from sae_ray.scores.statistics import NeuronStats as NeuronStats
    from sae_ray.scores.statistics import monosemanticity as monosemanticity
    from sae_ray.scores.tables import ScoreTables as ScoreTables
    from sae_ray.scores.tables import write_tables as write_tables

__getattr__ = exports(
    __name__,
    {
        "scoring": ["score_store", "majority"],
        "statistics": ["NeuronStats", "monosemanticity"],
        "tables": ["ScoreTables", "write_tables"],
    },
)
