"""The guard around every policy: relief, holds, boots, stuck balloons, and the policies of peers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from policy_makers import a_guest, a_host

from qmpballoon.model.names import VmId
from qmpballoon.policy.cooperation import PROBE, Safeties
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import BOOT_BALLOON, Guard, GuardState
from qmpballoon.policy.ports.mom import Mom
from qmpballoon.policy.ports.proxmox import Proxmox
from qmpballoon.policy.registry import SIMULATED, guarded
from qmpballoon.policy.snapshot import Decision, Decisions, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB


@dataclass(frozen=True, slots=True)
class Constant:
    """A policy with constant decisions: targets in MiB by VM; holds for the rest."""

    targets: Mapping[str, int]
    name: str = "constant"

    def start(self) -> None:
        return None

    def step(self, state: None, snapshot: Snapshot) -> tuple[None, Decisions]:
        return None, {VmId(vm): SetTarget(target * MIB, "constant") for vm, target in self.targets.items()}


def decided(host: Snapshot, policy: Any = None, **off: bool) -> dict[str, Decision]:
    guard: Guard[Any] = Guard(policy or FairShare(), Safeties(**off))
    return {str(vm): decision for vm, decision in guard.step(guard.start(), host)[1].items()}


def at(guest: GuestSnapshot, now_s: float, **changes: Any) -> GuestSnapshot:
    """Return the guest at a later time, with fresh figures."""
    sample = guest.sample and replace(guest.sample, seen_at_s=now_s - 0.1, actual=guest.actual)
    return replace(guest, **{"sample": sample} | changes)


def followed(guests: list[GuestSnapshot], times_s: list[float], policy: Any, **host: Any) -> list[Decision]:
    """Return the decisions about one guest at these times."""
    guard: Guard[Any] = Guard(policy)
    state: GuardState[Any] = guard.start()
    found = []
    for guest, now_s in zip(guests, times_s, strict=True):
        state, decisions = guard.step(state, a_host(guest, now_s=now_s, **host))
        found.append(decisions[guest.id])
    return found


@pytest.mark.parametrize("mode", ["auto", "manual"])
def test_an_emergency_is_relieved_whatever_the_mode(mode: str) -> None:
    decision = decided(a_host(a_guest("a", size=2048, actual=512, available=5, mode=mode)))["a"]
    assert isinstance(decision, SetTarget)
    assert (decision.why, decision.urgent) == ("emergency", True)
    assert decision.target > 700 * MIB


def test_no_guest_is_shrunk_for_an_emergency_of_a_vm_in_observe_mode() -> None:
    decisions = decided(
        a_host(
            a_guest("seen", size=2048, actual=512, available=5, mode="observe"),
            a_guest("idle", available=900),
            budget=1536,
        )
    )
    assert not isinstance(decisions["idle"], SetTarget)


def test_a_manual_target_is_raised_in_an_emergency_and_never_lowered() -> None:
    idle = a_guest("idle", available=900, mode="manual")
    hungry = a_guest("hungry", size=2048, actual=512, available=5)
    decisions = decided(a_host(idle, hungry, budget=1536), Constant({"idle": 200, "hungry": 900}))
    assert decisions["idle"] == Hold("manual")
    raised = decided(a_host(replace(hungry, mode="manual")), Constant({"hungry": 300}))["hungry"]
    assert isinstance(raised, SetTarget)
    assert raised.target > 512 * MIB


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"answers": False}, "silent"),
        ({"run_state": "paused"}, "paused"),
        ({"migrating": True}, "migrating"),
    ],
)
def test_a_guest_that_must_not_be_moved_is_left_alone_in_an_emergency(
    changes: Mapping[str, Any], why: str
) -> None:
    guest = replace(a_guest("a", size=2048, actual=512, available=5), **changes)
    assert decided(a_host(guest)) == {"a": Hold(why)}


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"seen_at_s": 93.0}, "stale"),
        ({"seen_at_s": 60.0}, "awaits-figures"),
        ({"available": None}, "awaits-figures"),
        ({"fresh_since_s": 99.0}, "grace"),
        ({"fresh_since_s": None}, "grace"),
    ],
)
def test_a_guest_without_usable_figures_is_not_shrunk(changes: Mapping[str, Any], why: str) -> None:
    guest = a_guest("a", **{"available": 900} | dict(changes))
    assert decided(a_host(guest, budget=512), Constant({"a": 300})) == {"a": Hold(why)}


def test_a_guest_without_figures_grows_to_an_equal_part_of_its_range_after_half_a_minute() -> None:
    silent = a_guest("silent", actual=256, seen_at_s=60.0)
    guard: Guard[Any] = Guard(Constant({}))
    state, found = guard.start(), {}
    for now_s in (100.0, 130.0, 130.1):
        other = at(a_guest("b", actual=512), now_s)
        state, decisions = guard.step(state, a_host(silent, other, budget=1536, now_s=now_s))
        found[now_s] = decisions[silent.id]
    grown = SetTarget((128 + (1536 - 256) * 896 // 1792) * MIB, "long-stale")
    assert list(found.values()) == [Hold("awaits-figures")] * 2 + [grown]


@pytest.mark.parametrize("name", SIMULATED)
def test_before_its_first_figures_a_guest_is_neither_donor_nor_acceptor(name: str) -> None:
    guard = guarded(name)
    new = [a_guest(vm, size=1024, actual=512, available=None) for vm in ("new", "large")]
    for budget in (700, 1200, 8192):
        host = a_host(*new, budget=budget, mem_available=100 * MIB)
        state = guard.start()
        for now_s in (100.0, 110.0, 120.0):
            state, decisions = guard.step(state, replace(host, now_s=now_s))
            assert set(decisions.values()) == {Hold("awaits-figures")}, budget


def test_a_guest_before_its_first_figures_is_charged_as_it_stands() -> None:
    new = a_guest("new", size=1024, actual=300, target=400, available=None)
    growing = a_guest("growing", size=1024, actual=200, available=15)
    decision = decided(a_host(new, growing, budget=640, overload="host"))["growing"]
    assert decision == SetTarget(240 * MIB, "emergency", urgent=True)


def test_an_emergency_of_a_guest_that_awaits_figures_is_relieved() -> None:
    guest = a_guest("a", size=2048, actual=512, available=5)
    guard: Guard[Any] = Guard(FairShare())
    state, _ = guard.step(guard.start(), a_host(guest))
    again = replace(guest, sample=None)  # of a new session
    state, _ = guard.step(state, a_host(replace(guest, answers=False), now_s=101.0))
    _, decisions = guard.step(state, a_host(again, now_s=102.0))
    decision = decisions[guest.id]
    assert isinstance(decision, SetTarget)
    assert (decision.why, decision.urgent) == ("emergency", True)


def test_a_booting_guest_is_held_at_its_ceiling_and_slightly_below_its_size() -> None:
    booting = a_guest("a", driver_up=False, available=None, target=400)
    assert decided(a_host(booting)) == {"a": SetTarget(1024 * MIB - BOOT_BALLOON, "booting")}
    capped = a_guest("a", driver_up=False, available=None, target=400, ceiling=800)
    assert decided(a_host(capped)) == {"a": SetTarget(800 * MIB, "booting")}
    untouched = a_guest("a", driver_up=False, available=None)
    assert decided(a_host(untouched)) == {"a": Hold("booting")}


def test_a_booting_guest_in_manual_mode_is_left_alone() -> None:
    booting = a_guest("a", driver_up=False, available=None, target=400, mode="manual")
    assert decided(a_host(booting)) == {"a": Hold("booting")}


@pytest.mark.parametrize("target", [300, 900])
def test_a_late_tick_makes_all_samples_stale(target: int) -> None:
    guest = a_guest("a", actual=600, available=500)
    host = replace(a_host(guest), elapsed_s=11.0)
    assert decided(host, Constant({"a": target})) == {"a": Hold("awaits-figures")}
    assert isinstance(decided(host, Constant({"a": target}), late_ticks=False)["a"], SetTarget)


def test_no_policy_shrinks_a_guest_below_held_memory() -> None:
    guest = a_guest("a", available=100, floor=64)
    decision = decided(a_host(guest), Constant({"a": 64}))["a"]
    assert isinstance(decision, SetTarget)
    assert decision.target >= 924 * MIB + 61 * MIB


@pytest.mark.parametrize("peer", [Mom(), Proxmox()])
def test_the_peers_within_the_guard_cannot_shrink_below_held_memory(peer: Any) -> None:
    guard: Guard[Any] = Guard(peer)
    state = guard.start()
    guests = [a_guest(name, available=150, floor=64) for name in ("a", "b", "c")]
    targets = []
    for now_s in range(0, 300, 2):
        seen = tuple(at(guest, float(now_s), fresh_since_s=-10.0) for guest in guests)
        host = replace(a_host(*seen, budget=1500, now_s=float(now_s)), mem_total=2048 * MIB)
        state, decisions = guard.step(state, replace(host, mem_available=100 * MIB))
        targets += [decision.target for decision in decisions.values() if isinstance(decision, SetTarget)]
    assert targets
    assert min(targets) >= (1024 - 150) * MIB


def test_a_guest_with_nothing_left_to_give_gets_its_target_set_back_and_does_not_count_as_stuck() -> None:
    guest = at(a_guest("a", available=60, target=800), 0.0, fresh_since_s=-10.0)
    guard: Guard[Any] = Guard(Constant({"a": 800}))
    state, _ = guard.step(guard.start(), a_host(guest, now_s=0.0))
    state, decisions = guard.step(state, a_host(at(guest, 6.0), now_s=6.0))
    assert decisions == {"a": SetTarget(1024 * MIB, "nothing-left")}
    assert state.cooperation[guest.id].stuck_count == 0
    assert state.judgements[guest.id].health is None


def test_a_guest_that_reports_available_memory_and_gives_none_is_contradicted_for_a_minute() -> None:
    guest = at(a_guest("a", available=700, target=500), 0.0, fresh_since_s=-10.0)
    set_back = replace(guest, target=guest.actual)
    decisions = followed(
        [guest, at(guest, 6.0), at(set_back, 30.0), at(set_back, 65.0), at(set_back, 72.0)],
        [0.0, 6.0, 30.0, 65.0, 72.0],
        Constant({"a": 500}),
    )
    assert decisions[1] == SetTarget(1024 * MIB, "contradicted")
    assert decisions[2:4] == [Hold("contradicted"), Hold("contradicted")]
    assert decisions[4] == SetTarget(1024 * MIB - PROBE, "probe")


def test_a_stuck_guest_backs_off_is_probed_and_follows_the_policy_again_when_it_moves() -> None:
    guest = at(a_guest("a", available=200, target=900), 0.0, fresh_since_s=-10.0)
    set_back = replace(guest, target=guest.actual)
    probed = replace(guest, target=guest.actual - PROBE)
    moved = at(replace(probed, actual=guest.actual - PROBE), 13.0)
    decisions = followed(
        [guest, at(guest, 6.0), at(set_back, 8.0), at(set_back, 11.5), at(probed, 12.0), moved],
        [0.0, 6.0, 8.0, 11.5, 12.0, 13.0],
        Constant({"a": 900}),
    )
    assert decisions[1:4] == [
        SetTarget(1024 * MIB, "stuck"),
        Hold("backs-off"),
        SetTarget(1024 * MIB - PROBE, "probe"),
    ]
    assert decisions[5] == SetTarget(900 * MIB, "constant")


def test_a_stuck_guest_may_grow() -> None:
    guest = at(a_guest("a", size=2048, actual=1024, available=200, target=900), 0.0, fresh_since_s=-10.0)
    decisions = followed([guest, at(guest, 6.0)], [0.0, 6.0], Constant({"a": 1500}))
    assert decisions[0] == SetTarget(1500 * MIB, "constant")
    stuck = replace(guest, target=guest.actual)
    later = followed([guest, at(guest, 6.0), at(stuck, 8.0)], [0.0, 6.0, 8.0], Constant({"a": 1500}))
    assert later[2] == SetTarget(1500 * MIB, "constant")


def test_the_back_off_doubles_while_a_guest_stays_stuck_until_it_is_uncooperative() -> None:
    guest = at(a_guest("a", available=200, target=900), 0.0, fresh_since_s=-10.0)
    guard: Guard[Any] = Guard(Constant({"a": 900}))
    state, health, counts = guard.start(), set(), set()
    target = guest.target
    for tick in range(200):
        now_s = tick * 0.5
        seen = at(replace(guest, target=target), now_s)
        state, decisions = guard.step(state, a_host(seen, now_s=now_s))
        decision = decisions[guest.id]
        target = decision.target if isinstance(decision, SetTarget) else target
        health.add(state.judgements[guest.id].health)
        counts.add(state.cooperation[guest.id].stuck_count)
    assert health == {None, "stuck", "uncooperative"}
    assert max(counts) in (3, 4, 5)


def test_ordinary_grows_do_not_get_memory_that_is_held_back() -> None:
    guest = a_guest("a", size=2048, actual=512, available=100)
    free = decided(a_host(guest, budget=1536), Constant({"a": 1000}))
    held = decided(a_host(guest, budget=1536, held_back=1000 * MIB), Constant({"a": 1000}))
    assert free == {"a": SetTarget(1000 * MIB, "constant")}
    assert held == {"a": Hold("awaits-memory")}


def test_a_pending_shrink_is_cancelled_when_the_guest_reaches_an_emergency() -> None:
    shrinking = a_guest("a", actual=700, available=10, target=400)
    decision = decided(a_host(shrinking, budget=600, overload="host"))["a"]
    assert isinstance(decision, SetTarget)
    assert decision.target >= 700 * MIB


def test_the_back_off_ends_with_the_life() -> None:
    guest = at(a_guest("a", available=200, target=900), 0.0, fresh_since_s=-10.0)
    again = at(replace(guest, life="2-2", target=None), 8.0, booted_at_s=7.0, fresh_since_s=-10.0)
    decisions = followed([guest, at(guest, 6.0), again], [0.0, 6.0, 8.0], Constant({"a": 900}))
    assert decisions[1] == SetTarget(1024 * MIB, "stuck")
    assert isinstance(decisions[2], SetTarget)
    assert decisions[2].why == "constant"


def test_a_contradicted_guest_that_grows_is_not_set_back_again() -> None:
    guest = at(a_guest("a", size=2048, actual=1024, available=600, target=500), 0.0, fresh_since_s=-10.0)
    growing = at(replace(guest, target=2048 * MIB), 7.0)
    decisions = followed(
        [guest, at(guest, 6.0), growing, at(growing, 7.5)], [0.0, 6.0, 7.0, 7.5], Constant({"a": 500})
    )
    assert decisions[1:] == [
        SetTarget(2048 * MIB, "contradicted"),
        Hold("contradicted"),
        Hold("contradicted"),
    ]


def test_floors_beyond_the_budget_are_lowered_until_they_fit_beside_held_memory() -> None:
    idle = [a_guest(f"idle{number}", actual=600, available=450, floor=700) for number in range(3)]
    hungry = a_guest("hungry", actual=600, available=10, floor=700)
    host = a_host(*idle, hungry, budget=2400, overload="host")
    decisions = decided(host)
    grows = decisions.pop("hungry")
    assert isinstance(grows, SetTarget)
    targets = [decision.target for decision in decisions.values() if isinstance(decision, SetTarget)]
    assert targets
    assert all(500 * MIB < target < 600 * MIB for target in targets)


def test_floors_that_fit_are_kept_even_if_another_guest_lacks_memory() -> None:
    idle = [a_guest(f"idle{number}", actual=600, available=450, floor=600) for number in range(3)]
    hungry = a_guest("hungry", actual=600, available=10, floor=300)
    decisions = decided(a_host(*idle, hungry, budget=2400, overload="host"))
    assert not any(isinstance(decisions[guest.id], SetTarget) for guest in idle)


def test_a_grant_that_a_stuck_guest_does_not_take_is_withdrawn_for_others() -> None:
    stuck = a_guest("stuck", size=2048, actual=512, target=1500, available=40)
    hungry = a_guest("hungry", actual=512, available=40)
    guard: Guard[Any] = Guard(FairShare())
    state: GuardState[Any] = guard.start()
    grown = []
    for now_s in range(100, 108):
        guests = (at(guest, now_s) for guest in (stuck, hungry))
        state, decisions = guard.step(state, a_host(*guests, budget=2012, now_s=now_s))
        grown.append(isinstance(decisions[hungry.id], SetTarget))
        if isinstance(withdrawn := decisions[stuck.id], SetTarget):
            assert withdrawn == SetTarget(512 * MIB, "stuck")
            stuck = replace(stuck, target=withdrawn.target)
    assert grown == [False] * 6 + [True] * 2


def test_a_stuck_guest_in_an_emergency_is_granted_a_probe_until_its_balloon_moves() -> None:
    stuck = a_guest("stuck", size=2048, actual=512, target=700, available=40)
    guests = [at(stuck, now_s) for now_s in (100.0, 105.0)]
    guests.append(
        at(replace(stuck, target=512 * MIB, sample=a_guest(actual=512, available=10).sample), 106.0)
    )
    guests.append(at(guests[-1], 106.5, target=524 * MIB))
    guests.append(at(guests[-1], 107.0, actual=520 * MIB))
    decisions = followed(guests, [100.0, 105.0, 106.0, 106.5, 107.0], FairShare(), budget=8192)
    assert decisions[1:3] == [
        SetTarget(512 * MIB, "stuck"),
        SetTarget(512 * MIB + PROBE, "emergency", urgent=True),
    ]
    assert not isinstance(decisions[3], SetTarget)
    assert isinstance(decisions[4], SetTarget)
    assert decisions[4].target > 700 * MIB


def test_no_policy_shrinks_a_guest_into_the_emergency_that_it_was_relieved_of() -> None:
    relieved = a_guest("a", actual=112, available=44, floor=32)
    decision = decided(a_host(relieved, budget=96, overload="host"), Constant({"a": 64}))["a"]
    assert isinstance(decision, SetTarget)
    assert decision.target - 68 * MIB > relieved.critical
