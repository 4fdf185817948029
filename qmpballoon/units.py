"""Sizes: parsing, formatting and rounding.

Sizes are bytes everywhere inside the program. Only typed text has units, with the same grammar in the
command line, the configuration, the Python API and MQTT payloads.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from qmpballoon.errors import InvalidSize, OutOfRange

Size: TypeAlias = int | str

KIB: Final = 1024
MIB: Final = 1024**2
GIB: Final = 1024**3
PAGE: Final = 4 * KIB  # QEMU rounds balloon targets up to VIRTIO_BALLOON_PFN_SHIFT pages
MAX_SIZE: Final = 2**53  # the largest integer that every JSON parser keeps exact

_FACTORS: Final = {
    "": 1,
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1024**4,
    "kB": 1000,
    "KB": 1000,
    "MB": 1000**2,
    "GB": 1000**3,
    "TB": 1000**4,
}
_UNITS: Final = "B|KiB|MiB|GiB|TiB|kB|KB|MB|GB|TB|%"
_GRAMMAR: Final = re.compile(rf"(-?[0-9]+(?:\.[0-9]+)?)[ \t]?({_UNITS})?")
SIZE_PATTERN: Final = rf"[0-9]+(\.[0-9]+)?[ \t]?({_UNITS})?"
"""The grammar of a size as typed, for those who check it elsewhere; the range is not part of it."""

_SHORT: Final = {
    "k": "KiB",
    "K": "KiB",
    "m": "MiB",
    "M": "MiB",
    "g": "GiB",
    "G": "GiB",
    "t": "TiB",
    "T": "TiB",
}
_LARGEST_SHOWN: Final = 2**80  # an agent may send an integer of any length
_LONGEST_TEXT: Final = 64  # longer text is refused; bounds the cost of untrusted input


@dataclass(frozen=True, slots=True)
class Amount:
    """A size as typed: bytes, or a share of a whole that is not known yet (``50%``)."""

    numerator: int  # of bytes, or of the fraction of the whole: 50 and 100 for "50%"
    denominator: int
    relative: bool
    text: str

    def of(self, whole: int | None) -> int:
        """Return the bytes; a share needs the ``whole`` in bytes.

        Raises:
            InvalidSize: a share, and ``whole`` is None.
            OutOfRange: zero, negative or more than 2**53 bytes.
        """
        if not self.relative:
            return _in_range(self.numerator, self.denominator, self.text)
        if whole is None:
            raise InvalidSize(self.text, "a percentage has no meaning here: give a size like 512MiB")
        return _in_range(self.numerator * whole, self.denominator, self.text)

    def exceeds(self, other: Amount) -> bool:
        """Tell whether it is more than another one of the same kind, bytes or a share."""
        return self.numerator * other.denominator > other.numerator * self.denominator

    def __str__(self) -> str:
        return self.text


def parse_amount(size: Size | float) -> Amount:
    """Parse a size as typed; a percentage stays relative.

    Raises:
        InvalidSize: not of the grammar; the message has a hint.
        OutOfRange: zero, negative or more than 2**53 bytes.
    """
    if isinstance(size, bool) or not isinstance(size, int | float | str):
        raise InvalidSize(type(size).__name__, "a size is a number of bytes or text like 512MiB")
    if not isinstance(size, str):
        if isinstance(size, float) and not (math.isfinite(size) and size.is_integer()):
            raise InvalidSize(size, "a bare number is whole bytes")
        written = str(size) if abs(size) < 10**_LONGEST_TEXT else "many digits"  # str() refuses thousands
        amount = Amount(int(size), 1, relative=False, text=written)
        amount.of(None)
        return amount
    found = _GRAMMAR.fullmatch(size) if len(size) <= _LONGEST_TEXT else None
    if found is None:
        raise InvalidSize(size[:_LONGEST_TEXT], _hint(size))
    whole, _, decimals = found[1].partition(".")
    decimals = decimals.rstrip("0")  # equal sizes compare as equal
    numerator, denominator, unit = int(whole + decimals), 10 ** len(decimals), found[2] or ""
    if unit == "%":
        amount = Amount(numerator, denominator * 100, relative=True, text=size)
        if not 0 < numerator <= MAX_SIZE * denominator:
            raise OutOfRange(f"the size {size!r} must be more than zero and at most 2**53 %")
        return amount
    if unit in ("", "B") and numerator % denominator:
        raise InvalidSize(size, "a number without a unit is whole bytes")
    amount = Amount(numerator * _FACTORS[unit], denominator, relative=False, text=size)
    amount.of(None)
    return amount


def parse_size(size: Size, *, whole: int | None = None) -> int:
    """Return bytes for a size such as ``512MiB``, ``1.5GiB``, ``500MB``, ``50%`` or ``268435456``.

    ``whole`` is the size that a percentage refers to, in bytes; without it a percentage is refused.

    Raises:
        InvalidSize: not of the grammar (``512M`` is refused with a hint), or a percentage without ``whole``.
        OutOfRange: zero, negative or more than 2**53 bytes.
    """
    return parse_amount(size).of(whole)


def format_size(size: int | None) -> str:
    """Return a size for people: three significant digits in the unit that fits, ``-`` for None.

    >>> format_size(268435456)
    '256 MiB'
    """
    if size is None:
        return "-"
    sign, rest = ("-", -size) if size < 0 else ("", size)
    if rest < KIB:
        return f"{sign}{rest} B"
    if rest > _LARGEST_SHOWN:
        return f"{sign}many TiB"
    value = float(rest)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1023.5 or unit == "TiB":
            digits = 0 if value >= 99.95 or abs(value - round(value)) < 0.005 else 1 if value >= 9.995 else 2
            return f"{sign}{value:.{digits}f} {unit}"
    raise AssertionError("unreachable: TiB ends the loop")


def round_up_to_page(size: int) -> int:
    """Return ``size`` rounded up to 4 KiB, as QEMU does with a balloon target."""
    return -(-size // PAGE) * PAGE


def _in_range(numerator: int, denominator: int, text: str) -> int:
    size, rest = divmod(numerator, denominator)
    if 2 * rest > denominator or (2 * rest == denominator and size % 2):  # as round() does
        size += 1
    if size < 1:
        raise OutOfRange(f"the size {text!r} must be more than zero")
    if size > MAX_SIZE:
        raise OutOfRange(f"the size {text!r} is more than 2**53 bytes")
    return size


def _hint(text: str) -> str:
    stripped = text.strip()
    short = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKmMgGtT])", stripped)
    if short:
        return f"write {short[1]}{_SHORT[short[2]]} (1024s) or {short[1]}{_SHORT[short[2]][0]}B (1000s)"
    folded = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]+)", stripped)
    if folded:
        for unit in ("KiB", "MiB", "GiB", "TiB", "kB", "MB", "GB", "TB"):
            if unit.lower() == folded[2].lower():
                return f"write {folded[1]}{unit}"
    return "write a size like 512MiB, 1.5GiB, 500MB, 50% or a number of bytes"
