"""When a target counts as reached, and when a balloon is steady. Pure."""

from __future__ import annotations

from typing import Final

_LEAST: Final = 1024**2  # bytes
_STEADY: Final = 2 * 1024**2  # bytes
_SHARE: Final = 200  # size divided by this: 0.5 %


def tolerance(size: int) -> int:
    """Return how far from the target, in bytes, still counts as reached for a VM of ``size`` bytes."""
    return max(_LEAST, size // _SHARE)


def is_reached(actual: int, target: int, size: int) -> bool:
    """Tell whether ``actual`` is within the tolerance of ``target`` (all in bytes)."""
    return abs(actual - target) <= tolerance(size)


def is_steady(before: int, after: int) -> bool:
    """Tell whether ``actual``, read before and after a sample, may be combined with it (both in bytes).

    A balloon moves by hundreds of MiB per second, so a guest's statistics and an ``actual`` of another time
    must not be combined.
    """
    return abs(after - before) <= _STEADY


SAFE_MARGIN: Final = 24 * 1024**2
"""Bytes beyond what it holds that a guest needs: one without swap started to kill at 5 MiB available."""
