"""The program on the whole terminal: a head, the list, the keys; dialogs and the screen of one VM over it."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from typing import ClassVar, Final

from textual import on, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Input, Static

from qmpballoon.errors import QmpBalloonError
from qmpballoon.policy.reasons import WORDS
from qmpballoon.terminal import clean
from qmpballoon.top.columns import BLOCKS, Glyphs
from qmpballoon.top.details import Details, Explain
from qmpballoon.top.dialogs import Confirmation, Help, ModeDialog, TargetDialog, target_of, target_question
from qmpballoon.top.listing import Listing, Titles
from qmpballoon.top.picture import Picture, Wishes
from qmpballoon.top.rows import HostRow, VmRow
from qmpballoon.top.source import Source
from qmpballoon.units import format_size

_LOOK_S: Final = 0.5  # between two looks at the source
_ALWAYS_S: Final = 5.0  # a host that says nothing more goes offline by its age alone
_LONGEST_PROBLEM: Final = 200
_OF_THE_LIST: Final = ("details", "sort", "reverse", "view", "filter", "no_filter")
_SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_DARK, _LIGHT = "textual-dark", "textual-light"


class TopApp(App[None]):
    """Shows what a source brings. ``explain`` makes lines of the answer to ``why``."""

    CSS = """
    Screen { layout: vertical; }
    #head { height: 1; background: $primary 30%; text-wrap: nowrap; text-overflow: ellipsis; }
    #head.lost { background: $error 40%; }
    #empty { height: auto; padding: 1 2; color: $text-muted; display: none; }
    #filter { display: none; height: 1; border: none; padding: 0 1; background: $boost; }
    #selected { height: 1; padding: 0 1; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    #keys { height: 1; background: $boost; color: $text-muted; }
    """
    TITLE = "qmpballoon top"
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,ctrl+c", "quit", "Quit", priority=False),
        Binding("enter", "details", "Details"),
        Binding("t", "target", "Target"),
        Binding("m", "mode", "Mode"),
        Binding("s", "sort(1)", "Sort"),
        Binding("S", "sort(-1)", "Sort"),
        Binding("r", "reverse", "Reverse"),
        Binding("v", "view", "View"),
        Binding("slash", "filter", "Filter"),
        Binding("escape", "no_filter", "No filter"),
        Binding("d", "light", "Dark or light"),
        Binding("question_mark,f1,h", "help", "Help"),
    ]

    def __init__(
        self,
        source: Source,
        explain: Explain,
        *,
        wishes: Wishes | None = None,
        light: bool = False,
        glyphs: Glyphs = BLOCKS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.source = source
        self.picture = Picture(wishes)
        self._explain = explain
        self._glyphs = glyphs
        self._clock = clock
        self._looked_at_s = -_ALWAYS_S
        self.theme = _LIGHT if light else _DARK

    def compose(self) -> ComposeResult:
        """Make the main screen."""
        yield Static(id="head")
        yield Titles(self.picture, self._glyphs)
        yield Static(id="empty")
        yield Listing(self.picture, self._glyphs)
        yield Input(placeholder="filter: words; !ok for what is not ok", id="filter", max_length=100)
        yield Static(id="selected")
        yield Static(
            Content(" q quit  Enter details  t target  m mode  s sort  v view  / filter  ? help"), id="keys"
        )

    def on_mount(self) -> None:
        """Look at the source from now on."""
        self._main = self.screen
        self._main.query_one(Listing).focus()
        self.set_interval(_LOOK_S, self.look)
        self.look()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Tell whether a key does something here: those of the list do not on the screen of one VM."""
        return action not in _OF_THE_LIST or not isinstance(self.screen, Details)

    def look(self) -> None:
        """Take what the source has, if it has news, and draw what changed of it."""
        now_s = self._clock()
        if not self.source.has_news and now_s - self._looked_at_s < _ALWAYS_S:
            return
        self.source.has_news, self._looked_at_s = False, now_s
        self.picture.update(self.source.hosts, self.source.vms, now_s)
        self.arrange()

    def arrange(self) -> None:
        """Order, filter and draw the rows again."""
        self.picture.arrange()
        main = self._main
        main.query_one(Listing).refresh_rows()
        self._show_head()
        empty = main.query_one("#empty", Static)
        empty.display = not self.picture.rows
        if not self.picture.rows:
            empty.update(Content(self._nothing()))
        if isinstance(self.screen, Details):
            self.screen.show()

    def _show_head(self) -> None:
        picture, source = self.picture, self.source
        counts, wishes = picture.counts, picture.wishes
        words = [clean(source.name), f"{_count(counts.hosts, 'host')}, {_count(counts.vms, 'VM')}"]
        if counts.not_ok:
            words.append(f"{counts.not_ok} not ok")
        if wishes.filter:
            words.append(f"{counts.shown} match {clean(wishes.filter)!r}")
        words.append(
            {"tree": f"by {wishes.key} within hosts", "vms": f"by {wishes.key}", "hosts": "hosts"}[
                wishes.view
            ]
        )
        if source.problem is not None:
            words[0] = f"NOT CONNECTED: {clean(source.problem)[:_LONGEST_PROBLEM]}"
        head = self._main.query_one("#head", Static)
        head.update(Content(" " + "  ".join(words)))
        head.set_class(source.problem is not None, "lost")

    def _nothing(self) -> str:
        source, wishes = self.source, self.picture.wishes
        if source.problem is not None:
            return f"Not connected yet: {clean(source.problem)}\n\nIt is tried again and again; q quits."
        if wishes.filter:
            return f"No VM matches {clean(wishes.filter)!r}. Escape removes the filter."
        if wishes.host is not None:
            return f"Nothing is known of a host {clean(wishes.host)!r} at {clean(source.name)}."
        return f"Nothing is published at {clean(source.name)}: start qmpballoon agent --broker URL."

    @on(Listing.Moved)
    def show_selected(self) -> None:
        """Say what the row under the cursor means."""
        for listing in self._main.query(Listing):  # none while the program ends
            for shown in self._main.query("#selected").results(Static):
                shown.update(Content(_sentence(listing.row)))

    # ── keys ─────────────────────────────────────────────────────────────────────────────────────

    @on(Listing.Opened)
    def action_details(self) -> None:
        """Open the screen of a VM."""
        row = self._vm()
        if row is not None and not isinstance(self.screen, Details):
            self.push_screen(Details(self.picture, self.source, row.id, self._glyphs, self._explain))

    def action_help(self) -> None:
        """Open the help."""
        self.push_screen(Help())

    def action_sort(self, step: int) -> None:
        """Order by the next key."""
        self.picture.wishes.next_key(step)
        self._rearranged()

    @on(Titles.Clicked)
    def sort_by(self, event: Titles.Clicked) -> None:
        """Order by the column that was clicked."""
        self.picture.wishes.sort_by(event.key)
        self._rearranged()

    def action_reverse(self) -> None:
        """Turn the order round."""
        self.picture.wishes.reverse = not self.picture.wishes.reverse
        self._rearranged()

    def action_view(self) -> None:
        """Go to the next view."""
        self.picture.wishes.next_view()
        self._rearranged()

    def action_light(self) -> None:
        """Change between dark and light."""
        self.theme = _DARK if self.theme == _LIGHT else _LIGHT

    def action_filter(self) -> None:
        """Ask for a filter."""
        field = self._main.query_one("#filter", Input)
        field.display = True
        field.focus()

    def action_no_filter(self) -> None:
        """Remove the filter."""
        field = self._main.query_one("#filter", Input)
        field.clear()
        field.display = False
        self._main.query_one(Listing).focus()

    @on(Input.Changed, "#filter")
    def filter_changed(self, event: Input.Changed) -> None:
        """Filter while it is typed."""
        self.picture.wishes.filter = event.value
        self.arrange()

    @on(Input.Submitted, "#filter")
    def filter_submitted(self, event: Input.Submitted) -> None:
        """Keep the filter, and go back to the list."""
        event.input.display = bool(event.value)
        self._main.query_one(Listing).focus()

    def _rearranged(self) -> None:
        self.arrange()
        self._main.query_one(Titles).refresh()

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    @work(name="set target", exclusive=True, group="dialogs")
    async def action_target(self) -> None:
        """Ask for a target, ask again, and send it."""
        row = self._vm()
        if row is None:
            return
        typed = await self.push_screen_wait(TargetDialog(row))
        if typed is None:
            return
        now = self.picture.vm(row.id) or row
        question, warning = target_question(typed, now)
        if await self.push_screen_wait(Confirmation(question, warning)):
            target = target_of(typed, now)
            await self._carried_out(
                row, self.source.request(row.id, "set-target", target=target), f"target {format_size(target)}"
            )

    @work(name="set mode", exclusive=True, group="dialogs")
    async def action_mode(self) -> None:
        """Ask for a mode, ask again, and send it."""
        row = self._vm()
        if row is None:
            return
        mode = await self.push_screen_wait(ModeDialog(row))
        if mode is None:
            return
        question = f"Set the mode of {row.host}/{row.name} from {row.mode} to {mode}?"
        if await self.push_screen_wait(Confirmation(question)):
            await self._carried_out(row, self.source.request(row.id, "set-mode", mode=mode), f"mode {mode}")

    async def _carried_out(self, row: VmRow, request: Awaitable[object], what: str) -> None:
        place = f"{row.host}/{row.name}"
        try:
            await request
        except QmpBalloonError as error:
            self.notify(clean(f"{place}: {error}"), severity="error", markup=False, timeout=10)
        else:
            self.notify(clean(f"{place}: {what} is set"), markup=False)

    def _vm(self) -> VmRow | None:
        """Return the VM that keys are about: of the screen of one, or under the cursor."""
        if isinstance(self.screen, Details):
            return self.picture.vm(self.screen.vm)
        row = self._main.query_one(Listing).row
        return row if isinstance(row, VmRow) else None


async def run(app: TopApp) -> int:
    """Run the program and its source until the person quits; return the signal that ended it, or 0.

    The terminal is restored after a signal as well.
    """
    ended_by: list[int] = []

    def end(number: int) -> None:
        ended_by.append(number)
        app.exit()

    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, end, number)
    try:
        async with asyncio.TaskGroup() as group:
            feeding = group.create_task(app.source.run(), name="top source")
            try:
                await app.run_async()
            finally:
                feeding.cancel()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)
    return ended_by[0] if ended_by else 0


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _sentence(row: VmRow | HostRow | None) -> str:
    if row is None:
        return ""
    if isinstance(row, HostRow):
        version = "" if row.record is None else f", version {clean(row.record.version or '-')[:32]}"
        return f"{row.name}: level {row.level}, {row.policy} {row.mode}{version}"
    known = WORDS.get(row.why)
    return f"{row.name}: {row.why}: {known.means}" if known else f"{row.name}: {row.why}"
