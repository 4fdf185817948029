"""The cells of a line: which columns fit a width, what stands in them, and the bars. Pure.

A cell is a text and the name of its style; a line is as wide as the terminal, whatever a VM is called.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final, TypeAlias

from rich.cells import cell_len, set_cell_size

from qmpballoon.top.rows import UNKNOWN, HostRow, SortKey, View, VmRow
from qmpballoon.units import format_size

Cell: TypeAlias = tuple[str, str]
"""A text and its style: a `Tone`, or ``held``, ``available``, ``balloon``, ``unknown`` of a bar."""


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What bars and charts are drawn with; they differ without colour as well."""

    held: str
    available: str
    balloon: str
    unknown: str
    up: str
    down: str


BLOCKS: Final = Glyphs("█", "▒", "░", "▌", "▲", "▼")
ASCII: Final = Glyphs("#", "=", ".", "|", "^", "v")


@dataclass(frozen=True, slots=True)
class Column:
    """A column and its width; ``grows`` is its part of what a wide terminal has left, up to ``widest``."""

    title: str
    width: int
    sort: SortKey | None = None
    right: bool = False
    grows: int = 0
    widest: int = 0
    rank: int = 0  # the larger, the earlier it is left out of a narrow terminal


_COLUMNS: Final = (
    Column("NAME", 14, "name", grows=2, widest=32),
    Column("HEALTH", 13, "health"),
    Column("", 9, grows=4, widest=48, rank=1),
    Column("HELD", 8, "held", right=True, rank=2),
    Column("AVAIL", 8, "available", right=True),
    Column("BALLOON", 8, "balloon", right=True, rank=3),
    Column("ACTUAL", 8, right=True, rank=6),
    Column("SIZE", 8, "size", right=True, rank=5),
    Column("TARGET", 8, right=True, rank=7),
    Column("RSS", 8, right=True, rank=8),
    Column("MODE", 7, rank=9),
    Column("WHY", 13, grows=1, widest=20),
)
_HOST_AND_NAME: Final = 22
_ALIGNED: Final = 100  # columns from which the bar of a host stands above those of its VMs
_LEVEL_WIDTH: Final = 7
_GAP: Final = 1


@lru_cache(maxsize=16)
def columns(width: int, view: View = "tree") -> tuple[Column, ...]:
    """Return the columns for a terminal of this width, with their widths; they grow to fill it."""
    chosen = list(_COLUMNS)
    if view == "vms":  # names have their host before them
        chosen[0] = replace(chosen[0], width=_HOST_AND_NAME)
    for leaves in sorted(_COLUMNS, key=lambda column: -column.rank):
        if leaves.rank == 0 or _total(chosen) <= width:
            break
        chosen.remove(leaves)
    left = width - _total(chosen)
    while left > 0:
        growing = [each for each in chosen if each.grows and each.width < each.widest]
        if not growing:
            break
        first = min(growing, key=lambda column: column.width / column.grows)
        chosen[chosen.index(first)] = replace(first, width=first.width + 1)
        left -= 1
    return tuple(chosen)


def _total(chosen: Sequence[Column]) -> int:
    return sum(column.width for column in chosen) + _GAP * (len(chosen) - 1)


def header(shown: Sequence[Column], key: SortKey, *, reverse: bool, glyphs: Glyphs = BLOCKS) -> str:
    """Return the line of titles; a mark shows by which column the rows are sorted, and how."""
    titles = []
    for column in shown:
        mark = (glyphs.up if reverse else glyphs.down) if column.sort == key else ""
        titles.append(fitted(column.title + mark, column.width, right=column.right))
    return (" " * _GAP).join(titles)


def column_at(shown: Sequence[Column], x: int) -> Column | None:
    """Return the column at a position of a line."""
    for column in shown:
        if x < column.width:
            return column
        x -= column.width + _GAP
    return None


def vm_cells(
    row: VmRow, shown: Sequence[Column], glyphs: Glyphs = BLOCKS, *, name: str | None = None
) -> list[Cell]:
    """Return the cells of a VM's line; ``name`` is shown instead of its own."""
    cells: list[Cell] = []
    for number, column in enumerate(shown):
        if number:
            cells.append((" " * _GAP, "plain"))
        if column.title == "NAME":
            text = fitted(row.name if name is None else name, column.width)
            cells.append((text, "plain" if row.online else "quiet"))
        elif column.title == "HEALTH":
            cells.append((fitted(row.health, column.width), row.tone))
        elif column.title == "WHY":
            cells.append((fitted(row.why, column.width), row.why_tone))
        elif not column.title:
            cells += bar(row, column.width, glyphs)
        else:
            cells.append((fitted(_TEXTS[column.title](row), column.width, right=column.right), "plain"))
    return cells


