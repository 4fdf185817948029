"""Splits the input of a QMP client into JSON values; there is no separator between requests.

QEMU replies to each invalid value with an error and continues to read (seen with QEMU 7.2 and 11.1).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Final, NoReturn

LONGEST: Final = 64 * 1024 * 1024  # bytes of one value; QEMU's own limit
DEEPEST: Final = 1024  # brackets within brackets; QEMU's own limit (MAX_NESTING of its json-streamer.c)

_TOO_DEEP: Final = "JSON nesting depth limit exceeded"
_PARSE_ERROR: Final = "JSON parse error"
_BLANK: Final = re.compile(rb"[ \t\r\n]*")
_WORD: Final = re.compile(rb"[-+.0-9A-Za-z]+")
_STRUCTURE: Final = re.compile(rb'["{}\[\]]')
_IN_TEXT: Final = re.compile(rb'\\.|"', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Request:
    """One JSON value of any type."""

    value: object


@dataclass(frozen=True, slots=True)
class Broken:
    """Bytes that are no JSON value; ``description`` is QEMU's error message."""

    description: str


class RequestStream:
    """An incremental splitter. Invalid input never raises.

    With ``positions`` the message of a parse error starts with its line and column, both counted in bytes
    from 1 over the whole input.
    """

    def __init__(self, *, positions: bool = False) -> None:
        self._positions = positions
        self._line, self._column = 1, 1  # of the first pending byte
        self._pending = bytearray()
        self._scanned = 0  # bytes of the pending value in which brackets were counted
        self._depth = self._deepest = 0
        self._in_text = False

    def feed(self, received: bytes) -> list[Request | Broken]:
        """Return the values that these bytes complete, in order."""
        self._pending += received
        found: list[Request | Broken] = []
        while (value := self._next()) is not None:
            found.append(value)
        return found

    def _next(self) -> Request | Broken | None:
        if not self._scanned:
            blank = _BLANK.match(self._pending)
            self._consume(blank.end() if blank else 0)
        if not self._pending:
            return None
        if self._scanned or self._pending[0] in b'{["':
            if self._scan():
                return self._take()
            if len(self._pending) > LONGEST:
                return self._drop(len(self._pending), "JSON token size limit exceeded")
            return None
        if self._pending[0] in b"}]":
            return self._drop(1, f"{_PARSE_ERROR}, expecting value")
        word = _WORD.match(self._pending)
        if word is None:
            return self._drop(1, f"{_PARSE_ERROR}, stray '{_shown(self._pending[0])}'")
        if word.end() == len(self._pending) and word.end() < LONGEST:
            return None
        self._scanned = word.end()
        return self._take()

    def _scan(self) -> bool:
        while True:
            found = (_IN_TEXT if self._in_text else _STRUCTURE).search(self._pending, self._scanned)
            if found is None:
                # an escape may be split: read its backslash again
                half_escape = self._in_text and self._ends_in_backslash()
                self._scanned = len(self._pending) - (1 if half_escape else 0)
                return False
            self._scanned = found.end()
            mark = found[0]
            if mark == b'"':
                self._in_text = not self._in_text
            elif mark in (b"{", b"["):
                self._depth += 1
                self._deepest = max(self._deepest, self._depth)
            elif mark in (b"}", b"]"):
                self._depth -= 1
            if self._depth == 0 and not self._in_text:
                return True

    def _ends_in_backslash(self) -> bool:
        rest = self._pending[self._scanned :]
        return (len(rest) - len(rest.rstrip(b"\\"))) % 2 == 1

    def _take(self) -> Request | Broken:
        text = bytes(self._pending[: self._scanned])
        if self._deepest > DEEPEST:
            return self._drop(len(text), _TOO_DEEP)
        try:
            value = json.loads(text.decode(), parse_constant=_refuse)
        except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are subclasses
            return self._drop(len(text), _sentence(text, error), at=_offset(error))
        except RecursionError:  # Python 3.11 accepts less than QEMU, 3.13 more
            return self._drop(len(text), _TOO_DEEP)
        self._drop(len(text), "")
        return Request(value)

    def _drop(self, size: int, description: str, *, at: int = 0) -> Broken:
        if self._positions and description.startswith(_PARSE_ERROR):
            line, column = self._position(at)
            description = f"{line}:{column}: {description}"
        self._consume(size)
        self._scanned, self._depth, self._deepest, self._in_text = 0, 0, 0, False
        return Broken(description)

    def _position(self, offset: int) -> tuple[int, int]:
        """Return line and column of a pending byte."""
        before = self._pending[:offset]
        if b"\n" not in before:
            return self._line, self._column + offset
        return self._line + before.count(b"\n"), offset - before.rindex(b"\n")

    def _consume(self, size: int) -> None:
        if self._positions:
            self._line, self._column = self._position(size)
        del self._pending[:size]


def _offset(error: ValueError) -> int:
    """Return the offset of the error in a value in bytes, if Python reports it."""
    return len(error.doc[: error.pos].encode()) if isinstance(error, json.JSONDecodeError) else 0


def _refuse(constant: str) -> NoReturn:
    raise ValueError(constant)  # NaN and Infinity: Python accepts them, JSON does not


def _sentence(text: bytes, error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        keyword = re.match(r"[A-Za-z]+", error.doc[error.pos :])
        if keyword:
            return f"{_PARSE_ERROR}, invalid keyword '{keyword[0]}'"
    elif not isinstance(error, UnicodeDecodeError) and str(error) in ("NaN", "Infinity", "-Infinity"):
        return f"{_PARSE_ERROR}, invalid keyword '{error}'"
    return f"{_PARSE_ERROR}, expecting value"


def _shown(byte: int) -> str:
    return chr(byte) if 32 <= byte < 127 else "\N{REPLACEMENT CHARACTER}"
