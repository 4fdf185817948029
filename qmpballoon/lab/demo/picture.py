"""The live picture of a host: renders its known state as lines for a terminal of any size. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from qmpballoon.terminal import clean
from qmpballoon.units import MIB

MEANINGS: Final = {
    "emergency": "it is nearly out of memory",
    "thin": "it has little left",
    "grow": "it has little headroom left",
    "cache": "it uses its page cache in full",
    "give": "other guests need the memory",
    "booting": "it keeps its whole size while it boots",
    "static-split": "an equal part for each",
    "manual": "asked for over MQTT",
}
"""Short explanations of the agent's reason words."""

_TOGETHER_S: Final = 2.0  # moves of one guest in one direction within this time are shown as one
_WHY_COLUMNS: Final = 13
_NUMBER_COLUMNS: Final = 6
_SHORTEST_BAR: Final = 10
_THIN, _STARVED = 0.12, 0.06  # of what a guest has, available

Span: TypeAlias = tuple[str, str | None]  # text and colour
Paint: TypeAlias = Callable[[str, str], str]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters of bars: held, available, in the balloon; the budget's mark; and an arrow."""

    held: str = "█"
    available: str = "▒"
    balloon: str = "·"
    budget: str = "│"
    arrow: str = "→"


ASCII: Final = Glyphs("#", "=", ".", "|", "->")


@dataclass(frozen=True, slots=True)
class PublishedGuest:
    """A guest as it was last published; sizes in bytes, None: not known."""

    name: str
    size: int | None
    actual: int | None
    held: int | None  # what it cannot give without reclaim
    health: str
    why: str | None


@dataclass(frozen=True, slots=True)
class Move:
    """A decision that was sent, or several shown as one; ``at_s`` since the start, sizes in bytes."""

    at_s: float
    vm: str
    was: int
    now: int
    whys: tuple[str, ...]
    last_at_s: float | None = None  # of several

    @property
    def grows(self) -> bool:
        """Whether the guest grows."""
        return self.now >= self.was


@dataclass(frozen=True, slots=True)
class Note:
    """Another event, as text; ``at_s`` since the start."""

    at_s: float
    text: str
    colour: str | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that is drawn."""

    title: str
    progress: str
    guests: Sequence[PublishedGuest]
    budget: int
    log: Sequence[Move | Note]  # oldest first
    hint: str = ""


def merged(moves: Iterable[Move]) -> list[Move]:
    """Return the moves in order; merge those that follow each other closely in one direction."""
    found: list[Move] = []
    for move in moves:
        for index in range(len(found) - 1, -1, -1):
            before = found[index]
            if before.vm == move.vm:
                last_s = before.at_s if before.last_at_s is None else before.last_at_s
                if before.grows == move.grows and move.at_s - last_s <= _TOGETHER_S:
                    whys = tuple(dict.fromkeys((*before.whys, *move.whys)))
                    found[index] = replace(before, now=move.now, whys=whys, last_at_s=move.at_s)
                    break
                found.append(move)
                break
        else:
            found.append(move)
    return found


def reason(whys: Sequence[str]) -> str:
    """Return the agent's words for its reasons, and what the last of them means."""
    meaning = MEANINGS.get(whys[-1]) if whys else None
    return ", ".join(whys) + (f": {meaning}" if meaning else "")


def mebibytes(size: int | None) -> str:
    """Return a size in whole MiB without the unit; ``-`` for None."""
    return "-" if size is None else str(round(size / MIB))


def drawn(
    picture: Picture, columns: int, rows: int, *, paint: Paint | None = None, glyphs: Glyphs | None = None
) -> list[str]:
    """Return the lines of the picture, at most ``rows``, none wider than ``columns``.

    If there is too little room, these are left out, in this order: the hint and empty lines, the oldest lines
    of the log, the reasons, the bars. ``paint`` colours a text (None: it is left as it is).
    """
    glyphs = glyphs or Glyphs()
    table = [_title(picture, columns), *_table(picture, columns, glyphs)]
    spare = rows - len(table)
    log = [_log_line(entry, picture, glyphs) for entry in picture.log]
    lines: list[list[Span]] = list(table)
    if spare >= 6:
        lines[1:1] = [[]]
        lines += [[], *log[-(spare - 4) :]]
        lines += [[]] * (rows - 1 - len(lines))
        lines.append([(picture.hint, "dim")])
    elif spare > 0:
        lines += log[-spare:]
    return [_painted(line, columns, paint) for line in lines[:rows]]


def _title(picture: Picture, columns: int) -> list[Span]:
    gap = columns - len(picture.title) - len(picture.progress)
    return [(picture.title, "bold"), (" " * max(1, gap), None), (picture.progress, None)]


