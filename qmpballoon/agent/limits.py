"""A VM's limits: what is in force, and whether a target lies within it. Pure."""

from __future__ import annotations

from qmpballoon.agent.state_file import Kept
from qmpballoon.config import VmSettings
from qmpballoon.errors import ConnectionLost, OutOfRange
from qmpballoon.model.records import Limits, VmStatus
from qmpballoon.units import format_size, parse_amount


def limits_of(kept: Kept, settings: VmSettings, size: int | None) -> Limits:
    """Return the limits that were configured, narrowed by those that were set over MQTT."""
    overridden = tuple(key for key in ("floor", "ceiling", "shares") if getattr(kept, key) is not None)
    shares = settings.shares if kept.shares is None else kept.shares
    if size is None:
        return Limits(None, None, shares, overridden)
    lowest, highest = floor, ceiling = settings.limits(size)
    if kept.ceiling is not None:  # the file's limits may have changed since it was set
        ceiling = max(lowest, min(highest, parse_amount(kept.ceiling).of(size)))
    if kept.floor is not None:
        floor = max(lowest, parse_amount(kept.floor).of(size))
    return Limits(min(floor, ceiling), ceiling, shares, overridden)


def checked_target(status: VmStatus, target: int) -> int:
    """Return the target if the VM's limits allow it: a target is never clamped.

    Raises:
        OutOfRange: below the floor or above the ceiling.
        ConnectionLost: the VM's size, and so its limits, are not known yet.
    """
    floor, ceiling = status.limits.floor, status.limits.ceiling
    if floor is None or ceiling is None:
        raise ConnectionLost(f"{status.id} is {status.health}: its size is not known yet")
    if not floor <= target <= ceiling:
        raise OutOfRange(
            f"{format_size(target)} ({target} bytes) is outside {status.id}'s floor {format_size(floor)} "
            f"and ceiling {format_size(ceiling)}"
        )
    return target
