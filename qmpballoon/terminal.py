"""Text, tables, colour and progress for a terminal; plain lines without one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final, TextIO

from qmpballoon.errors import QmpBalloonError
from qmpballoon.log import one_line
from qmpballoon.units import format_size

_COLOURS: Final = {"red": "31", "green": "32", "yellow": "33", "bold": "1", "dim": "2"}
_SIZES: Final = ("actual", "from", "to")  # details of events that are bytes if they are numbers
_PROGRESS_AFTER_S: Final = 1.0  # shorter operations show no progress
_PROGRESS_EVERY_S: Final = 0.5


def clean(text: object) -> str:
    """Return untrusted text as one line without control characters."""
    return one_line(text)


def print_error(message: str) -> None:
    """Print an error: each line of ``message`` as ``qmpballoon: LINE`` on stderr.

    A message that must be one line, and may contain untrusted text, is passed through ``clean`` first.
    """
    for line in message.split("\n"):
        print(f"qmpballoon: {clean(line)}", file=sys.stderr, flush=True)


def print_json(document: object) -> None:
    """Print a JSON document as one line."""
    print(json.dumps(document), flush=True)


def has_colour(stream: TextIO) -> bool:
    """Tell whether to use colour: the stream is a terminal, and NO_COLOR is not set (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def coloured(text: str, colour: str, stream: TextIO | None = None) -> str:
    """Return the text in that colour (or bold, dim) where ``stream`` (None: stdout) has colour."""
    if not has_colour(stream or sys.stdout):
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def phrases(details: Mapping[str, object]) -> list[str]:
    """Return the details of an event as text: ``actual 128 MiB``; of a message alone, just the message."""
    if set(details) == {"message"}:
        return [str(details["message"])]
    return [
        f"{key} {format_size(value) if key in _SIZES and isinstance(value, int) else value}"
        for key, value in details.items()
        if value is not None
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> list[str]:
    """Return the lines of a table; columns are right-aligned except those in ``left``."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (header, *rows)
    ]


@asynccontextmanager
async def progress(line: Callable[[float], Awaitable[str]]) -> AsyncIterator[None]:
    """Show ``line(elapsed_s)`` on a terminal's stderr, updated twice a second, while the body runs.

    Nothing is shown in the first second, and the line is removed at the end. If ``line`` raises
    QmpBalloonError, the progress ends and the body goes on.
    """
    if not sys.stderr.isatty():
        yield
        return
    ticking = asyncio.create_task(_draw_progress(line), name="progress")
    try:
        yield
    finally:
        ticking.cancel()
        await asyncio.wait((ticking,), timeout=_PROGRESS_AFTER_S)
        clear_progress()


def clear_progress() -> None:
    """Remove the progress line, if stderr is a terminal, so that another line can be printed."""
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


async def _draw_progress(line: Callable[[float], Awaitable[str]]) -> None:
    began_s = time.monotonic()
    wait_s = _PROGRESS_AFTER_S
    while True:
        await asyncio.sleep(wait_s)
        wait_s = _PROGRESS_EVERY_S
        try:
            text = clean(await line(time.monotonic() - began_s))
        except QmpBalloonError:
            return  # the body gets the error too, and reports it
        print(f"\r\x1b[K{text[: _columns() - 1]}", end="", file=sys.stderr, flush=True)


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except OSError:
        return 80
