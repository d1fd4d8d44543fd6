"""Tables that need not fit into memory: parquet files, written and read group of rows by group of rows."""

from __future__ import annotations

import itertools
from bisect import bisect, bisect_left
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq

from sae_ray.store.files import Folder

GROUP_ROWS = 2**16
"""Of a row group, so that a few hundred rows anywhere in a table of any size are read in about a megabyte."""


class StoredTable:
    """A parquet file as a table."""

    def __init__(self, folder: Folder, name: str, scratch: TemporaryDirectory | None = None):
        """`scratch`: is deleted with this object."""
        self.folder = folder
        self.name = name
        self._scratch = scratch

    def __reduce__(self):
        return StoredTable, (self.folder, self.name)

    @property
    def num_rows(self) -> int:
        return _metadata(self.folder, self.name).num_rows

    @property
    def schema(self) -> pa.Schema:
        return _metadata(self.folder, self.name).schema.to_arrow_schema()

    def groups(self, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
        """The row groups, in order."""
        with self.folder.filesystem.open_input_file(self.folder.path_of(self.name)) as source:
            file = pq.ParquetFile(source)
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns)

    def slice(self, start: int, length: int) -> pa.Table:
        """Some rows. Their row groups are read whole; a process keeps the last ones for the next call."""
        ends = _ends(self.folder, self.name)
        wanted = range(bisect(ends, start), bisect_left(ends, start + length) + 1)
        groups = [_group(self.folder, self.name, number) for number in wanted if number < len(ends)]
        first = ends[wanted[0] - 1] if wanted[0] else 0
        return pa.concat_tables([self.schema.empty_table(), *groups]).slice(start - first, length)

    def read(self) -> pa.Table:
        """The whole table."""
        return self.folder.read_parquet(self.name)

    def __getitem__(self, column: str) -> pa.ChunkedArray:
        """A whole column."""
        return self.read()[column]


def spooled(schema: pa.Schema, tables: Iterable[pa.Table]) -> StoredTable:
    """Tables of this schema, one after the other, as one in a temporary file. It is deleted with the object."""
    scratch = TemporaryDirectory(prefix="sae-ray-")
    table = StoredTable(Folder(scratch.name), "table.parquet", scratch)
    with pq.ParquetWriter(f"{scratch.name}/{table.name}", schema, compression="zstd") as writer:
        for group in _in_groups(schema, tables):
            writer.write_table(group)
    return table


def _in_groups(schema: pa.Schema, tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    waiting = schema.empty_table()
    for table in itertools.chain(tables, [None]):
        if table is not None:
            waiting = pa.concat_tables([waiting, table])
        while waiting.num_rows >= GROUP_ROWS or (table is None and waiting.num_rows):
            yield waiting.slice(0, GROUP_ROWS).combine_chunks()
            waiting = waiting.slice(GROUP_ROWS)


@lru_cache(maxsize=4)
def _metadata(folder: Folder, name: str) -> pq.FileMetaData:
    with folder.filesystem.open_input_file(folder.path_of(name)) as source:
        return pq.read_metadata(source)


@lru_cache(maxsize=4)
def _ends(folder: Folder, name: str) -> list[int]:
    """The row after the last one of each row group."""
    found = _metadata(folder, name)
    return list(itertools.accumulate(found.row_group(number).num_rows for number in range(found.num_row_groups)))


@lru_cache(maxsize=2)
def _group(folder: Folder, name: str, number: int) -> pa.Table:
    with folder.filesystem.open_input_file(folder.path_of(name)) as source:
        return pq.ParquetFile(source, metadata=_metadata(folder, name), pre_buffer=True).read_row_group(number)
