"""Finds the lines of keys in a TOML text: ``tomllib`` gives values without positions. Pure.

The text is scanned once for keys; values are skipped. The scan ends at a syntax that the scanner does not
know, so a key has its correct line or none.
"""

from __future__ import annotations

import contextlib
import re
import tomllib
from typing import Final

from qmpballoon.readers import Path

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_SPACE: Final = re.compile(r"[ \t]*")
_REST_OF_LINE: Final = re.compile(r"[ \t]*(?:#[^\n]*)?(?:\r?\n|\Z)")
_SEGMENT: Final = re.compile(r"""[A-Za-z0-9_-]+|"(?:[^"\\\n]|\\[^\n])*"|'[^'\n]*'""")
_STRING: Final = re.compile(
    r'''"""(?:[^\\]|\\.)*?"{3,5}(?!")|\'\'\'.*?\'{3,5}(?!\')|"(?:[^"\\\n]|\\[^\n])*"|'[^'\n]*\'''', re.DOTALL
)
_SCALAR: Final = re.compile(r"[^\s,\[\]{}#=\"'][^,\[\]{}#=\"'\n]*")


LONGEST_KEY: Final = 32
"""Segments of a dotted key. The memory that tomllib needs grows with their square: 40 GB for 100,000."""


class KeyTooLong(Exception):
    """A dotted key has more than LONGEST_KEY segments."""

    def __init__(self, line: int) -> None:
        self.line = line
        super().__init__(f"line {line}: a dotted key has more than {LONGEST_KEY} parts")


class _UnknownSyntax(Exception):
    """The scanner does not know the syntax that follows."""


def key_lines(text: str) -> dict[Path, int]:
    """Return the line, counted from 1, of every key, table and array element that was found.

    A path is the keys from the root, with the index in arrays: ``("vm", "match", 0, "floor")``. A table
    that is named several times has the line of the first one. A text that is not TOML has lines up to
    the first unknown syntax.

    Raises:
        KeyTooLong: a dotted key has more than LONGEST_KEY segments; nothing else is raised.
    """
    scanner = _Scanner(text)
    with contextlib.suppress(_UnknownSyntax, RecursionError):
        scanner.document()
    return scanner.lines


def key_line(lines: dict[Path, int], path: Path) -> int | None:
    """Return the line of ``path``, or of the innermost table or array around it; None if unknown."""
    for length in range(len(path), 0, -1):
        if path[:length] in lines:
            return lines[path[:length]]
    return None


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Path, int] = {}
        self._tables_in: dict[Path, int] = {}  # arrays of tables: how many so far
        self._line = 1
        self._counted_to = 0

    def document(self) -> None:
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._key_and_value(table)
            self._expect(_REST_OF_LINE)
            self._skip(_BLANK)

    def _header(self) -> Path:
        brackets = 2 if self.text.startswith("[[", self.at) else 1
        self.at += brackets
        self._skip(_SPACE)
        path: Path = ()
        segments = self._segments()
        for place, (segment, line) in enumerate(segments):
            path = (*path, segment)
            self.lines.setdefault(path, line)
            is_last = place == len(segments) - 1
            if is_last and brackets == 2:
                self._tables_in[path] = self._tables_in.get(path, 0) + 1
            if path in self._tables_in:
                path = (*path, self._tables_in[path] - 1)
                self.lines.setdefault(path, line)
        self._expect(re.compile(re.escape("]" * brackets)))
        return path

    def _key_and_value(self, table: Path) -> None:
        path = table
        for segment, line in self._segments():
            path = (*path, segment)
            self.lines.setdefault(path, line)
        self._expect(re.compile("="))
        self._skip(_SPACE)
        self._value(path)

    def _segments(self) -> list[tuple[str, int]]:
        """Read a dotted key; return its segments, each with its line."""
        found: list[tuple[str, int]] = []
        while True:
            line = self._line_here()
            written = self._expect(_SEGMENT)
            found.append((_unquoted(written), line))
            if len(found) > LONGEST_KEY:
                raise KeyTooLong(line)
            self._skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return found
            self.at += 1
            self._skip(_SPACE)

    def _value(self, path: Path) -> None:
        if self.text.startswith("[", self.at):
            self.at += 1
            index = 0
            while not self._closed("]"):
                self.lines[(*path, index)] = self._line_here()
                self._value((*path, index))
                index += 1
                self._comma_before("]")
        elif self.text.startswith("{", self.at):
            self.at += 1
            while not self._closed("}"):
                self._key_and_value(path)
                self._comma_before("}")
        elif self.text.startswith(('"', "'"), self.at):
            self._expect(_STRING)
        else:
            self._expect(_SCALAR)

    def _closed(self, bracket: str) -> bool:
        self._skip(_BLANK)
        if self.text.startswith(bracket, self.at):
            self.at += 1
            return True
        return False

    def _comma_before(self, bracket: str) -> None:
        self._skip(_BLANK)
        if self.text.startswith(",", self.at):
            self.at += 1
        elif not self.text.startswith(bracket, self.at):
            raise _UnknownSyntax

    def _skip(self, pattern: re.Pattern[str]) -> None:
        found = pattern.match(self.text, self.at)
        self.at = found.end() if found else self.at

    def _expect(self, pattern: re.Pattern[str]) -> str:
        found = pattern.match(self.text, self.at)
        if found is None:
            raise _UnknownSyntax
        self.at = found.end()
        return found[0]

    def _line_here(self) -> int:
        self._line += self.text.count("\n", self._counted_to, self.at)
        self._counted_to = self.at
        return self._line


def _unquoted(written: str) -> str:
    if written[0] == "'":
        return written[1:-1]
    if written[0] != '"':
        return written
    try:
        (segment,) = tomllib.loads(f"{written} = 0")
    except ValueError:
        raise _UnknownSyntax from None
    return segment
