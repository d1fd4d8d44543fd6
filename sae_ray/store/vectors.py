"""Vectors from elsewhere: tensors, arrays, files and datasets, read in blocks and written as an activation store."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch

from sae_ray.errors import SaeRayError, UsageError
from sae_ray.store.activations import Part, discard_parts, finish_store, write_part
from sae_ray.store.casting import stored_rows
from sae_ray.store.files import Folder, writing
from sae_ray.store.steps import Step, hold

if TYPE_CHECKING:
    from jaxtyping import Float, Int

ROWS_PER_PART = 4096
FORMS = "a tensor, an array, a .npy, .parquet or .safetensors file, a table, a data frame or a Hugging Face dataset"


class Vectors:
    """`n` vectors of width `d`, read a block at a time.

    Args:
        source: a [n, d] torch tensor or numpy array; the path of a `.npy`, `.parquet` or `.safetensors` file, of a
            folder with `.parquet` files in it or below, read in the order of their paths, folder by folder, or of a
            Hugging Face dataset that was saved to disk; a pyarrow table, a data frame of pandas or polars, a Hugging
            Face dataset, or a column of one; or anything else of length n whose slices numpy makes [rows, d] of, such
            as a dataset of h5py or zarr.
        column: the column of a table, data frame or dataset, or the tensor of a `.safetensors` file; needed where there
            are several. Without it, a data frame of numbers alone is a matrix.

    Raises:
        UsageError: it is none of these, not [n, d] with n and d of at least 1, or not of real numbers; there is no such
            column.
        SaeRayError: numpy masks some of its values.
    """

    def __init__(self, source: Any, column: str | None = None):
        self.name = str(source) if isinstance(source, str | Path) else type(source).__name__
        self._read, self.n = self._reader(source, column)
        if self.n == 0:
            raise UsageError(f"{self.name} has no rows; give vectors of shape [n, d]")
        first = self._read(slice(0, 1))
        if first.ndim != 2 or first.shape[1] == 0:
            shape = [self.n, *first.shape[1:]]
            raise UsageError(f"{self.name} has shape {shape}; give [n, d], for example x.reshape(-1, x.shape[-1])")
        if first.dtype.kind not in "fiu":
            raise UsageError(f"{self.name} holds {first.dtype}; give real numbers")
        self.d = first.shape[1]
        self.dtype = "float16" if first.dtype == np.float16 else "float32"
        """That they are stored in: as they are, or rounded from float64."""

    def blocks(self, rows: int = ROWS_PER_PART) -> Iterator[Float[np.ndarray, "rows d"]]:
        """All vectors in order, in `dtype`.

        Raises SaeRayError naming the first row with a value that is not finite, that does not fit, or that cannot be
        read.
        """
        for start in range(0, self.n, rows):
            block = self._block(start, min(start + rows, self.n))
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                row = start + int(bad.argmax())
                raise SaeRayError(f"{self.name}: row {row} is not finite as {self.dtype}; leave it out")
            yield block

    def _block(self, start: int, stop: int) -> Float[np.ndarray, "rows d"]:
        try:
            block = self._read(slice(start, stop))
            if block.shape != (wanted := (stop - start, self.d)):
                raise ValueError(f"it has shape {list(block.shape)}, not {list(wanted)}")
            if block.dtype.kind not in "fiu":
                raise ValueError(f"it holds {block.dtype}, not real numbers")
            with np.errstate(over="ignore"):
                return np.require(block, self.dtype, ["C", "W"])  # torch warns of arrays that are mapped read-only
        except (OSError, TypeError, ValueError) as error:
            for row in range(start, stop) if stop - start > 1 else ():
                self._block(row, row + 1)  # the first one that is at fault is named
            raise SaeRayError(
                f"{self.name}: row {start} cannot be read ({error}); write it again or leave it out"
            ) from error

    def only(self, rows: Int[np.ndarray, " rows"]) -> Vectors:
        """The vectors of some rows, which are ascending."""

        def read(part: slice) -> np.ndarray:
            wanted = rows[part]
            return self._read(slice(int(wanted[0]), int(wanted[-1]) + 1))[wanted - wanted[0]]

        some = copy(self)
        some.n, some._read = len(rows), read
        return some

    def _reader(self, source: Any, column: str | None) -> tuple[Callable[[slice], np.ndarray], int]:
        if isinstance(source, str | Path):
            path = _path(source)
            source = _opened(path, column)
            if path.suffix == ".safetensors":
                column = None  # it named the tensor
        names: list[str] | None = getattr(source, "column_names", None)
        if names is not None:
            name = _column(self.name, names, column)
            if hasattr(source, "with_format"):  # a Hugging Face dataset
                source, rows = source.with_format("numpy", columns=[name]), len(source)
                return lambda some: np.asarray(source[some][name]), rows
            source = source[name]
        elif hasattr(source, "columns") and hasattr(source, "to_numpy"):
            source = _of_frame(self.name, source, column)
        elif column is not None:
            raise UsageError(f"column = {column!r}, but {self.name} has no columns; leave column out")
        if isinstance(source, torch.Tensor):
            if source.layout != torch.strided or source.is_meta:
                kind = "without values" if source.is_meta else f"of layout {source.layout}"
                raise UsageError(f"{self.name} is a tensor {kind}; give a dense one, as x.to_dense() makes it")
            return lambda some: _array(source[some]), len(source) if source.ndim else 0
        if isinstance(source, pa.Array):
            source = pa.chunked_array([source])
        if isinstance(source, pa.ChunkedArray):
            return lambda some: _lists(source[some]), len(source)
        if hasattr(source, "to_numpy"):  # a series of pandas or polars; numpy's slices are places, whatever its index
            source = source.to_numpy()
        if np.ma.is_masked(source):
            raise SaeRayError(f"{self.name} has masked values, which are no numbers; leave their rows out")
        try:
            n = len(source)
            np.asarray(source[:1])
        except (TypeError, KeyError, ValueError, IndexError) as error:
            raise UsageError(f"cannot read vectors from {self.name} ({error}); give {FORMS}") from error
        return lambda some: _stacked(source[some]), n


def write_vectors(
    vectors: Vectors,
    root: Folder,
    label: str,
    images_per_part: int = ROWS_PER_PART,
    rows_per_image: int = 1,
    manifest: str | None = None,
) -> Step:
    """Writes vectors as a finished activation store, unless it is there.

    Args:
        vectors: the rows of an image stand together. Row i is of image i // `rows_per_image`, and its token is its
            place there; with one row per image it has none.
        manifest: name of the step that says which images these are.

    Raises SaeRayError as `Vectors.blocks` does, or if they cannot be written; then nothing is left of them.
    """
    content = hashlib.sha256()
    for block in vectors.blocks():
        content.update(block.data)
    config = {
        "vectors": content.hexdigest(),
        "width": vectors.d,
        "store_dtype": vectors.dtype,
        "images_per_part": images_per_part,
        "rows_per_image": rows_per_image,
        **({"manifest": manifest} if manifest is not None else {}),
    }
    step, started = Step(root, "extract", label, config), time.monotonic()
    with writing(step.folder):
        if not step.finished:
            with hold([step]):
                try:
                    finish_store(step, _written(vectors, step), vectors.d, time.monotonic() - started)
                except OSError:
                    with suppress(OSError):
                        discard_parts(step.folder)
                    raise
    return step


def _written(vectors: Vectors, step: Step) -> list[Part]:
    per_image, per_part = step.config["rows_per_image"], step.config["images_per_part"]
    parts = []
    for number, block in enumerate(vectors.blocks(per_part * per_image)):
        row = np.arange(len(block))
        image_index = row // per_image + number * per_part
        token = row % per_image if per_image > 1 else np.full(len(block), -1)
        rows = stored_rows(image_index, token.astype(np.int16), block, vectors.dtype)
        parts.append(write_part(step.folder, number, rows, []))
    return parts


def _path(name: str | Path) -> Path:
    if not str(name) or "://" in str(name):
        what = "is not on this machine; copy it here" if str(name) else "is no file"
        raise UsageError(f"{str(name)!r} {what}, and give its path")
    try:
        return Path(name).expanduser()
    except RuntimeError as error:  # of a user whom this machine does not know
        raise UsageError(f"{str(name)!r} is no path here ({error}); write the folder out") from error


def _opened(path: Path, column: str | None) -> Any:
    """What a file holds; of a `.npy` file only what is read is loaded."""
    if not path.exists():
        raise UsageError(f"there is no file {path}")
    try:
        if (path / "state.json").exists():
            return _dataset(path)
        if path.is_dir():
            return _table(path, column)
        match path.suffix:
            case ".npy":
                return np.load(path, mmap_mode="r")
            case ".parquet":
                return _table(path, column)
            case ".safetensors":
                from safetensors import safe_open

                with safe_open(path, "pt") as file:
                    return file.get_tensor(_column(str(path), list(file.keys()), column))
    except UsageError:
        raise
    except Exception as error:  # each library has errors of its own
        raise UsageError(f"{path} cannot be read ({error}); write it again") from error
    raise UsageError(
        f"{path} is not a .npy, .parquet or .safetensors file; save the vectors as one of these, or load them in "
        "Python and give the array itself"
    )


def _dataset(path: Path) -> Any:
    try:
        from datasets import load_from_disk
    except ImportError as error:
        raise UsageError(f"{path} is a Hugging Face dataset; install sae-ray[datasets] to read it") from error
    return load_from_disk(str(path))


def _table(path: Path, column: str | None) -> Any:
    """The column of a file or of a folder of files, as a table."""
    from pyarrow.dataset import dataset

    files = path
    if path.is_dir():  # others may lie beside them, such as checkpoints of Jupyter
        below = (file for file in path.rglob("*.parquet") if file.is_file())
        files = [str(file) for file in sorted(below) if not _hidden(file.relative_to(path))]
        if not files:
            raise UsageError(f"{path} holds no .parquet files; name the file that has the vectors")
    found = dataset(files, format="parquet")
    return found.to_table(columns=[_column(str(path), found.schema.names, column)])


def _column(name: str, names: list[str], column: str | None) -> str:
    if column is None and len(names) == 1:
        return names[0]
    if column in names:
        return column
    asked = "several columns" if column is None else f"no column {column!r}"
    choices = ", ".join(map(str, names))
    raise UsageError(f"{name} has {asked}; choose one as column (--column), or give it alone: {choices}")


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _of_frame(name: str, frame: Any, column: str | None) -> Any:
    """A column of a data frame, or all of them as a matrix."""
    if column is None and (matrix := frame.to_numpy()).dtype.kind in "fiu":
        return matrix
    return frame[_column(name, list(frame.columns), column)]


def _stacked(rows: Any) -> np.ndarray:
    """Rows as a matrix, also where each is an object of its own, as in a column of a data frame."""
    block = np.asarray(rows)
    if block.dtype != object or block.ndim != 1:
        return block
    try:
        return np.array([np.asarray(row) for row in block])
    except ValueError:  # they differ in width
        return block


def _array(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _lists(column: Any) -> np.ndarray:
    """Rows of a column of lists, of fixed size or not."""
    values = column.combine_chunks()
    if isinstance(values, pa.ExtensionArray):  # of tensors
        values = values.storage
    if values.null_count:
        raise SaeRayError("the column has rows without a vector; leave them out")
    if not hasattr(values, "flatten") or not hasattr(values.type, "value_type"):
        return values.to_numpy(zero_copy_only=False)
    flat = values.flatten().to_numpy(zero_copy_only=False)
    if len(flat) % len(values):
        raise SaeRayError("the vectors of the column differ in width; give vectors of one width")
    return flat.reshape(len(values), -1)
