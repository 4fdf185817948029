"""What ``wait`` waits for: ``ready``, ``reached``, or a comparison of a figure with a size. Pure."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qmpballoon.errors import InvalidSize
from qmpballoon.readers import did_you_mean
from qmpballoon.units import Amount, parse_amount

FIGURES: Final = (
    "size",
    "actual",
    "balloon",
    "target",
    "held",
    "rss",
    "total",
    "free",
    "available",
    "caches",
)
"""The figures that can be compared, all in bytes, named as in the VM object."""

OF_GUEST: Final = ("held", "total", "free", "available", "caches")
"""Those of the guest's statistics, which are None without fresh ones."""

WORDS: Final = ("ready", "reached")

_OPERATORS: Final[Mapping[str, Callable[[int, int], bool]]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}
_COMPARISON: Final = re.compile(r"([^\s<>=!]+)\s*([<>=!]+)\s*(.*)")
_EXAMPLE: Final = "'available>200MiB'"


class InvalidCondition(ValueError):
    """Text that is no condition; the message says what is one."""


@dataclass(frozen=True, slots=True)
class Condition:
    """A condition as typed. ``figure`` None: one of WORDS, which is ``text``.

    ``compares`` is the operator as typed.
    """

    text: str
    figure: str | None = None
    compares: str = ""
    amount: Amount | None = None

    def is_true(self, figures: Mapping[str, int | None]) -> bool:
        """Tell whether the comparison holds; a percentage is of the figure ``size``.

        A figure that is unknown makes it false.
        """
        assert self.figure is not None
        assert self.amount is not None
        value, size = figures.get(self.figure), figures.get("size")
        if value is None or (self.amount.relative and size is None):
            return False
        return _OPERATORS[self.compares](value, self.amount.of(size))

    def __str__(self) -> str:
        return self.text


def parse_condition(text: str) -> Condition:
    """Return the condition that was typed.

    Raises:
        InvalidCondition: it is none.
        InvalidSize, OutOfRange: what a figure is compared with is no size.
    """
    typed = text.strip()
    if typed in WORDS:
        return Condition(typed)
    found = _COMPARISON.fullmatch(typed)
    if typed in FIGURES:
        raise InvalidCondition(f"{typed} is a figure: compare it with a size, such as '{typed}>200MiB'")
    if found is None:
        meant = did_you_mean(typed, (*WORDS, *FIGURES))
        raise InvalidCondition(
            f"{text[:64]!r} is no condition{meant or ';'} write {', '.join(WORDS)}, or compare a figure "
            f"with a size, such as {_EXAMPLE}"
        )
    figure, compares, size = found.groups()
    if figure not in FIGURES:
        raise InvalidCondition(
            f"there is no figure {figure[:64]!r}"
            f"{did_you_mean(figure, FIGURES) or '; there are ' + ', '.join(FIGURES)}"
        )
    if compares not in _OPERATORS:
        meant = "; write ==" if compares == "=" else f"; there are {', '.join(_OPERATORS)}"
        raise InvalidCondition(f"{compares[:8]!r} compares nothing{meant}")
    if not size:
        raise InvalidSize("", f"compare {figure} with a size, such as {figure}{compares}200MiB")
    return Condition(typed, figure, compares, parse_amount(size))
