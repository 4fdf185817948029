"""A whole terminal to draw on, given back as it was found."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final, TextIO

_TAKE: Final = "\x1b[?1049h\x1b[?25l"  # the alternate screen; no cursor
_GIVE_BACK: Final = "\x1b[0m\x1b[?25h\x1b[?1049l"
_NARROWEST: Final = (80, 24)  # where a terminal does not tell its size


class Screen:
    """What is drawn replaces what was there, without flicker; the size is asked for each time."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def size(self) -> tuple[int, int]:
        """Return the columns and rows of now."""
        try:
            columns, rows = os.get_terminal_size(self._stream.fileno())
        except OSError:
            return _NARROWEST
        return columns or _NARROWEST[0], rows or _NARROWEST[1]

    def draw(self, lines: Sequence[str]) -> None:
        """Draw lines that are no wider and no more than fits."""
        text = "\r\n".join(f"{line}\x1b[K" for line in lines)
        self._stream.write(f"\x1b[H{text}\x1b[J")
        self._stream.flush()


def can_draw(stream: TextIO) -> bool:
    """Tell whether the stream is a terminal on which a picture can be redrawn in its place."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


@contextmanager
def whole_screen(stream: TextIO | None = None) -> Iterator[Screen]:
    """Take the terminal (None: stdout) while the body runs; it is given back however the body ends."""
    stream = stream or sys.stdout
    try:
        stream.write(_TAKE)
        yield Screen(stream)
    finally:
        stream.write(_GIVE_BACK)
        stream.flush()
