"""Readers of typed values; an error says what is valid."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Final

from qmpballoon.condition import Condition, InvalidCondition, parse_condition
from qmpballoon.errors import InvalidSize, OutOfRange
from qmpballoon.units import Amount, parse_amount

_LONGEST_S: Final = 86400.0


def seconds(text: str) -> float:
    """Read a time in seconds: more than 0, at most a day."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _LONGEST_S:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write seconds, such as 30 or 0.5")
    return value


def size(text: str) -> Amount:
    """Read a size as typed; a percentage is resolved when the VM's size is known."""
    try:
        return parse_amount(text)
    except InvalidSize as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except OutOfRange as error:
        raise argparse.ArgumentTypeError(f"out of range: {error}") from None


def condition(text: str) -> Condition:
    """Read a condition of ``wait``."""
    try:
        return parse_condition(text)
    except OutOfRange as error:
        raise argparse.ArgumentTypeError(f"out of range: {error}") from None
    except (InvalidCondition, InvalidSize) as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def count(most: int) -> Callable[[str], int]:
    """Return a reader of a whole number from 1 to ``most``."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal() and len(text) <= 9 and 1 <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:64]!r} is no number from 1 to {most}")
        return int(text)

    return read
