"""What a step of the stage `concepts` is made of, while it is collected."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from sae_ray.concepts.best_words import NAMES_SCHEMA
from sae_ray.concepts.tables import (
    CONCEPTS,
    CONCEPTS_SCHEMA,
    CORRELATIONS,
    CORRELATIONS_SCHEMA,
    HIERARCHY,
    HIERARCHY_SCHEMA,
    NAMES,
    NEURONS,
    NEURONS_SCHEMA,
    as_table,
)
from sae_ray.store.files import Folder


class Findings:
    """Of the latents of one SAE, or of the raw neurons of a site."""

    def __init__(self, n_neurons: int):
        """Starts without any."""
        self.neurons: dict[str, Any] = {"neuron": np.arange(n_neurons)}
        """Columns of `NEURONS_SCHEMA`; those that are missing are null."""
        self.concepts: dict[str, Any] = {}
        """Columns of `CONCEPTS_SCHEMA`; none without labels."""
        self.correlations: dict[str, Any] = {}
        """Columns of `CORRELATIONS_SCHEMA`."""
        self.hierarchy: dict[str, Any] = {}
        """Columns of `HIERARCHY_SCHEMA`; none without a taxonomy."""
        self.names: list[pa.Table] = []
        """In `NAMES_SCHEMA`."""
        self.counts: dict[str, Any] = {"neurons": n_neurons}
        """The figures of the whole."""

    def write(self, folder: Folder) -> None:
        """Writes the four tables, and that of depths if there are any."""
        for name, columns, schema in (
            (NEURONS, self.neurons, NEURONS_SCHEMA),
            (CONCEPTS, self.concepts, CONCEPTS_SCHEMA),
            (CORRELATIONS, self.correlations, CORRELATIONS_SCHEMA),
        ):
            folder.write_parquet(name, as_table(columns, schema))
        if self.hierarchy:
            folder.write_parquet(HIERARCHY, as_table(self.hierarchy, HIERARCHY_SCHEMA))
        folder.write_parquet(NAMES, pa.concat_tables([NAMES_SCHEMA.empty_table(), *self.names]))


def mean(values: np.ndarray) -> float:
    """Over the values that are known; NaN without any."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan
