"""Runs the demo in a terminal of its own and draws one moment of it as an SVG: the picture of the README.

.venv/bin/python scripts/demo_picture.py docs/demo.svg --at 29
"""

from __future__ import annotations

import argparse
import codecs
import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from xml.sax.saxutils import escape

COLUMNS: Final = 104
ROWS: Final = 24
_CELL: Final = (8, 18)  # of a character, in pixels
_MARGIN: Final = 14
_SGR: Final = re.compile(r"\x1b\[([0-9;]*)m")
_OTHER_CONTROL: Final = re.compile(r"\x1b\[[0-9;?]*[A-HJ-Za-ln-z]")
_COLOURS: Final = {"31": "#f2777a", "32": "#7ec699", "33": "#ffcc66", "2": "#8a8f98", "1": "#ffffff"}
_TEXT: Final = "#d5d8dd"
_BARS: Final = {"█": 1.0, "▒": 0.42}  # drawn as rectangles of this opacity, because fonts differ in these
_WORDS: Final = re.compile(r"\S+(?: \S+)*")  # SVG collapses two spaces
_RUN: Final = re.compile(r"(█+|▒+|·+|│|[^█▒·│]+)")


def recorded(at_s: int) -> str:
    """Run the demo in a pseudo-terminal until it drew the picture; return what it printed there."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(TERM="xterm-256color", LC_ALL="C.UTF-8")
        os.environ.pop("NO_COLOR", None)
        os.execv(sys.executable, [sys.executable, "-m", "qmpballoon", "demo"])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    printed, is_drawn = "", False
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    while chunk := _read(terminal):
        printed += decode(chunk)
        if not is_drawn and _frame(printed, at_s + 1) is not None:
            is_drawn = True
            os.write(terminal, b"\x03")  # Ctrl-C: it cleans up and ends
    os.waitpid(pid, 0)
    return printed


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # its other end is closed
        return b""


def frame_at(printed: str, at_s: int) -> list[str]:
    """Return the lines of the first picture of the run under the agent's policy that is ``at_s`` old."""
    frame = _frame(printed, at_s)
    if frame is None:
        raise SystemExit(f"the demo drew no picture at {at_s} s:\n{printed[-2000:]}")
    lines = [line.rstrip("\r") for line in frame.partition("\x1b[J")[0].split("\n")]
    return [_OTHER_CONTROL.sub("", line) for line in lines]


def _frame(printed: str, at_s: int) -> str | None:
    title = re.compile(rf"[^\n]*policy fairshare[^\n]* {at_s} of [0-9]+ s")
    return next((frame for frame in printed.split("\x1b[H")[1:] if title.match(frame)), None)


def drawn(lines: list[str]) -> str:
    """Return the SVG of lines with the control sequences of colours."""
    while not _SGR.sub("", lines[-1]).strip():
        lines.pop()
    width = COLUMNS * _CELL[0] + 2 * _MARGIN
    height = len(lines) * _CELL[1] + 2 * _MARGIN
    body = "\n".join(element for row, line in enumerate(lines) for element in _elements(line, row))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="ui-monospace, Menlo, Consolas, DejaVu Sans Mono, monospace" '
        f'font-size="13" xml:space="preserve" role="img">\n'
        f"<title>qmpballoon demo: five guests share 595 MiB</title>\n"
        f'<rect width="{width}" height="{height}" rx="8" fill="#1d1f24"/>\n{body}\n</svg>\n'
    )


def _elements(line: str, row: int) -> Iterator[str]:
    column = 0
    for text, colour in _spans(line):
        for run in _RUN.findall(text):
            x, y = _MARGIN + column * _CELL[0], _MARGIN + row * _CELL[1]
            span, opacity = len(run) * _CELL[0], _BARS.get(run[0])
            if opacity is not None:
                yield (
                    f'<rect x="{x}" y="{y + 2}" width="{span}" height="{_CELL[1] - 4}" fill="{colour}" '
                    f'fill-opacity="{opacity}"/>'
                )
            elif run[0] == "│":
                yield f'<rect x="{x + 3}" y="{y}" width="2" height="{_CELL[1]}" fill="{colour}"/>'
            else:
                bold = ' font-weight="bold"' if colour == _COLOURS["1"] else ""
                for words in _WORDS.finditer(run):
                    at, wide = x + words.start() * _CELL[0], len(words[0]) * _CELL[0]
                    yield (
                        f'<text x="{at}" y="{y + 13}" fill="{colour}"{bold} textLength="{wide}">'
                        f"{escape(words[0])}</text>"
                    )
            column += len(run)


def _spans(line: str) -> Iterator[tuple[str, str]]:
    """Yield a line's parts, each with its colour."""
    colour = _TEXT
    for at, part in enumerate(_SGR.split(line)):
        if at % 2:
            colour = _COLOURS.get(part, _TEXT)
        elif part:
            yield part, colour


def main() -> None:
    """Record, draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, metavar="FILE.svg")
    parser.add_argument("--at", type=int, default=29, metavar="S", help="seconds of the run (default: 29)")
    options = parser.parse_args()
    options.file.write_text(drawn(frame_at(recorded(options.at), options.at)), encoding="utf-8")


if __name__ == "__main__":
    main()
