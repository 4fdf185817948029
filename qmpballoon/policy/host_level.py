"""How a host stands: what its VMs count against the budget, and how short it is. Pure."""

from __future__ import annotations

from typing import Final

from qmpballoon.model.records import LEVELS, VmStatus
from qmpballoon.policy.allocation import with_margin
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.units import MIB

_MARGIN: Final = 24 * MIB  # what the one-shot ``set`` leaves a guest, too
_EASES_BY: Final = 1.2  # a level is left when things are so much better than where it began


def reclaimable(record: VmStatus) -> int:
    """Return what an idle guest could give without reclaim, by a fresh sample, in bytes."""
    held = record.sample.held if record.sample else None
    if record.health != "ok" or held is None or record.actual is None or record.limits.floor is None:
        return 0
    return max(0, record.actual - max(record.limits.floor, held + _MARGIN))


def needs(snapshot: Snapshot) -> int:
    """Return what all guests hold, with a margin, in bytes: what no policy can squeeze out of them."""
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

    By MemAvailable against the reserve, the time that everything stalled, and what the guests hold
    against the budget; never by the budget that is left, as all slack is lent. A worse level comes at
    once, a better one when things are a fifth better than its mark.
    """
    worse = _level(mem_available, reserve, psi_full_avg10, needs, budget, ease=1.0)
    eased = _level(mem_available, reserve, psi_full_avg10, needs, budget, ease=_EASES_BY)
    if LEVELS.index(worse) >= LEVELS.index(before):
        return worse
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
