"""Text tables: every cell stands in its column."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_ray.text_table import table_lines


def test_a_known_table():
    rows = [["", "neurons", "top images"], ["raw", "64", "star"], ["projection", "1,024", ""]]
    assert table_lines(rows, "<><") == [
        "            neurons  top images",
        "raw              64  star",
        "projection    1,024",
    ]


def test_no_rows_and_one_column():
    assert table_lines([], "<>") == []
    assert table_lines([["a"], ["long"]], ">") == ["   a", "long"]


def test_a_row_of_another_length():
    with pytest.raises(ValueError, match="3 cells"):
        table_lines([["a", "b"]], "<<<")


TABLES = st.integers(1, 5).flatmap(
    lambda width: st.tuples(
        st.lists(st.lists(st.text("ab,.–²", max_size=6), min_size=width, max_size=width), min_size=1, max_size=5),
        st.text("<>", min_size=width, max_size=width),
    )
)


@given(TABLES)
def test_columns_are_cut_back_into_their_cells(table):
    rows, align = table
    widths = [max(len(row[column]) for row in rows) for column in range(len(align))]
    for row, line in zip(rows, table_lines(rows, align), strict=True):
        assert line == line.rstrip()
        line = line.ljust(sum(widths) + 2 * (len(widths) - 1))
        for text, side, width in zip(row, align, widths, strict=True):
            cell, line = line[:width], line[width + 2 :]
            assert cell.strip() == text
            assert cell == (text.ljust(width) if side == "<" else text.rjust(width))
