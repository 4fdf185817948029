"""How a host stands, worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Limits, Sample, VmStatus
from qmpballoon.policy.host_level import level_of, needs, reclaimable
from qmpballoon.units import GIB, MIB


def a_record(*, available: int = 600, **more: object) -> VmStatus:
    record = VmStatus(
        VmId("a"),
        "a",
        "/run/a.qmp",
        "ok",
        size=GIB,
        actual=GIB,
        limits=Limits(256 * MIB, GIB, 1000),
        sample=Sample(GuestStats(available=available * MIB), 1.0, actual=GIB),
        driver_up=True,
    )
    return replace(record, **more)  # type: ignore[arg-type]


def test_a_guest_is_charged_with_the_larger_of_actual_and_target() -> None:
    assert a_guest(actual=512, target=300).charge == 512 * MIB
    assert a_guest(actual=512, target=700).charge == 700 * MIB


def test_a_guest_without_a_driver_is_charged_in_full() -> None:
    assert a_guest(actual=512, driver_up=False).charge == GIB


def test_a_charge_that_the_host_corroborates_is_the_least() -> None:
    assert a_guest(actual=512, charge_at_least=800 * MIB).charge == 800 * MIB


def test_an_idle_guest_could_give_down_to_its_floor_or_what_it_holds_with_a_margin() -> None:
    assert reclaimable(a_record(available=600)) == (600 - 24) * MIB
    assert reclaimable(a_record(available=1000)) == (1024 - 256) * MIB


@pytest.mark.parametrize(
    "record",
    [
        a_record(health="stale"),
        a_record(sample=None),
        a_record(sample=Sample(GuestStats(available=600 * MIB), 1.0)),  # actual of that moment is not known
        a_record(actual=None),
        a_record(available=10),
        a_record(limits=Limits(None, None, 1000)),
    ],
)
def test_nothing_is_promised_of_a_guest_that_cannot_or_may_not_give(record: VmStatus) -> None:
    assert reclaimable(record) == 0


def test_what_guests_need_is_what_they_hold_or_all_of_it_where_that_is_unknown() -> None:
    host = a_host(a_guest("a", available=524), a_guest("b", size=512, available=None))
    assert needs(host) == 500 * MIB * 105 // 100 + 8 * MIB + 512 * MIB


def at(before: str = "ok", **changes: Any) -> str:
    calm: dict[str, Any] = {
        "mem_available": 4 * GIB,
        "reserve": GIB,
        "psi_full_avg10": 0.0,
        "needs": GIB,
        "budget": 4 * GIB,
    }
    return level_of(before, **(calm | changes))


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({}, "ok"),
        ({"mem_available": GIB * 1.4}, "soft"),
        ({"mem_available": GIB * 0.9}, "hard"),
        ({"mem_available": GIB * 0.4}, "low"),
        ({"psi_full_avg10": 2.0}, "soft"),
        ({"psi_full_avg10": 30.0}, "low"),
        ({"needs": 3.7 * GIB}, "soft"),
        ({"needs": 4.1 * GIB}, "hard"),
    ],
)
def test_a_level_worsens_at_once(changes: dict[str, Any], level: str) -> None:
    assert at(**changes) == level


def test_a_level_eases_only_a_fifth_beyond_its_threshold() -> None:
    assert at("soft", mem_available=GIB * 1.6) == "soft"
    assert at("soft", mem_available=GIB * 1.9) == "ok"
    assert at("low", mem_available=GIB * 0.7) == "hard"


def test_unknown_figures_raise_no_level() -> None:
    assert level_of("ok", mem_available=None, reserve=GIB, psi_full_avg10=None, needs=0, budget=GIB) == "ok"
