"""One VM: its figures, a chart of the last minutes, and its last decisions."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Final, TypeAlias

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import Screen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static

from qmpballoon.errors import QmpBalloonError
from qmpballoon.policy.reasons import WORDS
from qmpballoon.terminal import clean
from qmpballoon.top.columns import Cell, Glyphs, clipped
from qmpballoon.top.history import SPAN_S, chart
from qmpballoon.top.listing import CELL_CSS, CLASSES, segments
from qmpballoon.top.picture import Picture
from qmpballoon.top.rows import VmRow
from qmpballoon.top.source import Source
from qmpballoon.units import format_size

Explain: TypeAlias = Callable[[Mapping[str, object], int], Sequence[str]]
"""Returns the lines about the result of the verb ``why``, the newest first, filled to a width."""

_LAST: Final = 20  # decisions
_OLD_S: Final = 5.0  # statistics of this age are said to be old
_CHART_S: Final = 2.0  # between two drawings of a chart on which nothing happens


class Chart(Widget):
    """What the guest held, had available, and its balloon, over the last minutes."""

    COMPONENT_CLASSES: ClassVar[set[str]] = CLASSES
    DEFAULT_CSS = (
        """
    Chart { height: 30%; min-height: 6; max-height: 16; width: 1fr; background: $background;
        color: $foreground;
    """
        + CELL_CSS
        + "}"
    )

    def __init__(self, picture: Picture, vm: str, glyphs: Glyphs) -> None:
        super().__init__()
        self._picture = picture
        self._vm = vm
        self._glyphs = glyphs

    def render_line(self, y: int) -> Strip:
        """Draw one line; the last one has the times."""
        width, height = self.size
        if y == height - 1:
            begins = f"{SPAN_S / 60:.0f} minutes ago"
            glyphs = self._glyphs
            legend: list[Cell] = [(f"{begins}   ", "quiet")]
            for glyph, word in (
                (glyphs.held, "held"),
                (glyphs.available, "available"),
                (glyphs.balloon, "balloon"),
            ):
                legend += [(glyph, word), (f" {word}  ", "quiet")]
            cells = [*clipped(legend, width - 4), (" now", "quiet")]
            return Strip(segments(self, cells), width)
        samples = self._picture.history.sampled(self._vm, time.monotonic(), width)
        lines = chart(samples, height - 1, self._glyphs)
        return Strip(segments(self, lines[y]), width)


class Details(Screen[None]):
    """The screen of one VM; keys ``t`` and ``m`` work as in the list."""

    DEFAULT_CSS = """
    Details { background: $background;
        #title { background: $primary 30%; text-style: bold; height: 1; }
        #figures { height: auto; padding: 0 1; }
        #meaning { height: auto; padding: 0 1; color: $text-muted; }
        #decisions { height: 1fr; padding: 0 1; border-top: solid $primary 50%; }
        #keys { height: 1; background: $boost; color: $text-muted; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q,enter", "app.pop_screen", "Back"),
        Binding("t", "app.target", "Target"),
        Binding("m", "app.mode", "Mode"),
        Binding("question_mark", "app.help", "Help"),
    ]

    def __init__(self, picture: Picture, source: Source, vm: str, glyphs: Glyphs, explain: Explain) -> None:
        super().__init__()
        self._picture = picture
        self._source = source
        self.vm = vm
        self._glyphs = glyphs
        self._explain = explain
        self._asked_for: tuple[object, ...] | None = None

    def compose(self) -> ComposeResult:
        """Make the screen."""
        yield Static(id="title")
        yield Static(id="figures")
        yield Static(id="meaning")
        yield Chart(self._picture, self.vm, self._glyphs)
        with VerticalScroll(id="decisions"):
            yield Static(Content("asking its agent for the last decisions ..."), id="why")
        yield Static(Content(" Esc back   t target   m mode   up down scroll   ? help"), id="keys")

    def on_mount(self) -> None:
        """Show what is known, and ask for the decisions."""
        self.query_one("#decisions").focus()
        self.set_interval(_CHART_S, self._redraw_chart)
        self.show()

    def show(self) -> None:
        """Show the present figures; ask why when the reason or the target changed."""
        row = self._picture.vm(self.vm)
        if row is None:
            self.query_one("#title", Static).update(Content(f" {clean(self.vm)}: it is gone"))
            return
        self.query_one("#title", Static).update(Content(f" {row.host}/{row.name}   {row.health}"))
        self.query_one("#figures", Static).update(Content(_figures(row, self.size.width - 2)))
        self.query_one("#meaning", Static).update(Content(_meaning(row)))
        self._redraw_chart()
        moved = (row.why, row.target, row.mode, row.record.document.get("why_since"), row.online)
        if moved != self._asked_for:
            self._asked_for = moved
            self._ask()

    def _redraw_chart(self) -> None:
        self.query_one(Chart).refresh()

    @work(name="why", exclusive=True)
    async def _ask(self) -> None:
        shown = self.query_one("#why", Static)
        try:
            answer = await self._source.request(self.vm, "why", last=_LAST)
        except QmpBalloonError as error:
            shown.update(Content(clean(error)))
            return
        if isinstance(answer, Mapping):
            lines = self._explain(answer, max(40, self.size.width - 4))
            shown.update(Content("\n".join(clean(line) for line in lines)))


def _figures(row: VmRow, width: int) -> str:
    record = row.record
    sizes = {
        "size": row.size,
        "actual": row.actual,
        "target": row.target,
        "floor": record.floor,
        "ceiling": record.ceiling,
        "held": row.held,
        "available": row.available,
        "balloon": row.balloon,
        "rss": row.rss,
    }
    words = [f"{name} {format_size(value)}" for name, value in sizes.items() if value is not None]
    guest = record.state.guest if record.state is not None else None
    if guest is not None and row.online and guest.age_s >= _OLD_S:
        words.append(f"statistics {guest.age_s:.0f} s old")
    words += [f"mode {row.mode}", f"policy {clean(record.policy or '-')[:64]}"]
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + len(word) + 3 > width:
            lines.append(word)
        else:
            lines[-1] += f"   {word}"
    return "\n".join(lines)


def _meaning(row: VmRow) -> str:
    known = WORDS.get(row.why)
    return f"{row.why}: {known.means} {known.do}" if known else row.why
