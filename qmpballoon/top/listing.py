"""The list of hosts and VMs: only the lines that are visible are drawn, however many there are."""

from __future__ import annotations

from itertools import groupby
from typing import ClassVar, Final

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from qmpballoon.top.columns import (
    Cell,
    Column,
    Glyphs,
    clipped,
    column_at,
    columns,
    header,
    host_cells,
    vm_cells,
)
from qmpballoon.top.picture import Picture
from qmpballoon.top.rows import Row, SortKey, VmRow

STYLES: Final = (
    "good",
    "warning",
    "bad",
    "quiet",
    "plain",
    "host",
    "held",
    "available",
    "balloon",
    "unknown",
)
CLASSES: Final[set[str]] = {f"cell--{name}" for name in (*STYLES, "cursor")}
CELL_CSS: Final = """
    & > .cell--good { color: $text-success; }
    & > .cell--warning { color: $text-warning; }
    & > .cell--bad { color: $text-error; text-style: bold; }
    & > .cell--quiet { color: $text-muted; }
    & > .cell--host { color: $text-primary; text-style: bold; }
    & > .cell--held { color: $primary; }
    & > .cell--available { color: $success; }
    & > .cell--balloon { color: $foreground 35%; }
    & > .cell--unknown { color: $warning 60%; }
    & > .cell--cursor { background: $primary 25%; }
"""


def segments(widget: Widget, cells: list[Cell], *, is_cursor: bool = False) -> list[Segment]:
    """Return cells as Textual draws them, in the widget's colours; their text is never read as markup."""
    styles = {name: widget.get_component_rich_style(f"cell--{name}") for _, name in cells}
    if is_cursor:
        colour = widget.get_component_rich_style("cell--cursor").bgcolor
        has_shades = widget.app.console.color_system in ("256", "truecolor")
        cursor = Style(bgcolor=colour) if has_shades else Style(reverse=True)
        styles = {name: style + cursor for name, style in styles.items()}
    runs = groupby(cells, key=lambda cell: cell[1])  # a style is sent to the terminal once for its run
    return [Segment("".join(text for text, _ in run), styles[name]) for name, run in runs]


class Titles(Widget):
    """The line of column titles; a click on one sorts by it."""

    DEFAULT_CSS = """
    Titles { height: 1; width: 1fr; background: $boost; color: $text-muted; text-style: bold; }
    """

    class Clicked(Message):
        """A title was clicked."""

        def __init__(self, key: SortKey) -> None:
            super().__init__()
            self.key = key

    def __init__(self, picture: Picture, glyphs: Glyphs) -> None:
        super().__init__()
        self._picture = picture
        self._glyphs = glyphs

    def render_line(self, y: int) -> Strip:
        """Draw the titles."""
        wishes = self._picture.wishes
        text = (
            "HOST"
            if wishes.view == "hosts"
            else header(self._shown(), wishes.key, reverse=wishes.reverse, glyphs=self._glyphs)
        )
        return Strip([Segment(text, self.rich_style)]).adjust_cell_length(self.size.width, self.rich_style)

    def on_click(self, event: events.Click) -> None:
        """Sort by the column."""
        column = column_at(self._shown(), event.x)
        if column is not None and column.sort is not None and self._picture.wishes.view != "hosts":
            self.post_message(self.Clicked(column.sort))

    def _shown(self) -> tuple[Column, ...]:
        return columns(self.size.width - Listing.SCROLLBAR, self._picture.wishes.view)


