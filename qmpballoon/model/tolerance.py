"""When a target counts as reached. Pure."""

from __future__ import annotations

from typing import Final

_LEAST: Final = 1024**2  # bytes
_SHARE: Final = 200  # one part in so many of the VM's size: 0.5 %


def tolerance(size: int) -> int:
    """Return how far from the target, in bytes, still counts as reached for a VM of ``size`` bytes."""
    return max(_LEAST, size // _SHARE)


def is_reached(actual: int, target: int, size: int) -> bool:
    """Tell whether ``actual`` is as near to ``target`` as counts as reached (all in bytes)."""
    return abs(actual - target) <= tolerance(size)
