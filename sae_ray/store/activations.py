"""The activation store: one vector per row, as plain parquet, in parts that exist completely or not at all.

A step's directory holds

- `data/part-00000-<unique>.parquet`: `image_index int64`, `token int16`, `activation` (fixed-size list of float16 or
  float32), sorted by (`image_index`, `token`), in row groups of `rows_per_group`. A part covers a fixed range of
  `image_index`.
- `parts/part-00000.json`, until the step is finished: the marker that makes a part exist. It names the part's file,
  since object stores have no rename and a killed writer may leave other files.
- `parts.parquet`: the parts of a finished step, in order, with the facts that later stages need before they read them.
- `rejects.parquet` and `step.json`.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.errors import UsageError
from sae_ray.store.files import Folder
from sae_ray.store.steps import Step, read_record

if TYPE_CHECKING:
    from jaxtyping import Float, Int

REJECTS_SCHEMA = pa.schema([("image_id", pa.string()), ("reason", pa.string())])
PARTS_SCHEMA = pa.schema(
    [("file", pa.string()), ("rows", pa.int64()), ("images", pa.int64()), ("sum_squares", pa.float64())]
)
ROW_GROUP_BYTES = 4 * 2**20
"""Of vectors. Training shuffles row groups, so a window of it holds images from that many places."""
READS_AT_ONCE = 16
"""Of small files."""
PIECE_BYTES = 256 * 2**20
"""Of vectors, which a task has in memory at once. Scores are summed piece by piece, so it is a part of their format."""


@dataclass(frozen=True, slots=True)
class Part:
    """What is known of a part without reading it."""

    file: str
    """Path of the parquet file inside the step's directory."""
    rows: int
    """Number of vectors in the part."""
    images: int
    """Number of images with rows; the other images of the range were rejected."""
    sum_squares: float
    """Sum over rows of the squared norm, for the scale that training divides by."""
    rejects: tuple[tuple[str, str], ...] = ()
    """(`image_id`, reason) of the images of this range that could not be read. `parts.parquet` does not repeat them."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Part:
        """The inverse of `asdict`, for what JSON makes of it."""
        return cls(**{**values, "rejects": tuple(map(tuple, values["rejects"]))})


class Rows(NamedTuple):
    """The rows of a part as they are stored, sorted by (`image_index`, `token`)."""

    image_index: Int[np.ndarray, " rows"]
    token: Int[np.ndarray, " rows"]
    activation: Float[np.ndarray, "rows d"]
    """In the stored dtype."""
    squares: Float[np.ndarray, " rows"]
    """Squared norm of every stored vector, float64."""

    def table(self) -> pa.Table:
        """The columns of the parquet file; the vectors are not copied."""
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(self.activation.reshape(-1)), self.activation.shape[1])
        columns = [pa.array(self.image_index, pa.int64()), pa.array(self.token, pa.int16()), vectors]
        return pa.table(columns, names=["image_index", "token", "activation"])


def write_part(folder: Folder, number: int, rows: Rows, rejects: Sequence[tuple[str, str]]) -> Part:
    """Writes a part and then its marker. If the writer is killed in between, the part does not exist."""
    name = part_name(number)
    file = f"data/{name}-{uuid.uuid4().hex[:8]}.parquet"
    # Hardly a vector occurs twice, and nobody asks for the smallest and largest number of a row group.
    plain: Any = ["image_index", "token"]
    with folder.filesystem.open_output_stream(folder.path_to_write(file)) as sink:
        pq.write_table(
            rows.table(),
            sink,
            row_group_size=rows_per_group(rows.activation.shape[1], rows.activation.itemsize),
            compression="zstd",
            use_dictionary=plain,
            write_statistics=plain,
        )
    part = Part(
        file=file,
        rows=len(rows.activation),
        images=len(np.unique(rows.image_index)),
        sum_squares=float(rows.squares.sum()),
        rejects=tuple(rejects),
    )
    folder.write_json(f"parts/{name}.json", asdict(part))
    return part


def rows_per_group(width: int, bytes_per_value: int) -> int:
    """Rows of all row groups but the last of a part."""
    return max(1, ROW_GROUP_BYTES // max(1, bytes_per_value * width))


def finished_parts(folder: Folder) -> set[int]:
    """Numbers of the parts that exist."""
    markers = (folder / "parts").files()
    return {int(name.removeprefix("part-").removesuffix(".json")) for name in markers if name.endswith(".json")}


def read_part(folder: Folder, number: int) -> Part:
    """The marker of a part. Raises FileNotFoundError where it is not written yet."""
    return Part.from_json(folder.read_json(f"parts/{part_name(number)}.json"))


def read_parts(folder: Folder, known: Mapping[int, Part] | None = None) -> list[Part]:
    """All parts that exist, in order. Markers are read of those that are not `known`."""
    known = known or {}

    def read(number: int) -> Part:
        return known.get(number) or read_part(folder, number)

    with ThreadPoolExecutor(READS_AT_ONCE) as readers:
        return list(readers.map(read, sorted(finished_parts(folder))))


def remove_orphans(folder: Folder, parts: Sequence[Part]) -> None:
    """Deletes files left by killed writers, so that any tool can read the data folder as a whole."""
    wanted = {part.file for part in parts}
    for name in (folder / "data").files():
        if f"data/{name}" not in wanted:
            folder.delete(f"data/{name}")


def discard_parts(folder: Folder) -> None:
    """Deletes all parts of a step that will not be finished."""
    for name in (folder / "parts").files():
        folder.delete(f"parts/{name}")
    remove_orphans(folder, [])


def write_rejects(folder: Folder, parts: Sequence[Part]) -> list[tuple[str, str]]:
    """Collects what the parts could not read into `rejects.parquet`: (`image_id`, reason), in order."""
    rejects = [reject for part in parts for reject in part.rejects]
    ids, reasons = ([reject[column] for reject in rejects] for column in range(2))
    folder.write_parquet("rejects.parquet", pa.table([ids, reasons], schema=REJECTS_SCHEMA))
    return rejects


def finish_store(step: Step, parts: Sequence[Part], width: int, seconds: float) -> None:
    """Finishes an extraction step whose parts are all written, and deletes what killed writers left.

    Args:
        parts: all of them, in order.
        width: of the vectors.
        seconds: spent in this process.
    """
    remove_orphans(step.folder, parts)
    columns = [[getattr(part, name) for part in parts] for name in PARTS_SCHEMA.names]
    step.folder.write_parquet("parts.parquet", pa.table(columns, schema=PARTS_SCHEMA))
    counts = {
        "images": sum(part.images for part in parts),
        "rejects": sum(len(part.rejects) for part in parts),
        "rows": sum(part.rows for part in parts),
        "width": width,
        "rows_per_group": rows_per_group(width, np.dtype(step.config["store_dtype"]).itemsize),
    }
    step.finish(seconds, counts)


def part_name(number: int) -> str:
    return f"part-{number:05d}"


class ActivationStore:
    """A finished extraction step, for reading. Parts are known by their numbers.

    Raises SaeRayError if the step is not finished, damaged or of another schema version.
    """

    def __init__(self, folder: Folder):
        self.folder = folder
        record = read_record(folder)
        if record["stage"] != "extract":
            raise UsageError(f"{folder} is a {record['stage']} step, not activations; give an extract step")
        self.config: dict = record["config"]
        self.d = int(record["counts"]["width"])
        self.n_rows = int(record["counts"]["rows"])
        self.n_images = int(record["counts"]["images"])
        self.rows_per_group = int(record["counts"]["rows_per_group"])

    @cached_property
    def parts(self) -> dict[int, Part]:
        return {number: Part(**row) for number, row in enumerate(self.folder.read_parquet("parts.parquet").to_pylist())}

    def only(self, numbers: Iterable[int]) -> ActivationStore:
        """The same store with some of its parts, to hand to a task: it need not read the list of all."""
        some = copy(self)
        some.parts = {number: self.parts[number] for number in numbers}
        return some

    @property
    def root_mean_square_norm(self) -> float:
        """Root of the mean squared norm of all rows: the scale that training divides by."""
        return float(np.sqrt(sum(part.sum_squares for part in self.parts.values()) / self.n_rows))

    def read(
        self, number: int, images: range | None = None
    ) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"], Float[np.ndarray, "rows d"]]:
        """`image_index`, `token` and `activation` (in the stored dtype) of one part.

        Args:
            number: the part's.
            images: only these of the part's images, counted without the rejected ones (`pieces`).
        """
        part = self.parts[number]
        if images is None or len(images) == part.images:
            table = self.folder.read_parquet(part.file)
        else:
            per_image = part.rows // part.images
            table = self._read_rows(part, images.start * per_image, images.stop * per_image)
        return table["image_index"].to_numpy(), table["token"].to_numpy(), _vectors(table)

    def _read_rows(self, part: Part, start: int, stop: int) -> pa.Table:
        size = self.rows_per_group
        first, last = start // size, -(-stop // size)
        with self.folder.filesystem.open_input_file(self.folder.path_of(part.file)) as source:
            table = pq.ParquetFile(source, pre_buffer=True).read_row_groups(range(first, last))
        return table.slice(start - first * size, stop - start)

    def pieces(self, number: int) -> list[range]:
        """The images of a part, for `read`, in runs whose vectors take about `PIECE_BYTES` at most."""
        part = self.parts[number]
        n_pieces = max(1, -(-part.rows * self.row_bytes // PIECE_BYTES))
        ends = [part.images * piece // n_pieces for piece in range(n_pieces + 1)]
        return [range(*ends) for ends in itertools.pairwise(ends)]

    @property
    def row_bytes(self) -> int:
        """Of a vector."""
        return self.d * np.dtype(self.config["store_dtype"]).itemsize

    def group_rows(self, number: int) -> list[int]:
        """Number of rows of each row group of a part."""
        rows, size = self.parts[number].rows, self.rows_per_group
        return [min(size, rows - start) for start in range(0, rows, size)]

    def read_groups(self, number: int, groups: Sequence[int]) -> Float[np.ndarray, "rows d"]:
        """The vectors of some row groups of one part, in the stored dtype."""
        if len(groups) == len(self.group_rows(number)):
            return _vectors(self.folder.read_parquet(self.parts[number].file))
        return _vectors(self._read_groups(number, groups, "activation"))

    def images_of_groups(self, number: int, groups: Sequence[int]) -> Int[np.ndarray, " rows"]:
        """The `image_index` of the rows that `read_groups` gives."""
        return self._read_groups(number, groups, "image_index")["image_index"].to_numpy()

    def _read_groups(self, number: int, groups: Sequence[int], column: str) -> pa.Table:
        with self.folder.filesystem.open_input_file(self.folder.path_of(self.parts[number].file)) as source:
            return pq.ParquetFile(source, pre_buffer=True).read_row_groups(groups, columns=[column])


def _vectors(table: pa.Table) -> np.ndarray:
    column = table["activation"].combine_chunks()
    width = table.schema.field("activation").type.list_size
    return column.flatten().to_numpy(zero_copy_only=False).reshape(-1, width)
