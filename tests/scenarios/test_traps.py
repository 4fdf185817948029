"""Rules that look reasonable and are wrong: each is compared with the right one, and must be worse."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from closed_loop import Between, a_trace, a_vm, moves, of_guests, ours, played, swapped, words

from qmpballoon.model.names import VmId
from qmpballoon.policy import cooperation, estimate, fairshare, guard
from qmpballoon.policy.cooperation import Cooperation, Judgement
from qmpballoon.policy.estimate import Past
from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.schedule import TickSchedule
from qmpballoon.policy.sharing import water_fill
from qmpballoon.policy.snapshot import Decision, Decisions, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import Host
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.units import MIB

STRICT = Host(overload="host")


def in_turn(rate: float, *, budget: int = 820, inflate: float = 32, seconds: float = 60.0) -> Trace:
    """Six small guests, of which one after the other needs much for six seconds; MiB and seconds."""
    vms = []
    for number in range(6):
        at_s, top = 5.0 + number * 8, 150
        up_s = at_s + (top - 15) / rate
        rows = ((0.0, 15), (at_s, 15), (up_s, top), (up_s + 6, top), (up_s + 6.5, 15))
        rates = {"inflate_bytes_per_s": inflate * MIB, "deflate_bytes_per_s": 2 * inflate * MIB}
        vms.append(a_vm(f"vm{number}", *rows, size=224, floor=96, **rates))
    return a_trace(*vms, budget=budget, seconds=seconds)


def one_starves() -> Trace:
    """One guest grows by 10 MiB/s while four are idle; all of the budget is given out."""
    idle = [a_vm(f"idle{number}", (0, 120), inflate_bytes_per_s=32.0 * MIB) for number in range(4)]
    return a_trace(*idle, a_vm("hungry", (0, 300), (10, 300), (65, 850)), budget=2600, seconds=80)


def targets_of(decisions: Decisions) -> dict[VmId, SetTarget]:
    return {vm: decision for vm, decision in decisions.items() if isinstance(decision, SetTarget)}


def guests_of(snapshot: Snapshot) -> dict[VmId, GuestSnapshot]:
    return {guest.id: guest for guest in snapshot.guests}


def test_a_starving_guest_that_gets_its_ceiling_at_once_exceeds_the_budget() -> None:
    def released(snapshot: Snapshot, decisions: Decisions) -> Decisions:
        guests = guests_of(snapshot)
        return {**decisions} | {
            vm: replace(decision, target=guests[vm].ceiling)
            for vm, decision in targets_of(decisions).items()
            if decision.why == "emergency"
        }

    trace = in_turn(40, inflate=128)
    right, wrong = played(trace), played(trace, Between(ours(enforce_budget=False), decides=released))
    assert right.figures.over_budget_mib_s < wrong.figures.over_budget_mib_s / 4


def test_a_fixed_emergency_threshold_keeps_small_guests_in_emergency(patch: pytest.MonkeyPatch) -> None:
    vms = [a_vm(f"vm{number}", (0, 38), size=192, floor=64, base=35 * MIB) for number in range(6)]
    trace = a_trace(*vms, budget=6 * 93, mem_total=4096, seconds=60)
    right = played(trace)
    swapped(patch, "critical", lambda actual: 24 * MIB)
    wrong = played(trace)
    assert "emergency" not in words(right)
    assert "emergency" in words(wrong)


@dataclass
class HeldAfterGrows:
    """Holds the shrinks of a guest for a time after it grew."""

    for_s: float = 60.0
    grown_at_s: dict[VmId, float] = field(default_factory=dict)

    def __call__(self, snapshot: Snapshot, decisions: Decisions) -> Decisions:
        guests, found = guests_of(snapshot), dict(decisions)
        for vm, decision in targets_of(decisions).items():
            if decision.target > guests[vm].actual:
                self.grown_at_s[vm] = snapshot.now_s
            elif snapshot.now_s - self.grown_at_s.get(vm, float("-inf")) < self.for_s:
                found[vm] = Hold("held-after-grow")
        return found


def test_shrinks_that_are_held_after_any_grow_leave_the_donor_blocked() -> None:
    trace = in_turn(20)
    right, wrong = played(trace), played(trace, ours(policy=Between(FairShare(), decides=HeldAfterGrows())))
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def test_shrinks_by_an_eighth_of_the_gap_come_too_late() -> None:
    def eighth(snapshot: Snapshot, decisions: Decisions) -> Decisions:
        guests = guests_of(snapshot)
        return {**decisions} | {
            vm: replace(decision, target=guests[vm].actual - (guests[vm].actual - decision.target) // 8)
            for vm, decision in targets_of(decisions).items()
            if decision.target < guests[vm].actual
        }

    trace = in_turn(20)
    right, wrong = (
        played(trace, host=STRICT),
        played(trace, ours(policy=Between(FairShare(), decides=eighth)), host=STRICT),
    )
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def observed_with(patch: pytest.MonkeyPatch, change: Any) -> None:
    """Change the past of each guest with ``change(past, after)``."""
    original = estimate.observe

    def observe(past: Past | None, *rest: Any) -> Past | None:
        after = original(past, *rest)
        return None if after is None else change(past, after)

    swapped(patch, "observe", observe)


def test_a_smoothed_need_alone_hides_the_beginning_of_a_burst(patch: pytest.MonkeyPatch) -> None:
    trace = in_turn(20)
    right = played(trace)
    observed_with(patch, lambda past, after: replace(after, held=int(after.average), trend=0.0))
    wrong = played(trace)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 1


def test_without_a_trend_relief_comes_too_late() -> None:
    trace = in_turn(20)
    right, wrong = played(trace, host=STRICT), played(trace, ours(look_ahead=False), host=STRICT)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def test_rates_per_sample_instead_of_per_second_cost_commands(patch: pytest.MonkeyPatch) -> None:
    def per_sample(past: Past | None, after: Past) -> Past:
        if past is None or past.seen_at_s == after.seen_at_s:
            return after
        return replace(after, trend=float(max(0, after.held - past.held)))

    trace = in_turn(20, inflate=64)
    right = played(trace)
    observed_with(patch, per_sample)
    wrong = played(trace)
    assert moves(wrong) > 1.1 * moves(right)


def test_held_from_a_new_actual_and_old_stats_makes_it_oscillate(
    patch: pytest.MonkeyPatch,
) -> None:
    original = estimate.observe

    def observe(past: Past | None, guest: GuestSnapshot, *rest: Any) -> Past | None:
        sample = guest.sample and replace(guest.sample, actual=guest.actual)
        return original(past, replace(guest, sample=sample), *rest)

    trace = in_turn(40, inflate=64)
    fewer_ticks = Host(tick_cost_s=0.02)  # otherwise a decision follows each sample before the balloon moves
    right = played(trace, host=fewer_ticks)
    swapped(patch, "observe", observe)
    wrong = played(trace, host=fewer_ticks)
    assert moves(wrong) > 1.1 * moves(right)


@pytest.mark.parametrize("cost_s", [0.1, 1.0])
def test_relief_that_waits_for_the_cost_of_earlier_ticks_comes_too_late(
    patch: pytest.MonkeyPatch, cost_s: float
) -> None:
    trace, expensive = in_turn(40), Host(tick_cost_s=cost_s)
    right = played(trace, host=expensive)
    patch.setattr(TickSchedule, "ask_urgently", TickSchedule.ask)
    wrong = played(trace, host=expensive)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 2


def test_stats_every_two_seconds_are_too_rare_for_a_growing_guest() -> None:
    trace = in_turn(40)
    right, wrong = played(trace), played(trace, host=Host(fast_interval_s=0))
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 2


@dataclass(frozen=True)
class FloorsThenShares:
    """All floors first, then the rest of the budget by shares, regardless of what a guest holds."""

    name: str = "floors-then-shares"

    def start(self) -> None:
        return None

    def step(self, state: None, snapshot: Snapshot) -> tuple[None, Decisions]:
        rest = snapshot.budget - sum(guest.floor for guest in snapshot.guests)
        gets = water_fill(
            {guest.id: guest.ceiling - guest.floor for guest in snapshot.guests},
            {guest.id: guest.shares for guest in snapshot.guests},
            rest,
        )
        decisions: dict[VmId, Decision] = {}
        for guest in snapshot.guests:
            decisions[guest.id] = SetTarget(guest.floor + gets[guest.id], "share")
        return None, decisions


def test_floors_then_the_rest_by_shares_shrinks_a_guest_below_what_it_holds() -> None:
    trace = one_starves()
    right, wrong = played(trace), played(trace, FloorsThenShares())
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def test_a_learned_floor_displaces_the_others() -> None:
    def learned(guest: GuestSnapshot, snapshot: Snapshot) -> GuestSnapshot:
        return guest if guest.estimate is None else replace(guest, floor=guest.estimate.want)

    trace = in_turn(20)
    right, wrong = played(trace), played(trace, ours(policy=Between(FairShare(), sees=of_guests(learned))))
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 2


def test_a_stuck_vm_that_may_not_grow_is_killed(patch: pytest.MonkeyPatch) -> None:
    stuck = a_vm("stuck", (0, 150), (32, 150), (45, 700), behaviour=Behaviour.INTERMITTENT)
    burst = a_vm("burst", (0, 200), (10, 200), (30, 600), (32, 600), (33, 200))
    trace = a_trace(stuck, burst, a_vm("idle", (0, 200)), budget=1700, seconds=70)
    original = cooperation.judge

    def judge(*known: Any, **switches: Any) -> tuple[Cooperation, Judgement]:
        after, judgement = original(*known, **switches)
        jammed = judgement.why in ("stuck", "backs-off", "contradicted")
        return after, replace(judgement, may_grow=False, set_back=False) if jammed else judgement

    right = played(trace)
    swapped(patch, "judge", judge)
    wrong = played(trace)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def test_an_idle_tax_inside_the_tiers_gains_nothing() -> None:
    def taxed(guest: GuestSnapshot, snapshot: Snapshot) -> GuestSnapshot:
        if guest.estimate is None:
            return guest
        active = min(1.0, guest.estimate.held / guest.actual)
        return replace(guest, shares=max(1, int(guest.shares / (active + 4 * (1 - active)))))

    trace = in_turn(20)
    right, wrong = played(trace), played(trace, ours(policy=Between(FairShare(), sees=of_guests(taxed))))
    assert wrong.figures.oom_kills >= right.figures.oom_kills
    assert wrong.figures.starved_vm_s >= right.figures.starved_vm_s
    assert wrong.figures.lent_mib <= right.figures.lent_mib * 1.02


def test_dead_bands_of_many_donors_do_not_add_up(patch: pytest.MonkeyPatch) -> None:
    donors = [a_vm(f"donor{number}", (0, 100), size=224, floor=64) for number in range(10)]
    hungry = a_vm("hungry", (0, 100), (20, 100), (60, 150), size=224, floor=64)
    trace = a_trace(*donors, hungry, budget=11 * 191, seconds=80)
    right = played(trace, host=STRICT)
    patch.setattr(fairshare._Known, "least_shrink", property(lambda known: 24 * MIB))
    wrong = played(trace, host=STRICT)
    assert right.figures.starved_vm_s < wrong.figures.starved_vm_s


def test_a_small_step_at_each_tick_of_a_long_growth_costs_commands(patch: pytest.MonkeyPatch) -> None:
    trace = in_turn(20, inflate=256)
    right = played(trace)
    patch.setattr(GuestSnapshot, "least_relief", property(lambda guest: 4 * MIB))
    wrong = played(trace)
    assert right.figures.oom_kills == wrong.figures.oom_kills == 0
    assert moves(wrong) > 1.3 * moves(right)


def test_remembered_peaks_that_precede_page_cache_in_use_waste_memory(
    patch: pytest.MonkeyPatch,
) -> None:
    def cached(name: str, cache: int) -> TraceVm:
        return replace(
            a_vm(name, (0, 100)), demand=(Demand(0, 100 * MIB, 0), Demand(30, 100 * MIB, cache * MIB))
        )

    apps = [a_vm(f"app{n}", (0, 150), (5, 150), (15, 600), (16, 600), (20, 150)) for n in range(2)]
    trace = a_trace(*apps, cached("files", 700), budget=1700, seconds=120)
    right = played(trace)
    original = fairshare._levels
    patch.setattr(fairshare, "_levels", lambda entry: [*original(entry)[:-3], *original(entry)[-1:] * 3])
    wrong = played(trace)
    assert right.figures.oom_kills == 0
    assert right.figures.regret_mib < 0.7 * wrong.figures.regret_mib


def test_floors_that_exceed_the_budget_kill_a_guest_for_idle_memory(patch: pytest.MonkeyPatch) -> None:
    idle = [a_vm(f"idle{number}", (0, 150), floor=700) for number in range(3)]
    hungry = a_vm("hungry", (0, 150), (10, 150), (40, 650), floor=700)
    trace = a_trace(*idle, hungry, budget=4 * 600, seconds=60)
    right = played(trace, host=STRICT)
    patch.setattr(guard, "_with_floors_that_fit", lambda snapshot, pasts: snapshot)
    wrong = played(trace, host=STRICT)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


@pytest.fixture
def patch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    return monkeypatch
