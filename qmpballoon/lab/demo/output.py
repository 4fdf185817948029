"""What the demo prints: lines, or a live picture in a terminal."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

from qmpballoon import terminal
from qmpballoon.lab.demo.picture import (
    ASCII,
    Glyphs,
    Move,
    Note,
    Picture,
    PublishedGuest,
    drawn,
    mebibytes,
    merged,
    reason,
)
from qmpballoon.lab.demo.testbed import BASE, Message, Observer
from qmpballoon.lab.demo.workload import BUDGET, NAMES
from qmpballoon.screen import Screen, can_draw, whole_screen
from qmpballoon.units import MIB

_LOG: Final = 400  # moves and events that are kept; a terminal has fewer rows
_LINE_EVERY_S: Final = 2.0
_TABLE_EVERY_S: Final = 10.0


class Printer:
    """Prints the lines of the demo, each with the seconds since the start."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()

    def heading(self, text: str) -> None:
        """Print the heading of a step."""
        print(f"\n{terminal.coloured(terminal.clean(text), 'bold')}", flush=True)

    def line(self, text: str) -> None:
        """Print one line, with the time since the start."""
        terminal.clear_progress()
        stamp = f"{time.monotonic() - self._began_s:6.1f} s  "
        lines = _broken(terminal.clean(text), len(stamp))
        print(terminal.coloured(stamp, "dim") + f"\n{' ' * len(stamp)}".join(lines), flush=True)


class Display(Protocol):
    """The display of one run; times are seconds since its start."""

    def add_move(self, move: Move) -> None:
        """Record a decision that was sent."""

    def add_note(self, at_s: float, text: str, colour: str | None = None) -> None:
        """Record another event."""

    def refresh(self, at_s: float) -> None:
        """Update the display; called several times a second."""


@contextmanager
def showing(title: str, seconds: float, observer: Observer, printer: Printer, hint: str) -> Iterator[Display]:
    """Show a run while the body runs, in a form that suits stdout."""
    if not can_draw(sys.stdout):
        lines = _Lines(observer, printer)
        yield lines
        lines.end()
        return
    with whole_screen() as screen:
        yield _Live(title, seconds, observer, screen, hint)


def published_guests(observer: Observer) -> list[PublishedGuest]:
    """Return the guests as last published."""
    return [_published_guest(name, observer.latest.get(f"{BASE}/vm/{name}/state")) for name in NAMES]


def move_in(message: Message, began_s: float) -> Move | None:
    """Return the decision in a message; None if the message is no decision."""
    details = message["data"]
    if message["event"] != "decision" or not isinstance(details, Mapping):
        return None
    was, now = details.get("from"), details.get("to")
    if not isinstance(was, int) or not isinstance(now, int):
        return None
    return Move(message.at_s - began_s, str(message["vm"]), was, now, (str(details.get("why")),))


def moves_line(moves: Sequence[Move], reason: Callable[[Sequence[str]], str] = reason) -> str:
    """Return the moves of a few seconds as a sentence: which guests got memory and why, which gave it."""
    shrunk = [move for move in moves if not move.grows]
    parts = [f"{_from_to(move)} MiB ({reason(move.whys)})" for move in moves if move.grows]
    if shrunk:
        whys = list(dict.fromkeys(why for move in shrunk for why in move.whys))
        parts.append(f"{', '.join(map(_from_to, shrunk))} MiB ({reason(whys)})")
    return "; ".join(parts)


class _Lines:
    """Prints the moves of each two seconds in a line, and the state of the guests every ten seconds."""

    def __init__(self, observer: Observer, printer: Printer) -> None:
        self._observer = observer
        self._printer = printer
        self._moves: deque[Move] = deque(maxlen=_LOG)
        self._explained: set[str] = set()
        self._printed_s = 0.0
        self._table_printed_s = 0.0

    def add_move(self, move: Move) -> None:
        self._moves.append(move)

    def add_note(self, at_s: float, text: str, colour: str | None = None) -> None:
        self._print_moves()
        self._printer.line(text)

    def refresh(self, at_s: float) -> None:
        if at_s - self._printed_s >= _LINE_EVERY_S:
            self._printed_s = at_s
            self._print_moves()
        if at_s - self._table_printed_s >= _TABLE_EVERY_S:
            self._table_printed_s = at_s
            self._print_guests()

    def end(self) -> None:
        self._print_moves()

    def _print_moves(self) -> None:
        if self._moves:
            self._printer.line(moves_line(merged(self._moves), self._reason))
            self._moves.clear()

    def _reason(self, whys: Sequence[str]) -> str:
        """Return the words of reasons, with an explanation at their first use."""
        known = self._explained.issuperset(whys)
        self._explained.update(whys)
        return ", ".join(whys) if known else reason(whys)

    def _print_guests(self) -> None:
        guests = published_guests(self._observer)
        each = ", ".join(
            f"{guest.name} {mebibytes(guest.held)}/{mebibytes(guest.actual)}" for guest in guests
        )
        total = sum(guest.actual or 0 for guest in guests)
        self._printer.line(f"held/actual MiB: {each}; total: {mebibytes(total)} of {BUDGET // MIB} MiB")


class _Live:
    """Redraws the picture repeatedly."""

    def __init__(self, title: str, seconds: float, observer: Observer, screen: Screen, hint: str) -> None:
        self._title = title
        self._seconds = seconds
        self._observer = observer
        self._screen = screen
        self._hint = hint
        self._moves: deque[Move] = deque(maxlen=_LOG)
        self._notes: deque[Note] = deque(maxlen=_LOG)
        encoding = getattr(sys.stdout, "encoding", None) or "ascii"
        self._glyphs = Glyphs() if encoding.lower().replace("-", "") == "utf8" else ASCII

    def add_move(self, move: Move) -> None:
        self._moves.append(move)

    def add_note(self, at_s: float, text: str, colour: str | None = None) -> None:
        self._notes.append(Note(at_s, text, colour))

    def refresh(self, at_s: float) -> None:
        log: list[Move | Note] = [*merged(self._moves), *self._notes]
        picture = Picture(
            title=self._title,
            progress=f"{min(at_s, self._seconds):.0f} of {self._seconds:.0f} s",
            guests=published_guests(self._observer),
            budget=BUDGET,
            log=sorted(log, key=lambda entry: entry.at_s),
            hint=self._hint,
        )
        paint = terminal.coloured if terminal.has_colour(sys.stdout) else None
        self._screen.draw(drawn(picture, *self._screen.size(), paint=paint, glyphs=self._glyphs))


def _published_guest(name: str, message: Message | None) -> PublishedGuest:
    state = message.payload if message is not None and isinstance(message.payload, Mapping) else {}
    return PublishedGuest(
        name=name,
        size=_number(state, "size"),
        actual=_number(state, "actual"),
        held=_number(state, "held"),
        health=str(state.get("health", "unknown")),
        why=None if state.get("why") is None else str(state["why"]),
    )


def _broken(text: str, indent: int) -> list[str]:
    """Return a text as lines of this width; unwrapped without a terminal, or if it is to be copied."""
    if not sys.stdout.isatty() or text.startswith("$"):
        return [text]
    columns, _ = Screen(sys.stdout).size()
    return textwrap.wrap(text, max(20, columns - indent), break_long_words=False, break_on_hyphens=False) or [
        ""
    ]


def _number(values: Mapping[str, object], key: str) -> int | None:
    value = values.get(key)
    return value if isinstance(value, int) else None


def _from_to(move: Move) -> str:
    return f"{move.vm} {mebibytes(move.was)} -> {mebibytes(move.now)}"
