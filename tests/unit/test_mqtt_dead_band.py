"""Which changes are published."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import STATISTICS, GuestStats, HostStatus, Life, Limits, Sample, VmStatus
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


def big_host(**changed: Any) -> HostStatus:
    figures = dict.fromkeys(("available", "mem_available", "reclaimable", "room"), 10 * GIB)
    values: dict[str, Any] = {"budget": 64 * GIB, "mem_total": 64 * GIB, "used": 50 * GIB, **figures}
    return dataclasses.replace(HOST, **values | changed)


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
    known = figures(**dict.fromkeys(STATISTICS[4:], 0))
    assert not vm_changed(known, figures(**dict.fromkeys(STATISTICS[4:], 500)))
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
    held = dataclasses.replace(HOST, holds=({"hold": "hold-1", "size": 5, "left_s": 9.0},))
    assert host_changed(HOST, held)
    assert not host_changed(held, dataclasses.replace(held, holds=({**held.holds[0], "left_s": 3.0},)))


def changes(before: HostStatus, **changed: Any) -> bool:
    return host_changed(before, dataclasses.replace(before, **changed))


@pytest.mark.parametrize("name", ["used", "available", "room", "reclaimable", "mem_available"])
def test_a_size_of_the_host_is_published_when_it_leaves_its_dead_band(name: str) -> None:
    host = big_host(**{name: 10 * GIB})
    assert not changes(host, **{name: 10 * GIB + 300 * MIB})
    assert changes(host, **{name: 10 * GIB + 400 * MIB})
    assert changes(host, **{name: 10 * GIB - 400 * MIB})


@pytest.mark.parametrize("name", ["available", "room", "reclaimable"])
def test_a_small_size_of_a_large_host_does_not_wobble(name: str) -> None:
    host = big_host(**{name: 0})
    assert not changes(host, **{name: 300 * MIB})
    assert changes(host, **{name: 400 * MIB})


def test_a_small_host_is_told_of_precisely() -> None:
    host = big_host(budget=200 * MIB, mem_total=512 * MIB, room=0, used=200 * MIB)
    assert changes(host, room=2 * MIB)
    assert changes(host, used=195 * MIB)


def test_stalls_and_lateness_of_the_host_are_coarse() -> None:
    calm = big_host(psi_some_avg10=0.0, psi_full_avg10=20.0)
    assert not changes(calm, psi_some_avg10=0.9, psi_full_avg10=17.0)
    assert changes(calm, psi_some_avg10=1.1)
    assert changes(calm, psi_full_avg10=15.0)
    assert changes(calm, psi_full_avg10=None)
    assert changes(calm, sampling_late_s=0.3)


def test_what_a_guest_holds_is_published_when_it_becomes_known() -> None:
    moving = dataclasses.replace(RECORD, sample=Sample(FIGURES, 1.0, actual=None))
    known = dataclasses.replace(RECORD, sample=Sample(FIGURES, 3.0, actual=128 * MIB))
    assert vm_changed(moving, known)
    assert vm_changed(known, moving)
    assert vm_changed(known, dataclasses.replace(RECORD, sample=Sample(FIGURES, 3.0, actual=130 * MIB)))
    assert not vm_changed(known, dataclasses.replace(RECORD, sample=Sample(FIGURES, 3.0, actual=128 * MIB)))


def test_a_counter_that_becomes_known_is_published() -> None:
    assert vm_changed(RECORD, figures(oom_kills=0))
    assert vm_changed(RECORD, figures(minor_faults=None))