_TEXTS: Final[dict[str, Callable[[VmRow], str]]] = {
    "HELD": lambda row: format_size(row.held),
    "AVAIL": lambda row: format_size(row.available),
    "BALLOON": lambda row: format_size(row.balloon),
    "ACTUAL": lambda row: format_size(row.actual),
    "SIZE": lambda row: format_size(row.size),
    "TARGET": lambda row: format_size(row.target),
    "RSS": lambda row: format_size(row.rss),
    "MODE": lambda row: row.mode,
}


def bar(row: VmRow, width: int, glyphs: Glyphs = BLOCKS) -> list[Cell]:
    """Return the bar of a VM's size: held, available, balloon; ``unknown``: the guest reports nothing."""
    if not row.size or row.size < 0 or row.actual is None:
        return [(" " * width, "plain")]
    actual = _cells(row.actual, row.size, width)
    if row.held is None:
        parts = [(glyphs.unknown * actual, "unknown")]
    else:
        held = min(actual, _cells(row.held, row.size, width))
        parts = [(glyphs.held * held, "held"), (glyphs.available * (actual - held), "available")]
    return [part for part in (*parts, (glyphs.balloon * (width - actual), "balloon")) if part[0]]


def _cells(part: int, whole: int, width: int) -> int:
    """Return how many cells show a part: at least one of what is there, and never more than there are."""
    return max(0, min(width, max(round(part * width / whole), int(part > 0))))


def host_cells(row: HostRow, width: int, glyphs: Glyphs = BLOCKS) -> list[Cell]:
    """Return the cells of a host's line: its level, a bar of its budget, the figures that fit."""
    name, health, of_bar = (column.width for column in columns(max(width, _ALIGNED))[:3])
    level, wide = (health, of_bar) if width >= _ALIGNED else (_LEVEL_WIDTH, max(6, width // 8))
    cells: list[Cell] = [
        (fitted(row.name, name), "host" if row.online else "quiet"),
        (" ", "plain"),
        (fitted(row.level, level), row.tone),
    ]
    counted = f"{row.vms_online}/{row.vms} VMs"
    if not row.online:
        return clipped([*cells, (f" {counted}: its agent is not connected", "quiet")], width)
    more: list[list[Cell]] = []
    if row.budget is not None and row.budget > 0 and row.used is not None:
        used = _cells(row.used, row.budget, wide)
        style = "bad" if row.used > row.budget else "held"
        more.append(
            [(" ", "plain"), (glyphs.held * used, style), (glyphs.balloon * (wide - used), "balloon")]
        )
        more.append([(f" {format_size(row.used)} of {format_size(row.budget)}", "plain")])
    more.append([(f"  {counted}", "plain")])
    more += [[(f"  {alarm}", "bad")] for alarm in row.alarms]
    if row.room is not None:
        more.append([(f"  room {format_size(row.room)}", "plain")])
    if row.policy != UNKNOWN:
        more.append([(f"  {row.policy} {row.mode}", "quiet")])
    if row.mem_available is not None:
        more.append([(f"  host {format_size(row.mem_available)} available", "quiet")])
    for part in more:
        if sum(cell_len(text) for text, _ in (*cells, *part)) <= width:
            cells += part
    return clipped(cells, width)


def clipped(cells: Sequence[Cell], width: int) -> list[Cell]:
    """Return the cells in exactly this width; those that do not fit as a whole are cut or left out."""
    found: list[Cell] = []
    for text, style in cells:
        long = cell_len(text)
        if long > width:
            if width > 0:
                found.append((set_cell_size(text, width), style))
            return found
        found.append((text, style))
        width -= long
    return [*found, (" " * width, "plain")] if width else found


def fitted(text: str, width: int, *, right: bool = False) -> str:
    """Return a text in exactly this many cells; a longer one ends with a dot."""
    long = cell_len(text)
    if long > width:
        return set_cell_size(text, width - 1) + "." if width else ""
    blank = " " * (width - long)
    return blank + text if right else text + blank
