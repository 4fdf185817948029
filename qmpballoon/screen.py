"""The whole terminal to draw on, restored afterwards."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TextIO

_ENTER: Final = "\x1b[?1049h\x1b[?25l"  # the alternate screen; no cursor
_LEAVE: Final = "\x1b[0m\x1b[?25h\x1b[?1049l"
_DEFAULT_SIZE: Final = (80, 24)  # if the terminal does not report its size


class Screen:
    """A terminal to draw on: each drawing replaces the previous one without flicker."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def size(self) -> tuple[int, int]:
        """Return the current columns and rows."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return _DEFAULT_SIZE
        return columns or _DEFAULT_SIZE[0], rows or _DEFAULT_SIZE[1]

    def draw(self, lines: Sequence[str]) -> None:
        """Draw lines, which must fit the size."""
        text = "\r\n".join(f"{line}\x1b[K" for line in lines)
        self._stream.write(f"\x1b[H{text}\x1b[J")
        self._stream.flush()


def can_draw(stream: TextIO) -> bool:
    """Tell whether the stream is a terminal that can redraw a picture in place."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def whole_screen(stream: TextIO | None = None) -> Iterator[Screen]:
    """Use the whole terminal (None: stdout) while the body runs, and restore it however the body ends."""
    stream = stream or sys.stdout
    try:
        stream.write(_ENTER)
        yield Screen(stream)
    finally:
        stream.write(_LEAVE)
        stream.flush()
