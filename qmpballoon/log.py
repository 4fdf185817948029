"""What the agent logs: one line per event, with a stable word first.

::

    vm-online vm=web1 life=4711-889123 qemu=7.2.22: the monitor answers

Under systemd the line bears its priority (``<4>``, sd-daemon(3)) and no stamp, as the journal has
its own. What repeats often is logged a few times, then counted.

Much of what is logged comes from outside: names of VMs, errors of QEMUs, topics. No character of it
controls a terminal or ends a line, and a line that is not the first of its message, as in a traceback,
never looks like one: it bears the priority of its message, or is indented.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Final, TextIO

LOG: Final = logging.getLogger("qmpballoon")

_REPEATS: Final = 3  # of one word about one VM ...
_WINDOW_S: Final = 60.0  # ... in so long; the rest is counted, and its last line told afterwards
_MOST_KEYS: Final = 4096
_PRIORITIES: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


@dataclass(slots=True)
class _Heard:
    """One word about one VM within a window; the newest line that was withheld is told when it is over."""

    began_s: float
    count: int = 0
    withheld: int = 0
    level: int = 0
    line: tuple[str, str] = ("", "")  # word with its fields; the sentence


class _Repeats:
    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], _Heard] = {}

    def heard(self, word: str, about: str) -> _Heard:
        """Return what is remembered of this word about this VM, its newest line counted."""
        now_s = time.monotonic()
        heard = self._seen.pop((word, about), None)
        if heard is None or now_s - heard.began_s > _WINDOW_S:
            heard = _Heard(now_s, withheld=heard.withheld if heard else 0)
        heard.count += 1
        self._seen[word, about] = heard
        if len(self._seen) > _MOST_KEYS:
            self._seen.pop(next(iter(self._seen)))
        return heard

    def overdue(self) -> Iterator[_Heard]:
        """Return those whose window is over and whose newest line was not told; each has a new window now."""
        now_s = time.monotonic()
        for heard in self._seen.values():
            if heard.withheld and now_s - heard.began_s > _WINDOW_S:
                heard.began_s, heard.count = now_s, _REPEATS
                yield heard


_repeats: Final = _Repeats()


def say(word: str, sentence: str = "", *, level: int = logging.INFO, **fields: object) -> None:
    """Log ``word key=value ...: sentence``; fields that are None are left out.

    The same word about the same VM or broker is said three times a minute; the rest is counted, and the
    last of it told by ``catch_up``, so that the log ends with how things are.
    """
    if not LOG.isEnabledFor(level):
        return
    parts = [word, *(f"{key}={_quoted(value)}" for key, value in fields.items() if value is not None)]
    heard = _repeats.heard(word, _about(fields))
    heard.level, heard.line = level, (" ".join(parts), one_line(sentence))
    if heard.count > _REPEATS:
        heard.withheld += 1
    else:
        _tell(heard)


def catch_up() -> None:
    """Log what was withheld last of each thing that happened too often a minute ago; call it now and then."""
    for heard in _repeats.overdue():
        heard.withheld -= 1  # this one
        _tell(heard)


def _tell(heard: _Heard) -> None:
    line, sentence = heard.line
    withheld = f" withheld={heard.withheld}" if heard.withheld else ""
    heard.withheld = 0
    LOG.log(heard.level, "%s%s%s", line, withheld, f": {sentence}" if sentence else "")


def one_line(text: object) -> str:
    """Return the text with each character that is not printable, a line end among them, as a ``?``."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def set_up(*, verbose: bool = False, stream: TextIO | None = None) -> None:
    """Send what is logged to stderr, in the form that suits its reader.

    So is what asyncio logs, and the error that ends the program if it is none of ours.
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
    """Formats a message of one or more lines, where untrusted text cannot start a line of its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        if record.name != LOG.name:  # it has no stable word of its own
            record.message = f"{record.name}: {record.message}"
        return super().formatMessage(record)

    def format(self, record: logging.LogRecord) -> str:
        first, other = self.before(record)
        lines = map(one_line, super().format(record).split("\n"))
        return first + f"\n{other}".join(lines)

    def before(self, record: logging.LogRecord) -> tuple[str, str]:
        """Return what stands before the first line and before each other."""
        return "", "  "


class _Priorities(_Lines):
    def before(self, record: logging.LogRecord) -> tuple[str, str]:
        priority = f"<{_PRIORITIES.get(record.levelno, 6)}>"
        return priority, priority


class _Stamps(_Lines):
    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
        self.converter = time.gmtime


def _about(fields: Mapping[str, object]) -> str:
    """Return what a line is about, as far as its repeats are counted apart."""
    return next((str(fields[key]) for key in ("vm", "socket", "url") if fields.get(key)), "")


def _quoted(value: object) -> str:
    text = one_line(value)
    if text and not {" ", '"'} & set(text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
