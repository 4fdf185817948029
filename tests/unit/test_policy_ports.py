"""The peers' algorithms, compared with hand-computed values and with those of their own projects."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.policy.guard import Guard
from qmpballoon.policy.ports import mom, proportional, proxmox, qubes
from qmpballoon.policy.ports.fixed import Fixed
from qmpballoon.policy.registry import BARE, SIMULATED, guarded, simulated
from qmpballoon.policy.snapshot import Decision, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import KIB, MIB

MB = 1000 * 1000
A, B, C = VmId("a"), VmId("b"), VmId("c")


def a_guest(
    vm: VmId,
    actual: int,
    *,
    available: int | None = None,
    size: int = 1024 * MIB,
    floor: int = 256 * MIB,
    target: int | None = None,
    shares: int = 1000,
    at_s: float = 0.0,
    driver_up: bool = True,
) -> GuestSnapshot:
    figures = GuestStats(free=available, available=available, caches=0)
    return GuestSnapshot(
        id=vm,
        life="1",
        size=size,
        actual=actual,
        target=target,
        floor=floor,
        ceiling=size,
        shares=shares,
        driver_up=driver_up,
        sample=None if available is None else Sample(figures, at_s, actual),
    )


def a_host(*guests: GuestSnapshot, budget: int, now_s: float = 0.0) -> Snapshot:
    return Snapshot(now_s=now_s, guests=guests, budget=budget, mem_total=2 * budget)


def targets(decisions: Mapping[VmId, Decision]) -> dict[VmId, int]:
    return {vm: decision.target for vm, decision in decisions.items() if isinstance(decision, SetTarget)}


# Proxmox VE: sizes, goals and results are those of pve-manager's own test of compute_alg1 (PVE/test).


def a_member(balloon: int, minimum: int, shares: int = 1000, free: int = 0) -> proxmox.Member:
    return proxmox.Member(balloon * MB, minimum * MB, 2000 * MB, free * MB, shares)


EQUAL = {A: a_member(1000, 1000, 2000), B: a_member(1000, 1000)}
FULL = {A: a_member(2000, 2000, 2000), B: a_member(1000, 1000)}
RELAXED = {A: a_member(2000, 2000, 2000), B: a_member(1007, 1000), C: a_member(1000, 1000, free=512)}


@pytest.mark.parametrize(
    ("members", "goal", "expected"),
    [
        (EQUAL, 0, {}),
        (EQUAL, 90, {A: 1060, B: 1030}),
        (EQUAL, 150, {A: 1100, B: 1050}),
        (EQUAL, 270, {A: 1100, B: 1090}),
        (FULL, 0, {}),
        (FULL, 18, {B: 1018}),
        (FULL, 500, {B: 1100}),
        (RELAXED, 0, {}),
        (RELAXED, 11, {B: 1018}),
        (RELAXED, 80, {B: 1087}),
        (RELAXED, 200, {B: 1107}),
    ],
)
def test_proxmox_changes_what_its_own_test_expects(
    members: Mapping[VmId, proxmox.Member], goal: int, expected: Mapping[VmId, int]
) -> None:
    found = proxmox.targets(members, goal * MB, 100 * MB)
    assert found == {vm: size * MB for vm, size in expected.items()}


@pytest.mark.parametrize(
    ("members", "goal", "expected"),
    [
        (EQUAL, 180, {A: 1120, B: 1060}),
        (EQUAL, 270, {A: 1180, B: 1090}),
        (EQUAL, 600, {A: 1300, B: 1300}),
        (EQUAL, 900, {A: 1600, B: 1300}),
        (RELAXED, 593, {A: 2000, B: 1300, C: 1300}),
    ],
)
def test_proxmox_settles_where_its_own_test_expects(
    members: Mapping[VmId, proxmox.Member], goal: int, expected: Mapping[VmId, int]
) -> None:
    assert proxmox_until_settled(members, goal) == expected


def test_proxmox_shrinks_guests_with_enough_first_and_then_all() -> None:
    grown = {
        A: a_member(2000, 2000, 2000),
        B: a_member(1300, 1000, free=293),
        C: a_member(1300, 1000, free=812),
    }
    assert proxmox_until_settled(grown, -200) == {A: 2000, B: 1200, C: 1200}
    assert proxmox_until_settled(grown, -593) == {A: 2000, B: 1007, C: 1000}


def proxmox_until_settled(members: Mapping[VmId, proxmox.Member], goal: int) -> dict[VmId, int]:
    """Apply cycles until no VM changes, as the test of pve-manager does."""
    left, now = goal * MB, dict(members)
    for _ in range(50):
        found = proxmox.targets(now, left, 100 * MB)
        changes = {vm: size - now[vm].balloon for vm, size in found.items()}
        if not any(changes.values()):
            break
        for vm, change in changes.items():
            member = now[vm]
            free = max(0, (member.free or 0) + change)
            now[vm] = proxmox.Member(
                member.balloon + change, member.minimum, member.maximum, free, member.shares
            )
        left -= sum(changes.values())
    return {vm: member.balloon // MB for vm, member in now.items()}


def test_proxmox_moves_no_vm_at_its_goal_even_if_one_starves() -> None:
    starving = a_guest(A, 512 * MIB, available=8 * MIB)
    idle = a_guest(B, 512 * MIB, available=400 * MIB)
    policy = proxmox.Proxmox()
    _, decisions = policy.step(policy.start(), a_host(starving, idle, budget=1032 * MIB))
    assert decisions == {}


def test_proxmox_decides_every_ten_seconds() -> None:
    policy = proxmox.Proxmox()
    guest = a_guest(A, 512 * MIB, available=8 * MIB)
    state, decisions = policy.step(policy.start(), a_host(guest, budget=800 * MIB))
    assert targets(decisions) == {A: 612 * MIB}
    state, decisions = policy.step(state, a_host(guest, budget=800 * MIB, now_s=9.9))
    assert decisions == {}
    _, decisions = policy.step(state, a_host(guest, budget=800 * MIB, now_s=10.0))
    assert targets(decisions) == {A: 612 * MIB}


# oVirt MOM: hand-computed from doc/balloon.rules.


@pytest.mark.parametrize(
    ("balloon", "floor", "used", "host_free", "expected"),
    [
        (1000, 200, 300, 0.19, 950),  # at most 5 % at once
        (1000, 200, 800, 0.10, 950),  # 800 + 0.2 x 0.5 x 1000 = 900; at most 5 % at once
        (1000, 200, 900, 0.10, None),  # 900 + 100 = 1000: no change
        (1000, 200, 880, 0.10, 980),  # 880 + 100
        (1000, 960, 300, 0.10, 960),  # the floor
        (1000, 200, 960, 0.04, 950),  # critical: 960 - 10 = 950, the guest is made to swap
        (1000, 200, 898, 0.10, None),  # 998: less than 0.25 %
    ],
)
def test_mom_shrinks_by_host_pressure(
    balloon: int, floor: int, used: int, host_free: float, expected: int | None
) -> None:
    assert mom.shrunk(balloon, floor, used, host_free) == expected


@pytest.mark.parametrize(
    ("balloon", "floor", "ceiling", "used", "expected"),
    [
        (1000, 200, 2000, 300, 1050),  # 5 % at once
        (1000, 200, 2000, 990, 1190),  # what it uses and a fifth of its size
        (1000, 200, 1100, 990, 1100),  # the ceiling
        (1000, 1150, 2000, 300, 1150),  # the floor
        (2000, 200, 2000, 1900, None),  # its balloon is empty
    ],
)
def test_mom_grows_without_host_pressure(
    balloon: int, floor: int, ceiling: int, used: int, expected: int | None
) -> None:
    assert mom.grown(balloon, floor, ceiling, used) == expected


def test_mom_does_not_grow_a_starving_guest_while_the_host_is_short() -> None:
    policy = mom.Mom()
    starving = a_guest(A, 512 * MIB, available=8 * MIB)
    idle = a_guest(B, 512 * MIB, available=400 * MIB)
    _, decisions = policy.step(policy.start(), a_host(starving, idle, budget=1000 * MIB))
    assert targets(decisions) == {B: int(512 * MIB * 0.95)}


def test_mom_averages_ten_samples_of_five_seconds_each() -> None:
    policy = mom.Mom()
    state = policy.start()
    for at in range(12):
        guest = a_guest(A, 512 * MIB, available=(100 if at < 11 else 0) * MIB)
        state, _ = policy.step(state, a_host(guest, budget=1000 * MIB, now_s=5.0 * at))
    assert [sample.unused // MIB for sample in state.guests[A]] == [100] * 9 + [0]
    assert len(state.host_free) == 10


# Qubes: the cases and results are those of qubes-core-admin's own test of the computation.


def a_domain(used: int | None, maximum: int, actual: int) -> qubes.Domain:
    return qubes.Domain(None if used is None else used * MIB, 200 * MIB, maximum * MIB, actual * MIB)


def test_qubes_prefers_three_tenths_more_than_is_used() -> None:
    assert a_domain(1024, 4096, 1024).preference == int(1331.2 * MIB)
    assert a_domain(5000, 4096, 1024).preference == 4096 * MIB
    assert a_domain(100, 4096, 1024).preference == 200 * MIB


def test_qubes_shrinks_donors_as_its_own_test_expects_when_memory_is_low() -> None:
    domains = {
        VmId("below"): a_domain(1024, 4096, 768),
        VmId("1"): a_domain(1024, 4096, 1536),
        VmId("at-maximum"): a_domain(4096, 4096, 4096),
        VmId("silent"): a_domain(None, 4096, 4096),
        VmId("at-use"): a_domain(1536, 4096, 1536),
        VmId("5"): a_domain(512, 1024, 768),
    }
    assert qubes.balance(domains, 50 * MIB) == {VmId("1"): 1395864371, VmId("5"): 697932185}


def test_qubes_shares_a_surplus_in_proportion_to_preferences() -> None:
    domains = {A: a_domain(1000, 8192, 1300), B: a_domain(2000, 8192, 2600)}
    found = qubes.balance(domains, 3900 * MIB)
    assert found == {A: int(0.999 * 2600 * MIB), B: int(0.999 * 5200 * MIB)}


def test_qubes_divides_what_exceeds_a_maximum_among_the_others() -> None:
    domains = {A: a_domain(1000, 1400, 1300), B: a_domain(1000, 8192, 1300)}
    found = qubes.balance(domains, 1000 * MIB)
    first = int(0.999 * 1800 * MIB)
    assert found == {A: 1400 * MIB, B: first + int(0.999 * (first - 1400 * MIB))}


def test_qubes_acceptors_wait_for_donors_and_then_get_free_memory() -> None:
    policy = qubes.Qubes()
    donor = a_guest(A, 1024 * MIB, available=724 * MIB)
    acceptor = a_guest(B, 512 * MIB, available=12 * MIB)
    host = a_host(donor, acceptor, budget=1586 * MIB)
    state, decisions = policy.step(policy.start(), host)
    assert list(targets(decisions)) == [A]
    assert [vm for vm, _ in state.waiting] == [B]
    stuck = a_guest(A, 1024 * MIB, available=724 * MIB, target=decisions[A].target)  # type: ignore[union-attr]
    state, decisions = policy.step(state, a_host(stuck, acceptor, budget=1586 * MIB, now_s=0.4))
    assert decisions == {}
    state, decisions = policy.step(state, a_host(stuck, acceptor, budget=1586 * MIB, now_s=0.5))
    assert targets(decisions) == {B: 512 * MIB}  # all free memory but 50 MiB
    assert state.no_progress == {A}


def test_qubes_does_nothing_for_a_small_change() -> None:
    policy = qubes.Qubes()
    guests = (a_guest(A, 800 * MIB, available=200 * MIB), a_guest(B, 800 * MIB, available=190 * MIB))
    _, decisions = policy.step(policy.start(), a_host(*guests, budget=1650 * MIB))
    assert decisions == {}


# XenServer's squeezed: its documented scenario e, and hand-computed values.


def test_squeezed_divides_a_surplus_by_ranges_as_in_its_own_scenario() -> None:
    domains = (
        proportional.Domain(5000 * KIB, 7000 * KIB, 7000 * KIB, 7000 * KIB),
        proportional.Domain(5000 * KIB, 11000 * KIB, 6000 * KIB, 6000 * KIB),
    )
    found = proportional.proportional_targets(domains, -1000 * KIB + 4 * proportional.INACCURACY)
    assert found == [5500 * KIB, 6500 * KIB]


def test_squeezed_shrinks_before_it_grows() -> None:
    domains = {
        A: proportional.Domain(256 * MIB, 1024 * MIB, 1024 * MIB, 1024 * MIB),
        B: proportional.Domain(256 * MIB, 1024 * MIB, 256 * MIB, 256 * MIB),
    }
    assert proportional.one_phase(domains, [640 * MIB, 640 * MIB]) == {A: 640 * MIB}
    arrived = domains | {A: proportional.Domain(256 * MIB, 1024 * MIB, 640 * MIB, 640 * MIB)}
    assert proportional.one_phase(arrived, [640 * MIB, 640 * MIB]) == {A: 640 * MIB, B: 640 * MIB}


def test_squeezed_leaves_a_vm_out_after_five_seconds_without_progress() -> None:
    stuck = proportional.Domain(0, 1024 * MIB, 800 * MIB, 600 * MIB)
    progress = proportional.followed(None, stuck, 0.0)
    assert not proportional.followed(progress, stuck, 5.0).is_stuck
    assert proportional.followed(progress, stuck, 5.1).is_stuck
    moved = proportional.Domain(0, 1024 * MIB, 799 * MIB, 600 * MIB)
    assert not proportional.followed(proportional.followed(progress, stuck, 5.1), moved, 6.0).is_stuck
    assert proportional.pinned(stuck) == 600 * MIB


def test_squeezed_ignores_the_needs_of_guests() -> None:
    policy = proportional.Proportional()
    starving = a_guest(A, 512 * MIB, available=4 * MIB)
    idle = a_guest(B, 512 * MIB, available=450 * MIB)
    _, decisions = policy.step(policy.start(), a_host(starving, idle, budget=1034 * MIB))
    assert all(abs(target - 512 * MIB) < MIB for target in targets(decisions).values())


# The static split.


def test_fixed_splits_by_shares_within_limits_and_only_once() -> None:
    guests = (a_guest(A, 600 * MIB, shares=1000), a_guest(B, 500 * MIB, shares=3000))
    policy = Fixed()
    state, decisions = policy.step(policy.start(), a_host(*guests, budget=1200 * MIB))
    assert decisions == {A: SetTarget(300 * MIB, "static-split"), B: Hold("waits-for-shrinks")}
    shrunk = (a_guest(A, 300 * MIB, target=300 * MIB), a_guest(B, 500 * MIB, shares=3000))
    state, decisions = policy.step(state, a_host(*shrunk, budget=1200 * MIB))
    assert targets(decisions) == {B: 900 * MIB}
    settled = (shrunk[0], a_guest(B, 900 * MIB, target=900 * MIB))
    state, decisions = policy.step(state, a_host(*settled, budget=800 * MIB))
    assert decisions == {}


def test_fixed_leaves_a_vm_without_a_driver_alone() -> None:
    policy = Fixed()
    _, decisions = policy.step(
        policy.start(), a_host(a_guest(A, 900 * MIB, driver_up=False), budget=500 * MIB)
    )
    assert decisions == {}


# All policies.


@pytest.mark.parametrize("name", SIMULATED)
def test_every_policy_has_its_name_and_accepts_a_host_without_vms(name: str) -> None:
    for policy in (simulated(name), guarded(name)):
        assert policy.name == name
        _, decisions = policy.step(policy.start(), a_host(budget=1024 * MIB))
        assert not decisions


@pytest.mark.parametrize("name", SIMULATED)
def test_no_policy_moves_manual_guests(name: str) -> None:
    guest = GuestSnapshot(
        id=A,
        life="1",
        size=1024 * MIB,
        actual=900 * MIB,
        target=None,
        floor=0,
        ceiling=1024 * MIB,
        mode="manual",
    )
    policy = simulated(name)
    _, decisions = policy.step(policy.start(), a_host(guest, budget=300 * MIB))
    assert targets(decisions) == {}


def test_peers_run_without_the_guard_and_can_run_within_it() -> None:
    assert not any(isinstance(simulated(name), Guard) for name in BARE)
    assert isinstance(simulated("guarded-qubes"), Guard)
    assert isinstance(simulated("fairshare"), Guard)
    with pytest.raises(KeyError):
        simulated("nonsense")
