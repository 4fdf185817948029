"""Who is paid first, out of what, and what an overloaded host lends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.model.names import VmId
from qmpballoon.policy.allocation import LOAN, within_budget
from qmpballoon.policy.snapshot import Decision, Estimate, GuardView, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB


def paid(host: Snapshot, **wishes: Decision) -> tuple[dict[str, Decision], int]:
    decisions, lent = within_budget({VmId(vm): wish for vm, wish in wishes.items()}, host)
    return {str(vm): decision for vm, decision in decisions.items()}, lent


def to(target: int, *, urgent: bool = False) -> SetTarget:
    return SetTarget(target * MIB, "wish", urgent=urgent)


def full_host(**more: Any) -> Snapshot:
    """Two guests with 512 of 1024 MiB each; the budget is given out."""
    return a_host(a_guest("a", actual=512), a_guest("b", actual=512), budget=1024, **more)


def test_an_ordinary_grow_waits_until_the_shrinks_have_landed() -> None:
    decisions, lent = paid(full_host(), a=to(700), b=to(300))
    assert decisions == {"a": Hold("awaits-memory"), "b": to(300)}
    assert lent == 0
    landed = a_host(a_guest("a", actual=512), a_guest("b", actual=300, target=300), budget=1024)
    decisions, _ = paid(landed, a=to(680), b=Hold("at-ease"))
    assert decisions["a"] == to(680)


def test_an_emergency_draws_on_what_others_are_about_to_deliver() -> None:
    decisions, lent = paid(full_host(), a=to(700, urgent=True), b=to(300))
    assert decisions["a"] == to(700, urgent=True)
    assert lent == 0


def test_an_overloaded_host_lends_a_part_of_what_it_has_beyond_the_budget() -> None:
    host = replace(full_host(), mem_total=1424 * MIB, mem_available=400 * MIB)
    decisions, lent = paid(host, a=to(1000, urgent=True))
    most = int(LOAN * 400 * MIB)
    assert decisions["a"] == SetTarget(512 * MIB + most, "wish", urgent=True)
    assert lent == most


def test_a_strict_host_lends_nothing() -> None:
    host = replace(full_host(overload="host"), mem_total=1424 * MIB, mem_available=400 * MIB)
    decisions, lent = paid(host, a=to(1000, urgent=True))
    assert (decisions["a"], lent) == (Hold("awaits-memory"), 0)


def test_what_is_lent_already_counts() -> None:
    over = a_host(a_guest("a", actual=572), a_guest("b", actual=512), budget=1024)
    host = replace(over, mem_total=1424 * MIB, mem_available=300 * MIB)
    assert paid(host, b=to(700, urgent=True))[0] == {"b": to(552, urgent=True)}
    over = a_host(a_guest("a", actual=612), a_guest("b", actual=512), budget=1024)
    host = replace(over, mem_total=1424 * MIB, mem_available=300 * MIB)
    assert paid(host, b=to(700, urgent=True))[0] == {"b": Hold("awaits-memory")}


@pytest.mark.parametrize(("overload", "most"), [("guests", 220), ("host", 140)])
def test_emergencies_get_half_of_the_reserve_and_no_more_than_the_host_has(overload: str, most: int) -> None:
    host = a_host(a_guest("a", actual=512), budget=4096, overload=overload)
    host = replace(host, mem_total=8192 * MIB, mem_available=300 * MIB, reserve=160 * MIB)
    assert paid(host, a=to(1000))[0] == {"a": to(512 + 140)}
    assert paid(host, a=to(1000, urgent=True))[0] == {"a": to(512 + most, urgent=True)}


@pytest.mark.parametrize("overload", ["guests", "host"])
def test_an_emergency_gets_what_others_give_however_short_the_host_is(overload: str) -> None:
    host = a_host(a_guest("a", actual=512), a_guest("b", actual=512), budget=4096, overload=overload)
    host = replace(host, mem_available=0, reserve=512 * MIB)
    assert paid(host, a=to(700, urgent=True), b=to(412)) == ({"a": to(612, urgent=True), "b": to(412)}, 0)
    assert paid(host, a=to(700), b=to(412))[0]["a"] == Hold("awaits-memory")


def test_an_emergency_gets_half_of_what_a_host_has_that_is_below_its_reserve() -> None:
    host = a_host(a_guest("a", actual=512), budget=4096)
    host = replace(host, mem_available=200 * MIB, reserve=512 * MIB)
    assert paid(host, a=to(1000, urgent=True)) == ({"a": to(612, urgent=True)}, 0)
    strict = replace(host, overload="host")
    assert paid(strict, a=to(1000, urgent=True))[0] == {"a": Hold("awaits-memory")}


def test_an_emergency_is_paid_before_an_ordinary_grow() -> None:
    host = a_host(a_guest("a", actual=512), a_guest("b", actual=512), budget=1200)
    decisions, _ = paid(host, a=to(680), b=to(680, urgent=True))
    assert decisions == {"a": Hold("awaits-memory"), "b": to(680, urgent=True)}


def test_emergencies_share_what_is_there_by_shares() -> None:
    host = a_host(
        a_guest("a", actual=512, shares=3000),
        a_guest("b", actual=512, shares=1000),
        budget=1224,
        overload="host",
    )
    decisions, _ = paid(host, a=to(1000, urgent=True), b=to(1000, urgent=True))
    assert decisions == {"a": to(662, urgent=True), "b": to(562, urgent=True)}


def test_what_a_booting_guest_does_not_use_yet_is_there_for_emergencies_only() -> None:
    booting = a_guest("b", driver_up=False, available=None, rss=100 * MIB)
    host = a_host(a_guest("a", actual=512), booting, budget=1536, overload="host")
    assert paid(host, a=to(700, urgent=True))[0] == {"a": to(700, urgent=True)}
    assert paid(host, a=to(700))[0] == {"a": Hold("awaits-memory")}


def test_a_shrink_on_its_way_is_taken_back_when_there_is_nothing_to_grow_with() -> None:
    shrinking = a_guest("a", actual=700, target=400)
    host = a_host(shrinking, budget=700, overload="host")
    assert paid(host, a=to(900, urgent=True))[0] == {"a": to(700, urgent=True)}


def test_a_tiny_grow_is_not_sent() -> None:
    host = a_host(a_guest("a", actual=512), budget=514, overload="host")
    assert paid(host, a=to(700, urgent=True))[0] == {"a": Hold("awaits-memory")}


def test_what_is_promised_is_not_promised_twice() -> None:
    growing = a_guest("a", actual=512, target=800)
    host = a_host(growing, a_guest("b", actual=512), budget=1400)
    assert host.free == (1400 - 800 - 512) * MIB
    decisions, _ = paid(host, b=to(1000))
    assert decisions["b"] == to(600)


def test_a_loan_is_no_larger_than_what_ends_the_emergency() -> None:
    known = Estimate(
        held=500 * MIB,
        counted=500 * MIB,
        available=12 * MIB,
        trend=10.0 * MIB,
        uses=700 * MIB,
        want=900 * MIB,
        emergency=True,
        acute=True,
        thin=True,
        doubted=False,
        caches=0,
        caching=False,
    )
    host = a_host(
        replace(a_guest("a", actual=512), guard=GuardView(estimate=known)),
        a_guest("b", actual=512),
        budget=1024,
    )
    decisions, lent = paid(host, a=to(1000, urgent=True))
    decision = decisions["a"]
    assert isinstance(decision, SetTarget)
    # Half as much again as its mark of 6 % of 512 MiB, and five seconds of its growth.
    assert decision.target == pytest.approx((500 + 1.5 * 30.7 + 50) * MIB, rel=0.001)
    assert lent == pytest.approx(decision.target - 512 * MIB, abs=4096)
