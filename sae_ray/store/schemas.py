"""Tables of finished steps, read with the columns that they must have."""

from __future__ import annotations

import pyarrow as pa

from sae_ray.errors import SaeRayError
from sae_ray.store.files import Folder


def read_columns(folder: Folder, name: str, schema: pa.Schema, stage: str) -> pa.Table:
    """The columns of `schema`, in its order, of a table that `stage` wrote.

    Raises SaeRayError if it lacks one or has one of another type.
    """
    table = folder.read_parquet(name)
    for field in schema:
        if field not in list(table.schema):
            raise SaeRayError(
                f"{folder / name} has no column {field.name!r} of type {field.type}; "
                f"delete {folder} and run the {stage} stage again"
            )
    return table.select(schema.names)
