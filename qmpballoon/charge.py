"""What VMs count against the budget, and what is left of it. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qmpballoon.model import VmRecord
from qmpballoon.units import MIB

_MARGIN: Final = 24 * MIB  # what the one-shot ``set`` leaves a guest, too


def charge(record: VmRecord) -> int:
    """Return what a VM counts against the budget, in bytes.

    The larger of actual and target; its size while no driver is up or its monitor does not answer, for
    then it may hold all of it; nothing once its QEMU is gone.
    """
    if record.health == "offline":
        return 0
    if record.size is None:
        return record.rss or 0
    if not record.driver_up or record.actual is None:
        return record.size
    return max(record.actual, record.target or 0)


def reclaimable(record: VmRecord) -> int:
    """Return what an idle guest could give without pain, by its fresh statistics, in bytes."""
    available = record.sample.figures.available if record.sample else None
    if record.health != "ok" or available is None or record.actual is None or record.limits.floor is None:
        return 0
    held = max(0, record.actual - available)
    return max(0, record.actual - max(record.limits.floor, held + _MARGIN))


def used(records: Iterable[VmRecord]) -> int:
    """Return the sum of charges in bytes."""
    return sum(charge(record) for record in records)


def level_of(mem_available: int | None, reserve: int) -> str:
    """Return how short the host is: ``ok``, ``soft`` near its reserve, ``hard`` in it, ``low`` at half."""
    if mem_available is None or mem_available >= reserve + reserve // 2:
        return "ok"
    if mem_available >= reserve:
        return "soft"
    return "hard" if mem_available >= reserve // 2 else "low"
