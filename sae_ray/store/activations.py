"""The activation store: one vector per row, as plain parquet, in parts that exist completely or not at all.

A step's directory holds

- `data/part-00000-<unique>.parquet`: `image_index int64`, `token int16`, `activation` (fixed-size list of float16 or
  float32), sorted by (`image_index`, `token`). A part covers a fixed range of `image_index`.
- `parts/part-00000.json`: the marker that makes a part exist. It names the part's file, since object stores have no
  rename and a killed writer may leave other files. It also has the facts that later stages need before they read parts.
- `rejects.parquet` and `step.json`, once all parts exist.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, read_record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

REJECTS_SCHEMA = pa.schema([("image_id", pa.string()), ("reason", pa.string())])
ROW_GROUP_BYTES = 32 * 2**20
_NUMPY = {"float16": np.float16, "float32": np.float32}


@dataclass(frozen=True)
class Part:
    """The content of a part's marker."""

    file: str
    """Path of the parquet file inside the step's directory."""
    rows: int
    """Number of vectors in the part."""
    images: int
    """Number of images with rows; the other images of the range were rejected."""
    sum_squares: float
    """Sum over rows of the squared norm, for the scale that training divides by."""
    rejects: tuple[tuple[str, str], ...] = ()
    """(`image_id`, reason) of the images of this range that could not be read."""


def activation_table(
    image_index: Int[np.ndarray, " rows"],
    token: Int[np.ndarray, " rows"],
    activation: Float[np.ndarray, "rows d"],
    store_dtype: str,
) -> pa.Table:
    """The table to store.

    Raises SaeRayError if a value is not finite or does not fit into `store_dtype`.
    """
    if not np.isfinite(activation).all():
        raise SaeRayError('the encoder returned a value that is not finite; try encoder.dtype = "float32"')
    with np.errstate(over="ignore"):
        stored = activation.astype(_NUMPY[store_dtype])
    if not np.isfinite(stored).all():
        largest = float(np.abs(activation).max())
        raise SaeRayError(
            f'an activation of {largest:.3g} does not fit into extraction.store_dtype = "{store_dtype}"; '
            'set store_dtype = "float32"'
        )
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(stored.reshape(-1)), stored.shape[1])
    columns = [pa.array(image_index, pa.int64()), pa.array(token, pa.int16()), vectors]
    return pa.table(columns, names=["image_index", "token", "activation"])


def write_part(folder: Folder, number: int, table: pa.Table, rejects: Sequence[tuple[str, str]]) -> Part:
    """Writes a part and then its marker. If the writer is killed in between, the part does not exist."""
    name = part_name(number)
    file = f"data/{name}-{uuid.uuid4().hex[:8]}.parquet"
    width = table.schema.field("activation").type.list_size
    activation = _vectors(table)
    with folder.filesystem.open_output_stream(_made(folder, file)) as sink:
        row_bytes = max(1, activation.dtype.itemsize * width)
        pq.write_table(table, sink, row_group_size=max(1, ROW_GROUP_BYTES // row_bytes), compression="zstd")
    part = Part(
        file=file,
        rows=table.num_rows,
        images=len(np.unique(table["image_index"].to_numpy())),
        sum_squares=float(np.square(activation, dtype=np.float64).sum()),
        rejects=tuple(rejects),
    )
    folder.write_json(f"parts/{name}.json", asdict(part))
    return part


def finished_parts(folder: Folder) -> set[int]:
    """Numbers of the parts that exist."""
    markers = (folder / "parts").files()
    return {int(name.removeprefix("part-").removesuffix(".json")) for name in markers if name.endswith(".json")}


def read_parts(folder: Folder) -> list[Part]:
    """All markers, in order."""
    markers = [folder.read_json(f"parts/{part_name(number)}.json") for number in sorted(finished_parts(folder))]
    return [Part(**{**marker, "rejects": tuple(map(tuple, marker["rejects"]))}) for marker in markers]


def remove_orphans(folder: Folder, parts: Sequence[Part]) -> None:
    """Deletes files left by killed writers, so that any tool can read the data folder as a whole."""
    wanted = {part.file for part in parts}
    for name in (folder / "data").files():
        if f"data/{name}" not in wanted:
            folder.delete(f"data/{name}")


def write_rejects(folder: Folder) -> list[tuple[str, str]]:
    """Collects what the parts could not read into `rejects.parquet`: (`image_id`, reason), in order."""
    rejects = [reject for part in read_parts(folder) for reject in part.rejects]
    ids, reasons = ([reject[column] for reject in rejects] for column in range(2))
    folder.write_parquet("rejects.parquet", pa.table([ids, reasons], schema=REJECTS_SCHEMA))
    return rejects


def finish_store(step: Step, width: int, seconds: float) -> None:
    """Finishes an extraction step whose parts are all written, and deletes what killed writers left.

    Args:
        width: of the vectors.
        seconds: spent in this process.
    """
    parts = read_parts(step.folder)
    remove_orphans(step.folder, parts)
    counts = {
        "images": sum(part.images for part in parts),
        "rejects": sum(len(part.rejects) for part in parts),
        "rows": sum(part.rows for part in parts),
        "width": width,
    }
    step.finish(seconds, counts)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


class ActivationStore:
    """A finished extraction step, for reading.

    Raises SaeRayError if the step is not finished, damaged or of another schema version.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        self.record = read_record(folder)
        if self.record["stage"] != "extract":
            raise UsageError(f"{folder} is a {self.record['stage']} step, not activations; give an extract step")
        self.d = int(self.record["counts"]["width"])
        self.n_rows = int(self.record["counts"]["rows"])
        self.n_images = int(self.record["counts"]["images"])

    @cached_property
    def parts(self) -> list[Part]:
        return read_parts(self.folder)

    @property
    def root_mean_square_norm(self) -> float:
        """Root of the mean squared norm of all rows: the scale that training divides by."""
        return float(np.sqrt(sum(part.sum_squares for part in self.parts) / self.n_rows))

    def read(
        self, number: int
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"], Float[np.ndarray, "rows d"]]:
        """`image_index`, `token` and `activation` (in the stored dtype) of one part."""
        table = self.folder.read_parquet(self.parts[number].file)
        return table["image_index"].to_numpy(), table["token"].to_numpy(), _vectors(table)


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["activation"].combine_chunks()
    width = table.schema.field("activation").type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)


def _made(folder: Folder, name: str) -> str:
    path = folder.path_of(name)
    folder.filesystem.create_dir(path.rsplit("/", 1)[0], recursive=True)
    return path
