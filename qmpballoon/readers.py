"""Readers that validate values of configuration files, requests and traces. Pure.

A reader takes a value from TOML, JSON, msgpack or a command line and returns the checked value, or raises
Wrong with a reason that names what is valid. A reason never has control characters or more than a few
dozen characters of the value.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias
from weakref import WeakKeyDictionary

from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.units import MAX_SIZE, SIZE_PATTERN, Amount, parse_amount

Reader: TypeAlias = Callable[[object], Any]
Path: TypeAlias = tuple[str | int, ...]
"""Keys and indices from the top of a document: ``("vm", "match", 1, "floor")``."""
Code: TypeAlias = Literal["malformed", "out-of-range"]

JsonSchema: TypeAlias = Mapping[str, object]
"""A JSON Schema, or a part of one."""

LONGEST_QUOTED: Final = 60
LONGEST_SOCKET_PATH: Final = 107  # sun_path is 108 bytes with its NUL: unix(7)
_BARE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


_SCHEMAS: Final[WeakKeyDictionary[Reader, JsonSchema]] = WeakKeyDictionary()


def described(read: Reader, **schema: object) -> Reader:
    """Return the reader; the schema is what `schema_of` returns for it."""
    _SCHEMAS[read] = schema
    return read


def schema_of(read: Reader) -> JsonSchema:
    """Return the JSON Schema of what a reader takes; a reader without one takes anything."""
    return _SCHEMAS.get(read, {})


@dataclass(frozen=True, slots=True)
class Fault:
    """One problem and its place; ``code`` is the error word if a request has it."""

    path: Path
    reason: str
    code: Code = "malformed"


class Wrong(Exception):
    """An invalid value; ``inside`` has the faults of its parts, with paths below the value."""

    def __init__(self, reason: str, inside: Iterable[Fault] = (), *, code: Code = "malformed") -> None:
        self.reason = reason
        self.inside = tuple(inside)
        self.code: Final = code
        super().__init__(reason)

    def below(self, path: Path) -> list[Fault]:
        """Return the faults of a value at ``path``."""
        if not self.inside:
            return [Fault(path, self.reason, self.code)]
        return [Fault((*path, *fault.path), fault.reason, fault.code) for fault in self.inside]


class Reading:
    """Collects the faults of a document while its values are read."""

    def __init__(self) -> None:
        self.faults: list[Fault] = []
        self.good: set[Path] = set()
        self.bad: set[Path] = set()

    def wrong(self, path: Path, reason: str) -> None:
        """Add a fault."""
        self.faults.append(Fault(path, reason))
        self.bad.add(path)

    def value(self, value: object, path: Path, read: Reader) -> Any:
        """Return the checked value, or add its faults and return None."""
        try:
            checked = read(value)
        except Wrong as wrong:
            faults = wrong.below(path)
            self.faults += faults
            self.bad |= {path, *(fault.path for fault in faults)}
            return None
        self.good.add(path)
        return checked

    def table(self, content: Mapping[str, object], path: Path, known: Mapping[str, Reader]) -> dict[str, Any]:
        """Return the valid values of an object, by key; add the faults of the others."""
        checked: dict[str, Any] = {}
        for name, value in content.items():
            if name in known:
                good = self.value(value, (*path, name), known[name])
                if good is not None:
                    checked[name] = good
            else:
                self.unknown((*path, name), name, known)
        return checked

    def unknown(self, path: Path, name: str, known: Collection[str]) -> None:
        """Add a fault for an unknown key."""
        self.wrong(path, unknown_key(name, known))


def dotted(path: Path) -> str:
    """Return a path as text, such as ``vm.match[1].floor``; other keys than bare ones are quoted and cut."""
    written = ""
    for segment in path:
        if isinstance(segment, int):
            written += f"[{segment}]"
        else:
            written += ("." if written else "") + (
                segment if _BARE.fullmatch(segment) else repr(segment[:64])
            )
    return written


def did_you_mean(word: str, known: Iterable[str], *, quote: str = "") -> str:
    """Return ``; did you mean x?`` for a word that is similar to a known one, else an empty text."""
    near = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6) if len(word) <= 64 else []
    return f"; did you mean {quote}{near[0]}{quote}?" if near else ""


def unknown_key(name: str, known: Collection[str], *, what: str = "key", quote: str = "") -> str:
    """Return the reason for an unknown key: the similar known one, or all known ones."""
    guess = did_you_mean(name, known, quote=quote)
    return f"unknown {what}{guess}" if guess else f"unknown {what}; known are {', '.join(known)}"


def _quoted(text: str) -> str:
    """Return a text in quotes, cut if it is long: one unprintable character takes up to ten in quotes."""
    whole = repr(text)
    if len(text) <= 48 and len(whole) <= LONGEST_QUOTED:
        return whole
    start = text[:45]
    while len(repr(start)) > LONGEST_QUOTED:
        start = start[: len(start) * 3 // 4]
    return f"{start!r}..."


def shown(value: object) -> str:
    """Return a short description of any value for an error message."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return f"the number {value}" if value.bit_length() <= 64 else "a number of many digits"
    if isinstance(value, float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {_quoted(value)}"
    if value is None:
        return "null"
    return (
        "an array" if isinstance(value, list | tuple) else "a table" if isinstance(value, dict) else "a date"
    )


def flag(value: object) -> bool:
    """Read true or false."""
    if not isinstance(value, bool):
        raise Wrong(f"must be true or false, not {shown(value)}")
    return value


def number(low: float, high: float, unit: str = "", *, or_zero: bool = False) -> Reader:
    """Return a reader of numbers from ``low`` to ``high``; ``or_zero``: 0 is accepted as well."""
    what = f"a number of {unit}" if unit else "a number"
    wanted = f"must be {'0 or ' if or_zero else ''}{what} from {low:g} to {high:.17g}"

    def read(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise Wrong(f"{wanted}, not {shown(value)}")
        if not (low <= value <= high or (or_zero and value == 0)):
            raise Wrong(f"{wanted}, not {shown(value)}", code="out-of-range")
        return float(value)

    return described(read, type="number", minimum=0 if or_zero else low, maximum=high)


def whole(low: int, high: int, unit: str = "") -> Reader:
    """Return a reader of whole numbers from ``low`` to ``high``; 2.0 is accepted because it is whole."""
    what = f"a whole number of {unit}" if unit else "a whole number"
    wanted = f"must be {what} from {low} to {high}"

    def read(value: object) -> int:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or (isinstance(value, float) and not value.is_integer())
        ):
            raise Wrong(f"{wanted}, not {shown(value)}")
        if not low <= value <= high:
            raise Wrong(f"{wanted}, not {shown(value)}", code="out-of-range")
        return int(value)

    return described(read, type="integer", minimum=low, maximum=high)


def word(*known: str, quote: str = "") -> Reader:
    """Return a reader of one word of a fixed list; ``quote`` is put around each in the reason."""
    listed = ", ".join(f"{quote}{each}{quote}" for each in known)

    def read(value: object) -> str:
        if isinstance(value, str) and value in known:
            return value
        guess = did_you_mean(value, known, quote=quote) if isinstance(value, str) else ""
        raise Wrong(f"must be one of {listed}, not {shown(value)}{guess}")

    return described(read, enum=list(known))


def text(longest: int) -> Reader:
    """Return a reader of printable text of 1 to ``longest`` characters."""

    def read(value: object) -> str:
        if not isinstance(value, str):
            raise Wrong(f"must be text in quotes, not {shown(value)}")
        if not value.strip():
            raise Wrong("must not be empty")
        if len(value) > longest:
            raise Wrong(f"must have at most {longest} characters, not {len(value)}")
        if not value.isprintable():
            raise Wrong("must not have control characters or line ends")
        return value

    return described(read, type="string", minLength=1, maxLength=longest)


def amount(value: object) -> Amount:
    """Read a size or a share, as typed."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Wrong(f'must be a size like "512MiB" or "50%", not {shown(value)}')
    try:
        return parse_amount(value)
    except InvalidSize as error:
        raise Wrong(f"{shown(value)} is no size: {error.hint}") from None
    except OutOfRange:
        reason = f"must be more than zero and at most 2**53 bytes, not {shown(value)}"
        raise Wrong(reason, code="out-of-range") from None


described(
    amount,
    anyOf=[
        {"type": "integer", "minimum": 1, "maximum": MAX_SIZE},
        {"type": "string", "pattern": f"^{SIZE_PATTERN}$"},
    ],
    description="Bytes, or text with a unit; a percentage is of the VM's size, or of the budget.",
)


def parts(of: Iterable[tuple[str | int, object, Reader]]) -> list[Any]:
    """Return several parts of one value, each of which has a key or index, a value and a reader.

    Raises:
        Wrong: has the faults of all of them.
    """
    good: list[Any] = []
    inside: list[Fault] = []
    for key, value, read in of:
        try:
            good.append(read(value))
        except Wrong as wrong:
            inside += wrong.below((key,))
    if inside:
        raise Wrong("has wrong elements", inside)
    return good
