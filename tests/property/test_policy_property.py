"""Properties of decisions on hosts with any guests."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st
from policy_makers import a_guest, a_host

from qmpballoon.policy import fairshare
from qmpballoon.policy.estimate import EstimateRules, corroborated, estimate, observe
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard, GuardState
from qmpballoon.policy.reasons import WORDS
from qmpballoon.policy.sharing import water_fill
from qmpballoon.policy.snapshot import Decisions, GuardView, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import Host, Run, play
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.units import MIB

SIZES = st.integers(0, 2**40)


@given(st.dictionaries(st.integers(0, 20), st.tuples(SIZES, st.integers(1, 10**6)), max_size=12), SIZES)
def test_water_fill_exceeds_neither_the_total_nor_any_request(
    wants: dict[int, tuple[int, int]], total: int
) -> None:
    requested = {key: size for key, (size, _) in wants.items()}
    gets = water_fill(requested, {key: shares for key, (_, shares) in wants.items()}, total)
    assert sum(gets.values()) <= total
    assert all(0 <= gets[key] <= requested[key] for key in requested)
    assert sum(gets.values()) >= min(total, sum(requested.values())) - len(requested)


@st.composite
def guests(draw: st.DrawFn, name: str) -> GuestSnapshot:
    size = draw(st.integers(64, 4096))
    floor = draw(st.integers(1, size))
    ceiling = draw(st.integers(floor, size))
    actual = draw(st.integers(1, size))
    guest = a_guest(
        name,
        size=size,
        actual=actual,
        floor=floor,
        ceiling=ceiling,
        available=draw(st.none() | st.integers(0, 2 * size)),
        target=draw(st.none() | st.integers(1, size)),
        shares=draw(st.sampled_from([1, 1000, 10**6])),
        mode=draw(st.sampled_from(["auto", "auto", "auto", "manual", "observe"])),
        driver_up=draw(st.sampled_from([True, True, True, False])),
        answers=draw(st.sampled_from([True, True, True, False])),
        migrating=draw(st.sampled_from([False, False, False, True])),
        run_state=draw(st.sampled_from(["running", "running", "paused"])),
        seen_at_s=draw(st.sampled_from([99.9, 99.9, 93.0, 20.0])),
        rss=draw(st.none() | st.integers(0, size * 2).map(lambda mib: mib * MIB)),
    )
    return replace(guest, fresh_since_s=draw(st.sampled_from([None, 5.0, 99.0])))


@st.composite
def hosts(draw: st.DrawFn) -> Snapshot:
    names = [f"vm{number}" for number in range(draw(st.integers(1, 6)))]
    overload = draw(st.sampled_from(["guests", "host"]))
    return a_host(
        *(draw(guests(name)) for name in names), budget=draw(st.integers(64, 16384)), overload=overload
    )


def decided(host: Snapshot) -> Decisions:
    guard = Guard(FairShare())
    return guard.step(guard.start(), host)[1]


def moved(host: Snapshot) -> dict[str, tuple[GuestSnapshot, SetTarget]]:
    return {
        guest.id: (guest, decision)
        for guest in host.guests
        if isinstance(decision := decided(host)[guest.id], SetTarget)
    }


BOOTING_ABOVE_ITS_CEILING = a_guest(
    "vm3", size=64, actual=3, available=0, target=1, floor=1, ceiling=2, driver_up=False
)
RESET_ABOVE_ITS_CEILING = a_guest("vm0", size=64, actual=2, target=64, floor=1, ceiling=1, driver_up=False)
REFUTED_ABOVE_ITS_CEILING = a_guest("vm0", size=66, floor=65, ceiling=65, available=0, shares=1, rss=0)


@settings(max_examples=80)
@given(hosts())
@example(a_host(REFUTED_ABOVE_ITS_CEILING, budget=64))
@example(a_host(a_guest("vm0", floor=1, ceiling=1), BOOTING_ABOVE_ITS_CEILING, budget=1))
def test_every_guest_gets_a_decision_and_every_target_is_a_possible_size(host: Snapshot) -> None:
    decisions = decided(host)
    assert decisions.keys() == {guest.id for guest in host.guests}
    for guest, decision in moved(host).values():
        assert 0 < decision.target <= guest.size
        floors_fit = sum(one.floor for one in host.guests) <= host.budget
        held = guest.sample.held if guest.sample else None
        least = guest.floor if floors_fit or guest.sample is None else corroborated(held or 0, guest)
        raises = not guest.driver_up and guest.target is not None and decision.target > guest.target
        assert raises or decision.target >= least or decision.target >= guest.actual


@settings(max_examples=80)
@given(hosts())
@example(a_host(RESET_ABOVE_ITS_CEILING, budget=64))
def test_a_guest_that_must_not_be_moved_is_not_shrunk(host: Snapshot) -> None:
    for guest, decision in moved(host).values():
        if decision.target < min(guest.actual, guest.target or guest.actual):
            assert guest.mode != "manual"
            assert guest.driver_up
            assert guest.answers
            assert not guest.migrating
            assert guest.run_state == "running"
            assert guest.fresh_since_s == 5.0
            assert guest.sample is not None
            assert guest.sample.seen_at_s == 99.9


@settings(max_examples=80)
@given(hosts())
def test_grows_never_exceed_the_free_memory_without_an_emergency(host: Snapshot) -> None:
    moves = moved(host)
    if any(decision.urgent for _, decision in moves.values()):
        return
    before = sum(guest.charge for guest in host.guests)
    grown = sum(max(0, decision.target - guest.charge) for guest, decision in moves.values())
    assert grown == 0 or before + grown <= host.budget


@settings(max_examples=60)
@given(hosts(), st.randoms())
def test_decisions_do_not_depend_on_the_order_of_vms(host: Snapshot, random: object) -> None:
    shuffled = list(host.guests)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert decided(replace(host, guests=tuple(shuffled))) == decided(host)


@settings(max_examples=60)
@given(hosts())
@example(a_host(RESET_ABOVE_ITS_CEILING, budget=64))
def test_no_guest_gets_more_than_its_ceiling(host: Snapshot) -> None:
    for guest, decision in moved(host).values():
        assert decision.target <= max(guest.ceiling, guest.actual)


@settings(max_examples=60)
@given(hosts())
def test_no_guest_is_entitled_to_more_than_its_want_while_another_lacks_its_floor(host: Snapshot) -> None:
    known = {}
    seen = []
    for guest in host.guests:
        past = observe(None, guest, host.now_s, EstimateRules())
        needs = None if past is None else estimate(past, guest, host.now_s, EstimateRules())
        seen.append(replace(guest, guard=GuardView(estimate=needs)))
        if needs is not None and guest.driver_up:
            known[guest.id] = fairshare._Known(seen[-1], needs)
    gets = fairshare.entitlements(known, replace(host, guests=tuple(seen)), 0)
    lacking = [vm for vm, entry in known.items() if gets[vm] < entry.guest.floor - len(known)]
    above = [
        vm
        for vm, entry in known.items()
        if gets[vm] > max(entry.estimate.want, fairshare._levels(entry)[4], entry.estimate.held * 3 // 2)
        and gets[vm] > fairshare._levels(entry)[2]
    ]
    assert not (lacking and above)


# ── closed loops ─────────────────────────────────────────────────────────────────────────────────


@dataclass
class Watched:
    """The guarded policy; it records the snapshot and the decisions of each tick."""

    guard: Guard[Any]
    ticks: list[tuple[Snapshot, Decisions]]

    @property
    def name(self) -> str:
        return self.guard.name

    def start(self) -> GuardState[Any]:
        return self.guard.start()

    def step(self, state: GuardState[Any], snapshot: Snapshot) -> tuple[GuardState[Any], Decisions]:
        after, decisions = self.guard.step(state, snapshot)
        self.ticks.append((snapshot, decisions))
        return after, decisions


@st.composite
def vms(draw: st.DrawFn, name: str) -> TraceVm:
    size = draw(st.sampled_from([256, 512, 1024]))
    anonymous = st.integers(0, size - 80)
    rows = [(0.0, draw(anonymous) // 3)]
    for _ in range(draw(st.integers(0, 3))):
        rows.append((rows[-1][0] + draw(st.sampled_from([1.0, 5.0, 15.0])), draw(anonymous)))
    return TraceVm(
        name=name,
        size=size * MIB,
        floor=size * MIB // draw(st.sampled_from([2, 4, 8])),
        ceiling=size * MIB,
        shares=draw(st.sampled_from([500, 1000, 2000])),
        deflate_on_oom=draw(st.booleans()),
        behaviour=draw(st.sampled_from([Behaviour.IDEAL, Behaviour.IDEAL, *Behaviour])),
        limit=size * MIB // 2,
        demand=tuple(Demand(at_s, held * MIB, 0) for at_s, held in rows),
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    present = tuple(draw(vms(f"vm{number}")) for number in range(draw(st.integers(2, 5))))
    budget = sum(vm.size for vm in present) * draw(st.sampled_from([60, 75, 90])) // 100
    return Trace(name="t", about="", duration_s=30.0, mem_total=budget * 5 // 4, budget=budget, vms=present)


def watched(trace: Trace, *, overload: str = "guests") -> tuple[Watched, Run]:
    policy = Watched(Guard(FairShare()), [])
    return policy, play(trace, policy, host=Host(overload=overload))


@settings(max_examples=15)
@given(traces())
def test_in_a_closed_loop_no_rule_is_broken_and_every_reason_is_a_documented_one(trace: Trace) -> None:
    policy, run = watched(trace)
    assert run.violations == []
    assert {decision.why for _, decisions in policy.ticks for decision in decisions.values()} <= WORDS.keys()


@settings(max_examples=15)
@given(traces())
def test_no_tick_grants_more_than_the_free_memory_without_an_emergency(trace: Trace) -> None:
    policy, _ = watched(trace, overload="host")
    for snapshot, decisions in policy.ticks:
        if any(isinstance(one, SetTarget) and one.urgent for one in decisions.values()):
            continue
        targets = {vm: one.target for vm, one in decisions.items() if isinstance(one, SetTarget)}
        before = sum(guest.charge for guest in snapshot.guests if guest.driver_up)
        after = sum(
            targets.get(guest.id, max(guest.actual, guest.target or 0))
            for guest in snapshot.guests
            if guest.driver_up
        )
        loading = sum(guest.size for guest in snapshot.guests if not guest.driver_up)
        assert after <= max(before, snapshot.budget) or loading


@settings(max_examples=10)
@given(traces(), st.sampled_from(list(Behaviour)), st.sampled_from(list(Behaviour)))
def test_an_unhealthy_vm_affects_others_only_by_its_charge(
    trace: Trace, one: Behaviour, other: Behaviour
) -> None:
    unhealthy, *rest = trace.vms
    large = replace(
        trace, budget=sum(vm.size for vm in trace.vms) * 2, mem_total=sum(vm.size for vm in trace.vms) * 4
    )
    found = []
    for behaviour in (one, other):
        run = play(
            replace(large, vms=(replace(unhealthy, name="zz", behaviour=behaviour), *rest)),
            Guard(FairShare()),
        )
        found.append([(step.vm, step.target) for step in run.steps if step.vm != "zz"])
    assert found[0] == found[1]


@settings(max_examples=60)
@given(hosts())
def test_no_target_is_below_the_floor_if_the_sum_of_floors_is_within_the_budget(host: Snapshot) -> None:
    host = replace(host, budget=max(host.budget, sum(guest.floor for guest in host.guests)))
    guard = Guard(FairShare())
    decisions = guard.step(guard.start(), host)[1]
    for guest in host.guests:
        decision = decisions[guest.id]
        if isinstance(decision, SetTarget) and decision.target < min(
            guest.actual, guest.target or guest.actual
        ):
            assert decision.target >= guest.floor
