"""Tables as files: what is read piece by piece is what was written, and what any reader of parquet reads."""

import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.store import tables
from sae_ray.store.files import Folder
from sae_ray.store.tables import StoredTable, spooled

SCHEMA = pa.schema([pa.field("number", pa.int64(), nullable=False), pa.field("name", pa.string())])


@pytest.fixture(scope="module", autouse=True)
def small_groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "GROUP_ROWS", 10)
        yield


def rows(n: int) -> pa.Table:
    return pa.table([range(n), [f"é{number}" if number % 3 else None for number in range(n)]], schema=SCHEMA)


@given(n=st.integers(0, 45), piece=st.integers(1, 25), start=st.integers(0, 50), length=st.integers(1, 50))
def test_any_slice_is_that_of_the_whole(n: int, piece: int, start: int, length: int):
    whole = rows(n)
    stored = spooled(SCHEMA, (whole.slice(first, piece) for first in range(0, n, piece)))
    assert (stored.num_rows, stored.schema) == (n, SCHEMA)
    assert stored.read().equals(whole)
    assert [group.num_rows for group in stored.groups()] == [min(10, n - first) for first in range(0, n, 10)]
    assert stored.slice(start, length).equals(whole.slice(start, length))


def test_tables_of_other_groups_are_sliced_too(tmp_path: Path):
    """As earlier versions wrote them."""
    pq.write_table(rows(33), tmp_path / "table.parquet", row_group_size=7)
    stored = StoredTable(Folder(tmp_path), "table.parquet")
    assert stored.slice(12, 11).equals(rows(33).slice(12, 11))
    assert pickle.loads(pickle.dumps(stored)).slice(30, 9).equals(rows(33).slice(30, 9))


def test_a_table_of_one_group_is_the_file_that_pyarrow_writes(tmp_path: Path):
    Folder(tmp_path).write_parquet("table.parquet", rows(9))
    stored = spooled(SCHEMA, [rows(9).slice(0, 4), rows(9).slice(4)])
    assert stored.folder.read_bytes(stored.name) == (tmp_path / "table.parquet").read_bytes()


def test_a_temporary_table_goes_with_its_last_user():
    stored = spooled(SCHEMA, [rows(3)])
    folder = Path(stored.folder.path)
    groups = stored.groups()
    assert next(groups)["number"].to_pylist() == [0, 1, 2]
    assert folder.exists()
    del stored, groups
    assert not folder.exists()
