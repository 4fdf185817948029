"""`top`: the cells of a line, its bars and its width."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from test_top_rows import row
from top_fleet import FakeFleet

from qmpballoon.top.columns import (
    ASCII,
    Cell,
    bar,
    clipped,
    column_at,
    columns,
    fitted,
    header,
    host_cells,
    vm_cells,
)
from qmpballoon.top.rows import host_row
from qmpballoon.units import GIB, MIB


def text_of(cells: list[Cell]) -> str:
    return "".join(text for text, _ in cells)


def titles(width: int) -> list[str]:
    return [column.title for column in columns(width)]


def test_a_narrow_terminal_has_the_columns_that_matter_and_a_wide_one_all() -> None:
    assert titles(79) == ["NAME", "HEALTH", "", "HELD", "AVAIL", "BALLOON", "WHY"]
    assert titles(60) == ["NAME", "HEALTH", "AVAIL", "WHY"]
    assert len(titles(200)) == 12


@pytest.mark.parametrize("width", [51, 60, 79, 80, 100, 133, 160])
def test_the_columns_fill_the_width(width: int) -> None:
    shown = columns(width)
    filled = sum(column.width for column in shown) + len(shown) - 1
    assert filled <= width
    assert filled == width or all(column.width == column.widest for column in shown if column.grows)


def test_the_title_and_the_column_at_a_position_belong_together() -> None:
    shown = columns(100)
    line = header(shown, "held", reverse=False, glyphs=ASCII)
    assert "HELDv" in line
    found = column_at(shown, line.index("HELDv"))
    assert found is not None
    assert found.sort == "held"
    assert column_at(shown, 1000) is None
    assert "HELD^" in header(shown, "held", reverse=True, glyphs=ASCII)


def test_a_bar_shows_held_available_and_balloon() -> None:
    made = row(size=200 * MIB, actual=100 * MIB, available=50 * MIB)
    assert bar(made, 8, ASCII) == [("##", "held"), ("==", "available"), ("....", "balloon")]


def test_a_bar_without_statistics_shows_what_the_guest_has() -> None:
    made = row(size=200 * MIB, actual=100 * MIB, held=None)
    assert bar(made, 8, ASCII) == [("||||", "unknown"), ("....", "balloon")]


@pytest.mark.parametrize("size", [None, 0, -5])
def test_a_vm_of_unknown_size_has_an_empty_bar(size: int | None) -> None:
    assert bar(row(size=size), 8, ASCII) == [(" " * 8, "plain")]


figures = st.one_of(st.none(), st.integers(-(2**70), 2**70))


@given(size=figures, actual=figures, held=figures, name=st.text(max_size=100), width=st.integers(1, 200))
def test_a_line_is_as_wide_as_the_terminal_whatever_is_claimed(
    size: int | None, actual: int | None, held: int | None, name: str, width: int
) -> None:
    made = row("x", size=size, actual=actual, held=held, available=1, why=name, health=name or "ok")
    cells = clipped(vm_cells(made, columns(width), name=name), width)
    assert sum(cell_len(text) for text, _ in cells) == width


@pytest.mark.parametrize("width", [20, 40, 79, 120, 200])
def test_the_line_of_a_host_leaves_out_what_does_not_fit(width: int) -> None:
    fleet = FakeFleet()
    fleet.host("edge-7", alarms=["over-budget"])
    line = text_of(host_cells(host_row(fleet.hosts["edge-7"], "edge-7", 4, 3), width, ASCII))
    assert cell_len(line) == width
    assert line.split()[:2] == ["edge-7", "ok"][: len(line.split())]
    assert ("over-budget" in line) == (width >= 79)
    assert ("fairshare auto" in line) == (width >= 120)


def test_the_line_of_a_host_over_its_budget_is_bad() -> None:
    fleet = FakeFleet()
    fleet.host("edge-7", used=9 * GIB)
    cells = host_cells(host_row(fleet.hosts["edge-7"], "edge-7", 1, 1), 80, ASCII)
    assert ("#" * 10, "bad") in cells
    assert sum(cell_len(text) for text, _ in cells) == 80


def test_the_bar_of_a_host_stands_above_those_of_its_vms_on_a_wide_terminal() -> None:
    fleet = FakeFleet()
    fleet.host("edge-7")
    of_host = text_of(host_cells(host_row(fleet.hosts["edge-7"], "edge-7", 1, 1), 120, ASCII))
    of_vm = text_of(vm_cells(row(), columns(120), ASCII))
    assert of_host.index("#") == of_vm.index("#")
    assert of_host.rindex(".", 0, 70) == of_vm.rindex(".", 0, 70)


def test_the_line_of_a_host_that_is_gone_says_so() -> None:
    line = text_of(host_cells(host_row(None, "edge-7", 4, 0), 80, ASCII))
    assert "0/4 VMs: its agent is not connected" in line


def test_wide_characters_count_twice() -> None:
    assert fitted("日本語", 4) == "日 ."
    assert fitted("ab", 4, right=True) == "  ab"
    assert fitted("abcdef", 4) == "abc."
