"""The memory shortage of a host: what its guests hold, and its level. Pure."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.records import LEVELS, VmStatus
from qmpballoon.model.tolerance import SAFE_MARGIN
from qmpballoon.policy.allocation import with_margin
from qmpballoon.policy.snapshot import Snapshot

_HYSTERESIS: Final = 1.2  # a level ends when the value is better by this factor than where it began


def reclaimable(record: VmStatus) -> int:
    """Return the bytes that a guest could give without reclaim, by a fresh sample."""
    held = record.sample.held if record.sample else None
    if record.health != "ok" or held is None or record.actual is None or record.limits.floor is None:
        return 0
    return max(0, record.actual - max(record.limits.floor, held + SAFE_MARGIN))


def needs(snapshot: Snapshot) -> int:
    """Return what all guests hold, with a margin, in bytes: the part that no policy can reclaim."""
    return sum(
        guest.charge
        if guest.sample is None or guest.sample.held is None
        else max(guest.charge_at_least, with_margin(guest.sample.held))
        for guest in snapshot.guests
    )


def level_of(
    before: str,
    *,
    mem_available: int | None,
    reserve: int,
    psi_full_avg10: float | None,
    needs: int,
    budget: int,
) -> str:
    """Return how short the host is: ``ok``, ``soft``, ``hard`` or ``low``.

    It depends on MemAvailable against the reserve, on full memory stalls, and on what the guests hold against
    the budget. It does not depend on the free budget, because idle memory is lent. A worse level is entered
    at once, a better one when the values are a fifth better than its threshold.
    """
    at_once = _level(mem_available, reserve, psi_full_avg10, needs, budget, ease=1.0)
    eased = _level(mem_available, reserve, psi_full_avg10, needs, budget, ease=_HYSTERESIS)
    if LEVELS.index(at_once) >= LEVELS.index(before):
        return at_once
    return min(before, eased, key=LEVELS.index)


def _level(
    mem_available: int | None, reserve: int, stall: float | None, needs: int, budget: int, *, ease: float
) -> str:
    memory = float("inf") if mem_available is None else mem_available / ease
    stalled, needed = (stall or 0.0) * ease, needs * ease
    if memory < reserve / 2 or stalled > 20:
        return "low"
    if memory < reserve or stalled > 5 or needed > budget:
        return "hard"
    if memory < reserve * 1.5 or stalled > 1 or needed > 0.9 * budget:
        return "soft"
    return "ok"