def _table(picture: Picture, columns: int, glyphs: Glyphs) -> list[list[Span]]:
    names = max((len(guest.name) for guest in picture.guests), default=0)
    names = min(max(names, 3), 20) + 1
    numbers = 3 * _NUMBER_COLUMNS + 2
    bar = columns - names - numbers - _WHY_COLUMNS
    has_why = bar >= _SHORTEST_BAR
    if not has_why:
        bar = columns - names - numbers
    if bar < _SHORTEST_BAR:
        bar = 0
    largest = max((guest.size or 0 for guest in picture.guests), default=0)
    head = _head(names, bar, glyphs, has_why=has_why)
    rows = [_guest(guest, names, bar, largest, glyphs, has_why=has_why) for guest in picture.guests]
    return [head, *rows, _sum(picture, names, bar, glyphs, has_why=has_why)]


def _head(names: int, bar: int, glyphs: Glyphs, *, has_why: bool) -> list[Span]:
    legend = f"{glyphs.held} holds {glyphs.available} has left {glyphs.balloon} in its balloon"
    if len(legend) > bar:
        legend = ""
    words = "".join(word.rjust(_NUMBER_COLUMNS) for word in ("holds", "has", "size"))
    return [(f"{'MiB':<{names}}{legend:<{bar}}{words}{'  why' if has_why else ''}", "dim")]


def _guest(
    guest: PublishedGuest, names: int, bar: int, largest: int, glyphs: Glyphs, *, has_why: bool
) -> list[Span]:
    size, actual, held = guest.size or 0, guest.actual or 0, guest.held or 0
    columns = [round(bar * part / largest) if largest else 0 for part in (min(held, actual), actual, size)]
    spans: list[Span] = [
        (f"{guest.name[: names - 1]:<{names}}", None),
        (glyphs.held * columns[0], _colour(guest)),
        (glyphs.available * max(0, columns[1] - columns[0]), None),
        (glyphs.balloon * max(0, columns[2] - max(columns[:2])), "dim"),
        (" " * max(0, bar - max(columns)), None),
        (_numbers(guest.held, guest.actual, guest.size), None),
    ]
    if has_why:
        is_ok = guest.health == "ok"
        spans.append((f"  {guest.why or '' if is_ok else guest.health}", None if is_ok else "yellow"))
    return spans


def _sum(picture: Picture, names: int, bar: int, glyphs: Glyphs, *, has_why: bool) -> list[Span]:
    size, actual, held = (
        sum(getattr(guest, key) or 0 for guest in picture.guests) for key in ("size", "actual", "held")
    )
    whole = max(size, picture.budget, 1)
    columns = [round(bar * part / whole) for part in (min(held, actual), actual, size)]
    cells = [glyphs.held] * columns[0] + [glyphs.available] * max(0, columns[1] - columns[0])
    cells += [glyphs.balloon] * max(0, columns[2] - len(cells))
    cells += [" "] * (bar - len(cells))
    mark = min(bar - 1, round(bar * picture.budget / whole))
    over = actual > picture.budget * 1.01
    spans: list[Span] = [(f"{'all':<{names}}", "bold")]
    if bar:
        spans += [("".join(cells[:mark]), None), (glyphs.budget, "red" if over else "green")]
        spans += [("".join(cells[mark + 1 :]), "dim")]
    spans.append((_numbers(held, actual, size), None))
    if has_why:
        spans.append((f"  {glyphs.budget} of {mebibytes(picture.budget)}", "red" if over else "green"))
    return spans


def _numbers(*sizes: int | None) -> str:
    return "".join(mebibytes(size).rjust(_NUMBER_COLUMNS) for size in sizes)


def _colour(guest: PublishedGuest) -> str | None:
    if not guest.actual or guest.held is None:
        return None
    part = 1 - guest.held / guest.actual
    return "red" if part < _STARVED else "yellow" if part < _THIN else "green"


def _log_line(entry: Move | Note, picture: Picture, glyphs: Glyphs) -> list[Span]:
    stamp = f"{entry.at_s:5.1f} s  "
    if isinstance(entry, Note):
        return [(stamp, "dim"), (entry.text, entry.colour)]
    names = max((len(guest.name) for guest in picture.guests), default=0)
    moved = f"{mebibytes(entry.was):>3} {glyphs.arrow} {mebibytes(entry.now):>3} MiB"
    return [(stamp, "dim"), (f"{entry.vm:<{names}} {moved}  ", None), (reason(entry.whys), None)]


def _painted(spans: Sequence[Span], columns: int, paint: Paint | None) -> str:
    """Return spans as a line cut to the columns, without terminal control sequences."""
    line, left = "", columns
    for text, colour in spans:
        shown = clean(text)[: max(0, left)]
        left -= len(shown)
        line += paint(shown, colour) if paint and colour and shown else shown
    return line
