"""Builders of snapshots for policy tests."""

from __future__ import annotations

from typing import Any

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.policy.snapshot import GuestSnapshot, Snapshot
from qmpballoon.units import GIB, MIB


def a_guest(
    vm: str = "a",
    *,
    size: int = 1024,
    actual: int | None = None,
    available: int | None = 200,
    free: int | None = None,
    caches: int = 0,
    seen_at_s: float = 99.9,
    floor: int = 128,
    ceiling: int | None = None,
    target: int | None = None,
    **more: Any,
) -> GuestSnapshot:
    """Return a guest whose sizes are given in MiB; ``available`` None: it has sent no figures."""
    actual = size if actual is None else actual
    sample = None
    if available is not None:
        figures = GuestStats(
            total=(actual - 37) * MIB,
            free=(available - caches if free is None else free) * MIB,
            available=available * MIB,
            caches=caches * MIB,
        )
        sample = Sample(figures, seen_at_s, actual * MIB)
    settled: dict[str, Any] = {"life": "1-1", "booted_at_s": 0.0, "fresh_since_s": 5.0} | more
    return GuestSnapshot(
        id=VmId(vm),
        size=size * MIB,
        actual=actual * MIB,
        target=None if target is None else target * MIB,
        floor=floor * MIB,
        ceiling=(size if ceiling is None else ceiling) * MIB,
        sample=sample,
        **settled,
    )


def a_host(*guests: GuestSnapshot, budget: int = 8192, now_s: float = 100.0, **more: Any) -> Snapshot:
    """Return a host with a budget in MiB."""
    return Snapshot(now_s, guests, budget=budget * MIB, mem_total=64 * GIB, **more)