class Listing(ScrollView, can_focus=True):
    """The rows of a picture. The cursor stays on its row while others come, go and change places."""

    SCROLLBAR: ClassVar[int] = 1
    COMPONENT_CLASSES: ClassVar[set[str]] = CLASSES
    DEFAULT_CSS = (
        """
    Listing { height: 1fr; width: 1fr; background: $background; color: $foreground; overflow-x: hidden;
        overflow-y: scroll; scrollbar-size-vertical: 1;
    """
        + CELL_CSS
        + "}"
    )
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup,ctrl+b", "page(-1)", "Page up", show=False),
        Binding("pagedown,ctrl+f,space", "page(1)", "Page down", show=False),
        Binding("home,g", "end(-1)", "First", show=False),
        Binding("end,G", "end(1)", "Last", show=False),
    ]

    at = reactive(0, repaint=False)
    """The line of the cursor."""

    class Moved(Message):
        """The cursor is on another row, or the row changed."""

    class Opened(Message):
        """A VM was chosen with Enter or a double click."""

    def __init__(self, picture: Picture, glyphs: Glyphs) -> None:
        super().__init__()
        self._picture = picture
        self._glyphs = glyphs
        self._drawn: list[Row] = []

    @property
    def row(self) -> Row | None:
        """The row under the cursor."""
        rows = self._picture.rows
        return rows[self.at] if 0 <= self.at < len(rows) else None

    def refresh_rows(self) -> int:
        """Draw the picture's rows; return how many visible lines changed. The cursor follows its row."""
        before, now = self._drawn, self._picture.rows
        at = self.at
        if at < len(before) and not (at < len(now) and _same(now[at], before[at])):
            at = next((line for line, row in enumerate(now) if _same(row, before[at])), at)
        self._drawn = now
        if len(now) != self.virtual_size.height:
            self.virtual_size = Size(self.scrollable_content_region.width, len(now))
        is_moved = at != self.at
        self.at = max(0, min(at, len(now) - 1))
        if is_moved:
            self._show_cursor()
        first = self.scroll_offset.y
        changed = [
            line
            for line in range(first, first + self.size.height)
            if (now[line] if line < len(now) else None) is not (before[line] if line < len(before) else None)
        ]
        for line in changed:
            self.refresh(Region(0, line - first, self.size.width, 1))
        self.post_message(self.Moved())
        return len(changed)

    def render_line(self, y: int) -> Strip:
        """Draw one visible line."""
        line, width = y + self.scroll_offset.y, self.scrollable_content_region.width
        rows = self._picture.rows
        if line >= len(rows):
            return Strip.blank(width, self.rich_style)
        row = rows[line]
        return Strip(segments(self, self._cells(row, width), is_cursor=line == self.at), width)

    def _cells(self, row: Row, width: int) -> list[Cell]:
        if not isinstance(row, VmRow):
            return host_cells(row, width, self._glyphs)
        view = self._picture.wishes.view
        name = f"{row.host}/{row.name}" if view == "vms" else f" {row.name}"
        return clipped(vm_cells(row, columns(width, view), self._glyphs, name=name), width)

    # ── the cursor ───────────────────────────────────────────────────────────────────────────────

    def watch_at(self, before: int, now: int) -> None:
        """Draw the two lines that changed."""
        for line in (before, now):
            y = line - self.scroll_offset.y
            if 0 <= y < self.size.height:
                self.refresh(Region(0, y, self.size.width, 1))

    def action_move(self, lines: int) -> None:
        """Move the cursor by some lines."""
        self.at = max(0, min(self.at + lines, len(self._picture.rows) - 1))
        self._show_cursor()
        self.post_message(self.Moved())

    def action_page(self, pages: int) -> None:
        """Move it by a page."""
        self.action_move(pages * max(1, self.size.height - 1))

    def action_end(self, way: int) -> None:
        """Move it to the first or last line."""
        self.action_move(way * len(self._picture.rows))

    def on_click(self, event: events.Click) -> None:
        """Move the cursor to the line; a double click opens it."""
        line = event.y + self.scroll_offset.y
        if line < len(self._picture.rows):
            self.action_move(line - self.at)
            if event.chain == 2:
                self.post_message(self.Opened())

    def _show_cursor(self) -> None:
        first, height = self.scroll_offset.y, self.scrollable_content_region.height
        if self.at < first:
            self.scroll_to(y=self.at, animate=False)
        elif self.at >= first + height:
            self.scroll_to(y=self.at - height + 1, animate=False)


def _same(one: Row, other: Row) -> bool:
    return one.id == other.id and type(one) is type(other)
