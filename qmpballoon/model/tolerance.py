"""When a target counts as reached, and when a balloon stands still. Pure."""

from __future__ import annotations

from typing import Final

_LEAST: Final = 1024**2  # bytes
_STEADY: Final = 2 * 1024**2  # bytes
_SHARE: Final = 200  # one part in so many of the VM's size: 0.5 %


def tolerance(size: int) -> int:
    """Return how far from the target, in bytes, still counts as reached for a VM of ``size`` bytes."""
    return max(_LEAST, size // _SHARE)


def is_reached(actual: int, target: int, size: int) -> bool:
    """Tell whether ``actual`` is as near to ``target`` as counts as reached (all in bytes)."""
    return abs(actual - target) <= tolerance(size)


def is_steady(before: int, after: int) -> bool:
    """Tell whether an ``actual`` that moved so little around a sample belongs to it (both in bytes).

    Figures of a guest and an ``actual`` of another moment have nothing to do with each other: a balloon
    moves by hundreds of MiB in a second.
    """
    return abs(after - before) <= _STEADY
