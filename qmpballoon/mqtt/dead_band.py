"""Decides which changes are published. Pure.

A message costs the agent 100 µs, the broker and each reader as much, and a database a row. So facts
such as target, mode and health are published at once. The guest's figures and the RSS change all the
time: they are published when they leave a dead band around the last published value, 2 % of it, at
least 1 MiB. The band is relative, so that small values of available memory are reported precisely.
Ages, time stamps and counters alone are no change; the next message has them.
"""

from __future__ import annotations

from typing import Final

from qmpballoon.model.records import GuestStats, HostStatus, Sample, VmStatus
from qmpballoon.units import MIB

_SIZES: Final = ("total", "free", "available", "caches")  # the other figures are counters
_NO_FIGURES: Final = GuestStats()


def leaves_dead_band(published: int | None, current: int | None) -> bool:
    """Tell whether a size in bytes moved far enough to be published again; None differs from any size."""
    if published is None or current is None:
        return published is not current
    return abs(current - published) > max(MIB, published // 50)


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
    return published is None or _host_facts(published) != _host_facts(current)


def _guest_changed(published: Sample | None, current: Sample | None) -> bool:
    if published is current:
        return False
    before = _NO_FIGURES if published is None else published.stats
    now = _NO_FIGURES if current is None else current.stats
    return any(leaves_dead_band(getattr(before, name), getattr(now, name)) for name in _SIZES)


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
        record.vms_total,
        record.vms_online,
        record.unidentified,
        record.alarms,
        record.sampling_late_s > 0,
        tuple(
            (hold.get("hold"), hold.get("size")) for hold in record.holds
        ),  # the remaining time is no change
    )
