"""Decides which changes are published. Pure.

A message costs the agent 100 µs, the broker and each reader as much, and a database a row. So facts
such as target, mode and health are published at once. The guest's figures and the RSS change all the
time: they are published when they leave a dead band around the last published value, 2 % of it, at
least 1 MiB. The band is relative, so that small values of available memory are reported precisely.
The host's figures add up those of many guests: their band is also 0.5 % of the whole that they are parts of.
Ages, time stamps and counters alone are no change, but for one that becomes known or unknown; the next
message has them.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Final

from qmpballoon.model.records import STATISTICS, GuestStats, HostStatus, Sample, VmStatus
from qmpballoon.units import MIB

_SIZES: Final = ("total", "free", "available", "caches")
_COUNTERS: Final = tuple(name for name in STATISTICS if name not in _SIZES)
_sizes_of: Final[Callable[[GuestStats], tuple[int | None, ...]]] = attrgetter(*_SIZES)
_counters_of: Final[Callable[[GuestStats], tuple[int | None, ...]]] = attrgetter(*_COUNTERS)
_OF_THE_WHOLE: Final = 200  # 0.5 %
_LEAST_STEP: Final = 1.0  # of percentages and seconds


def leaves_dead_band(published: int | None, current: int | None, whole: int = 0) -> bool:
    """Tell whether a size in bytes moved far enough to be published again; None differs from any size.

    ``whole`` is the size that it is a part of, if it is a sum over many guests.
    """
    if published is None or current is None:
        return published is not current
    return abs(current - published) > max(MIB, published // 50, whole // _OF_THE_WHOLE)


def leaves_coarse_band(published: float | None, current: float | None) -> bool:
    """Tell whether a percentage or a time moved by more than 1 and by more than a fifth."""
    if published is None or current is None:
        return published is not current
    return abs(current - published) > max(_LEAST_STEP, published / 5)


def vm_changed(published: VmStatus | None, current: VmStatus) -> bool:
    """Tell whether the VM object must be published again."""
    if published is None:
        return True
    if published is current:
        return False
    return (
        _facts(published) != _facts(current)
        or leaves_dead_band(published.rss, current.rss)
        or _guest_changed(published.sample, current.sample)
    )


def host_changed(published: HostStatus | None, current: HostStatus) -> bool:
    """Tell whether the host object must be published before its next heartbeat."""
    return (
        published is None
        or _host_facts(published) != _host_facts(current)
        or _host_figures_changed(published, current)
    )


def _guest_changed(published: Sample | None, current: Sample | None) -> bool:
    if published is current:
        return False
    if published is None or current is None or leaves_dead_band(published.held, current.held):
        return True
    before, now = published.stats, current.stats
    return before is not now and (
        any(map(leaves_dead_band, _sizes_of(before), _sizes_of(now)))
        or any(map(_becomes_known, _counters_of(before), _counters_of(now)))
    )


def _becomes_known(published: int | None, current: int | None) -> bool:
    """Tell whether only one of both is known."""
    return (published is None) != (current is None)


def _facts(record: VmStatus) -> tuple[object, ...]:
    return (
        record.actual,
        record.target,
        record.health,
        record.why,
        record.why_since,
        record.run_state,
        record.mode,
        record.size,
        record.limits,
        record.policy,
        record.life,
        record.pid,
        record.name,
        record.uuid,
        record.socket,
        record.qemu,
    )


def _host_facts(record: HostStatus) -> tuple[object, ...]:
    return (
        record.level,
        record.policy,
        record.mode,
        record.budget,
        record.reserve,
        record.mem_total,
        record.vms_total,
        record.vms_online,
        record.unidentified,
        record.alarms,
        record.sampling_late_s > 0,
        tuple(
            (hold.get("hold"), hold.get("size")) for hold in record.holds
        ),  # the remaining time is no change
    )


def _host_figures_changed(published: HostStatus, current: HostStatus) -> bool:
    total = published.mem_total or 0
    budget = total if published.budget is None else published.budget
    return (
        leaves_dead_band(published.used, current.used, budget)
        or leaves_dead_band(published.available, current.available, budget)
        or leaves_dead_band(published.room, current.room, budget)
        or leaves_dead_band(published.reclaimable, current.reclaimable, budget)
        or leaves_dead_band(published.mem_available, current.mem_available, total)
        or leaves_coarse_band(published.psi_some_avg10, current.psi_some_avg10)
        or leaves_coarse_band(published.psi_full_avg10, current.psi_full_avg10)
        or leaves_coarse_band(published.sampling_late_s, current.sampling_late_s)
    )
