"""Tables fit 80 columns, whatever is in them."""

import io
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplace.tables import WIDTH, bar, table

cell = st.text("ab1,.", max_size=14)


@given(st.data(), st.integers(2, 12), st.integers(1, 6))
def test_every_table_fits_and_loses_nothing(data: st.DataObject, columns: int, count: int) -> None:
    row = st.lists(cell, min_size=columns, max_size=columns)
    rows = data.draw(st.lists(row, min_size=count + 1, max_size=count + 1))
    shares = data.draw(st.lists(st.floats(0, 1), min_size=count, max_size=count))
    notes = ["a note that is said of this row, and is longer than a line has room"] * count
    lines = table(rows, bars=shares, notes=notes)
    assert all(len(line) <= WIDTH for line in lines)
    said = " ".join(lines)
    assert all(text in said for each in rows for text in each)


def test_a_table_with_bars_and_notes() -> None:
    rows = [("what", "price"), ("one", "1.5"), ("three", "3")]
    assert table(rows) == ["what   price", "one      1.5", "three      3"]
    bars = table(rows, bars=[0.5, None])
    assert bars[1].startswith("one      1.5  ")
    assert bars[2] == "three      3"
    assert table(rows, notes=["short", "x " * 50])[1:3] == ["one      1.5  short", "three      3"]


def test_bars_are_in_eighths_or_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed_as(encoding: str) -> None:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))

    printed_as("utf-8")
    assert [bar(x, 4) for x in (0.0, 1 / 32, 0.5, 1.0, 7.0)] == ["", "▏", "██", "████", "████"]
    printed_as("ascii")
    assert [bar(x, 4) for x in (0.0, 0.5, 1.0)] == ["", "##", "####"]
