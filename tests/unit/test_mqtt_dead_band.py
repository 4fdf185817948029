"""Which changes are published."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, HostStatus, Life, Limits, Sample, VmStatus
from qmpballoon.mqtt.dead_band import host_changed, leaves_dead_band, vm_changed
from qmpballoon.units import GIB, MIB

FIGURES = GuestStats(total=200 * MIB, free=60 * MIB, available=70 * MIB, caches=2 * MIB, minor_faults=5)
RECORD = VmStatus(
    VmId("web1"),
    "web1",
    "/run/web1.qmp",
    "ok",
    size=256 * MIB,
    actual=128 * MIB,
    sample=Sample(FIGURES, 1.0),
    rss=190 * MIB,
)
HOST = HostStatus("ok", "fairshare", "auto", 10, 2, 3, 7, 100, 50, 0.5, 0.1, 2, 1, (), 4, 5)


def figures(**changed: Any) -> VmStatus:
    return dataclasses.replace(RECORD, sample=Sample(dataclasses.replace(FIGURES, **changed), 3.0))


@pytest.mark.parametrize(
    "changed",
    [
        {"size": 512 * MIB},
        {"actual": 128 * MIB + 4096},
        {"target": 1},
        {"run_state": "paused"},
        {"mode": "manual"},
        {"health": "stale"},
        {"why": "grow"},
        {"why_since": datetime(2026, 11, 23, 8, 31, 5, tzinfo=UTC)},
        {"limits": Limits(1, 2, 3)},
        {"limits": Limits(None, None, 1000, ("floor",))},
        {"life": Life(1, 2)},
        {"rss": None},
        {"rss": 194 * MIB},
        {"sample": None},
    ],
)
def test_a_changed_fact_is_published(changed: dict[str, Any]) -> None:
    assert vm_changed(RECORD, dataclasses.replace(RECORD, **changed))


@pytest.mark.parametrize("name", ["total", "free", "available", "caches"])
def test_a_guest_size_that_leaves_its_dead_band_is_published(name: str) -> None:
    before = getattr(FIGURES, name)
    assert vm_changed(RECORD, figures(**{name: before + before // 50 + MIB + 1}))
    assert vm_changed(RECORD, figures(**{name: None}))
    assert not vm_changed(RECORD, figures(**{name: before + MIB // 2}))


def test_ages_counters_and_small_rss_changes_are_not_published() -> None:
    assert not vm_changed(RECORD, figures(minor_faults=500, major_faults=1, swap_in=9, hugetlb_allocs=1))
    assert not vm_changed(RECORD, figures(oom_kills=2, alloc_stalls=38, async_scans=1, direct_scans=1))
    assert not vm_changed(RECORD, figures(async_reclaims=1, direct_reclaims=1))
    assert not vm_changed(RECORD, dataclasses.replace(RECORD, rss=191 * MIB))
    assert not vm_changed(RECORD, RECORD)
    assert vm_changed(None, RECORD)


def test_the_dead_band_is_two_percent_and_at_least_one_mebibyte() -> None:
    assert not leaves_dead_band(10 * MIB, 11 * MIB)
    assert leaves_dead_band(10 * MIB, 11 * MIB + 1)
    assert not leaves_dead_band(50 * GIB, 51 * GIB)
    assert leaves_dead_band(50 * GIB, 51 * GIB + 1)
    assert not leaves_dead_band(None, None)
    assert leaves_dead_band(None, 0)
    assert leaves_dead_band(0, None)


def test_only_a_changed_fact_publishes_the_host_before_its_heartbeat() -> None:
    assert host_changed(None, HOST)
    assert host_changed(HOST, dataclasses.replace(HOST, level="hard"))
    assert host_changed(HOST, dataclasses.replace(HOST, alarms=("too much is held",)))
    assert host_changed(HOST, dataclasses.replace(HOST, unidentified=(("/x", "no answer yet"),)))
    assert not host_changed(HOST, dataclasses.replace(HOST, mem_available=1, psi_some_avg10=9.0, room=0))
