"""What the agent logs: one line per event, with a stable word first.

::

    vm-online vm=web1 life=4711-889123 qemu=7.2.22: the monitor answers

Under systemd a line starts with its priority (``<4>``, sd-daemon(3)) and has no time stamp, because the
journal adds one. Frequent repeats are logged a few times, then counted; what may need a person is always
logged. A line that was withheld and is logged after all has the time at which it happened, and says how
``late`` it is.

Names of VMs, errors of QEMU and topics are untrusted. None of their characters controls a terminal or
ends a line. The further lines of a message, as in a traceback, cannot be taken for a message: they start
with the priority of their message, or are indented.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, TextIO

LOG: Final = logging.getLogger("qmpballoon")

_REPEATS: Final = 3  # lines of one word about one VM are logged; of warnings also for each reason
_WINDOW_S: Final = 60.0  # in this time; the others are counted, and the last one logged at its end
_MOST_KEYS: Final = 4096
_MOST_REASONS: Final = 16
_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


@dataclass(frozen=True, slots=True)
class _Line:
    level: int
    reason: str
    start: str  # the word with its fields
    sentence: str
    at: float  # wall clock
    at_s: float


@dataclass(slots=True)
class _Repeat:
    """The repeats of one word about one VM within a window, with the newest line."""

    began_s: float
    line: _Line
    counts: dict[str, int] = field(default_factory=dict)  # of lines, by reason; "" for all without a warning
    withheld: int = 0

    def is_frequent(self, reason: str) -> bool:
        """Count one more line with this reason, and tell whether there are enough of them."""
        if reason not in self.counts and len(self.counts) >= _MOST_REASONS:
            reason = ""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        return self.counts[reason] > _REPEATS


class _Repeats:
    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Repeat] = {}

    def of(self, word: str, about: str, line: _Line) -> _Repeat:
        """Return the repeats of this word about this VM in the current window; the line is their newest."""
        repeat = self._seen.pop((word, about), None)
        if repeat is None or line.at_s - repeat.began_s > _WINDOW_S:
            repeat = _Repeat(line.at_s, line, withheld=repeat.withheld if repeat else 0)
        repeat.line = line
        self._seen[word, about] = repeat
        if len(self._seen) > _MOST_KEYS:
            oldest = self._seen.pop(next(iter(self._seen)))
            if oldest.withheld:
                _emit_withheld(oldest)
        return repeat

    def overdue(self) -> Iterator[_Repeat]:
        """Yield those whose window is over and whose newest line was withheld; it begins the next window."""
        now_s = time.monotonic()
        for repeat in self._seen.values():
            if repeat.withheld and now_s - repeat.began_s > _WINDOW_S:
                repeat.began_s, repeat.counts = now_s, {repeat.line.reason: 1}
                yield repeat

    def pending(self) -> Iterator[_Repeat]:
        """Yield those whose newest line was withheld."""
        yield from (repeat for repeat in self._seen.values() if repeat.withheld)


_repeats: Final = _Repeats()


def log_event(word: str, sentence: str = "", *, level: int = logging.INFO, **fields: object) -> None:
    """Log ``word key=value ...: sentence``; fields that are None are left out.

    The same word about the same VM or broker is logged three times a minute. The rest is counted, and
    `log_withheld` logs the last of it, so that the log ends with the current state. Warnings are counted
    apart from other lines, and for each reason (``why`` or ``now``): frequent lines do not hide them. Errors
    are never withheld.
    """
    _log(word, sentence, level, fields, always=level >= logging.ERROR)


def log_always(word: str, sentence: str = "", *, level: int = logging.WARNING, **fields: object) -> None:
    """Log what may need a person, as `log_event` does, and never withhold it; for changes only."""
    _log(word, sentence, level, fields, always=True)


def _log(word: str, sentence: str, level: int, fields: Mapping[str, object], *, always: bool) -> None:
    if not LOG.isEnabledFor(level):
        return
    parts = [word, *(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)]
    reason = _reason(fields, level)
    line = _Line(level, reason, " ".join(parts), one_line(sentence), time.time(), time.monotonic())
    repeat = _repeats.of(word, _about(fields), line)
    if not always and repeat.is_frequent(reason):
        repeat.withheld += 1
    else:
        _emit(repeat)


def log_withheld(*, now: bool = False) -> None:
    """Log the last withheld line of each word and VM whose minute is over, or of all; call it regularly."""
    repeats = list(_repeats.pending() if now else _repeats.overdue())
    for repeat in sorted(repeats, key=lambda repeat: repeat.line.at_s):
        _emit_withheld(repeat)


def _emit_withheld(repeat: _Repeat) -> None:
    repeat.withheld -= 1  # this line is logged now
    _emit(repeat)


def _emit(repeat: _Repeat) -> None:
    line = repeat.line
    late_s = round(time.monotonic() - line.at_s)
    late = f" late={late_s}s" if late_s else ""
    withheld = f" withheld={repeat.withheld}" if repeat.withheld else ""
    repeat.withheld = 0
    text = f"{line.start}{late}{withheld}{f': {line.sentence}' if line.sentence else ''}"
    # LOG.log would look for the caller's place, which no line has.
    record = logging.LogRecord(LOG.name, line.level, __file__, 0, text, None, None)
    record.created, record.msecs = line.at, line.at % 1 * 1000
    LOG.handle(record)


def one_line(text: object) -> str:
    """Return the text with ``?`` for each character that is not printable, line ends included."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else "?" for character in text)


def set_up(*, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Log to stderr: with priorities under systemd, else with time stamps.

    Includes what asyncio logs, and an unexpected exception that ends the program.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Priorities() if "JOURNAL_STREAM" in os.environ else _Stamps())
    for logger in (LOG, logging.getLogger("asyncio")):
        logger.handlers[:] = [handler]
        logger.propagate = False
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)
    sys.excepthook = _crashed


def _crashed(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    LOG.critical("crashed: a bug in this program", exc_info=(kind, error, traceback))


class _Lines(logging.Formatter):
    """Formats a message of one or more lines; untrusted text in it cannot start a new message."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # the name in logging
        if record.name != LOG.name:  # it has no stable word
            record.message = f"{record.name}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        first, other = self.before(record)
        lines = map(one_line, super().format(record).split("\n"))
        return first + f"\n{other}".join(lines)

    def before(self, record: logging.LogRecord) -> tuple[str, str]:
        """Return the prefixes of the first line and of each further line."""
        return "", "  "


class _Priorities(_Lines):
    def before(self, record: logging.LogRecord) -> tuple[str, str]:
        priority = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return priority, priority


class _Stamps(_Lines):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime
        self._formatted: tuple[int, str] = (0, "")  # the last second

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:  # noqa: N802
        second = int(record.created)
        if self._formatted[0] != second:
            self._formatted = (second, super().formatTime(record, datefmt))
        return self._formatted[1]


def _about(fields: Mapping[str, object]) -> str:
    """Return the VM, socket or broker of a line; repeats are counted for each."""
    return next((str(fields[key]) for key in ("vm", "socket", "url") if fields.get(key)), "")


def _reason(fields: Mapping[str, object], level: int) -> str:
    """Return what a warning is counted by: its stable word. All other lines are counted together."""
    return str(fields.get("why") or fields.get("now") or "warning") if level >= logging.WARNING else ""


def _quoted(value: object) -> str:
    text = one_line(value)
    if text and not {" ", '"'} & set(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
