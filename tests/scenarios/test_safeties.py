"""Every safety is needed: with it the scenario succeeds, without it the scenario fails."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from closed_loop import Between, a_trace, a_vm, moves, of_guests, ours, played, words
from test_traps import STRICT, in_turn

from qmpballoon.model.records import Sample
from qmpballoon.policy.cooperation import Safeties
from qmpballoon.policy.estimate import EstimateRules
from qmpballoon.policy.ports.fixed import Fixed
from qmpballoon.policy.snapshot import GuestSnapshot, Snapshot
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import Host, Run
from qmpballoon.sim.kernels import KERNEL_6_12
from qmpballoon.sim.trace import Trace
from qmpballoon.sim.vm import QEMU_OVERHEAD, SimulatedVm
from qmpballoon.units import MIB


def beside_a_faulty_guest(behaviour: Behaviour, *, grown_at_s: float = 30.0) -> Trace:
    """A faulty guest grows late, a sound one before it, a third is idle."""
    faulty = a_vm("faulty", (0, 150), (40, 150), (50, 350), behaviour=behaviour)
    sound = a_vm("sound", (0, 200), (10, 200), (grown_at_s, 700))
    return a_trace(faulty, sound, a_vm("idle", (0, 200)), budget=1700, seconds=70)


def test_staleness_a_guest_with_old_figures_is_not_shrunk_by_them() -> None:
    trace = beside_a_faulty_guest(Behaviour.FROZEN_STATS)
    assert played(trace).figures.oom_kills == 0
    assert played(trace, ours(staleness=False)).figures.oom_kills > 0


def test_stuck_balloons_memory_of_a_stuck_balloon_is_not_counted_as_given() -> None:
    trace = beside_a_faulty_guest(Behaviour.STUCK, grown_at_s=25.0)
    right, wrong = played(trace), played(trace, ours(stuck_balloons=False))
    assert "contradicted" in words(right, "faulty")
    assert right.figures.over_budget_mib_s < wrong.figures.over_budget_mib_s / 2


def test_corroborate_a_claim_that_the_host_refutes_takes_nothing_from_others() -> None:
    wrong_figures = a_vm("wrong_figures", (0, 120), behaviour=Behaviour.CLAIMS_ALL)
    sound = a_vm("sound", (0, 200), (10, 200), (40, 850))
    trace = a_trace(wrong_figures, replace(wrong_figures, name="wrong2"), sound, budget=1700, seconds=60)
    assert played(trace).figures.oom_kills == 0
    assert played(trace, ours(corroborate=False)).figures.oom_kills > 2


def test_look_ahead_a_burst_is_met_before_it_kills() -> None:
    trace = in_turn(20)
    assert played(trace, host=STRICT).figures.oom_kills == 0
    assert played(trace, ours(look_ahead=False), host=STRICT).figures.oom_kills > 0


def test_emergencies_are_relieved_under_a_policy_that_sees_none() -> None:
    growing = a_vm("growing", (0, 100), (10, 100), (50, 800))
    trace = a_trace(growing, a_vm("idle", (0, 100)), budget=1200, mem_total=4096, seconds=60)
    assert played(trace, ours(policy=Fixed())).figures.oom_kills == 0
    assert played(trace, ours(policy=Fixed(), emergencies=False)).figures.oom_kills > 0


def test_emergencies_are_relieved_in_manual_mode() -> None:
    growing = a_vm("growing", (0, 100), (10, 100), (50, 800))
    trace = a_trace(growing, a_vm("idle", (0, 100)), budget=1200, mem_total=4096, seconds=60)
    manual = of_guests(lambda guest, snapshot: replace(guest, mode="manual"))
    assert played(trace, Between(ours(), sees=manual)).figures.oom_kills == 0
    assert played(trace, Between(ours(emergencies=False), sees=manual)).figures.oom_kills > 0


def test_enforce_budget_memory_is_not_given_before_it_is_free() -> None:
    trace = in_turn(10, budget=780)
    right, wrong = played(trace, host=STRICT), played(trace, ours(enforce_budget=False), host=STRICT)
    assert right.figures.over_budget_mib_s < wrong.figures.over_budget_mib_s / 4


def test_remember_peaks_a_repeated_peak_has_its_memory() -> None:
    again = (85, 100), (87, 800), (95, 800)
    peaky = a_vm("peaky", (0, 100), (5, 100), (15, 800), (18, 800), (19, 100), *again)
    leaky = a_vm("leaky", (0, 200), (55, 200), (75, 700))
    idle = a_vm("idle", (0, 100))
    slow = replace(peaky, deflate_bytes_per_s=48.0 * MIB)
    trace = a_trace(slow, leaky, idle, replace(idle, name="idle2"), budget=2700, seconds=95)
    right, wrong = played(trace, host=STRICT), played(trace, ours(remember_peaks=False), host=STRICT)
    assert right.figures.oom_kills == 0
    assert wrong.figures.oom_kills > 0


def test_discount_returned_memory_that_is_reported_late_is_no_growth() -> None:
    # Two guests grow and shrink one after the other, too slowly for an emergency.
    rows = [((0, 300), (at_s, 300), (at_s + 50, 650), (at_s + 100, 300)) for at_s in (10, 30)]
    drifting = [a_vm(f"vm{number}", *of_one) for number, of_one in enumerate(rows)]
    idle = [a_vm(f"idle{number}", (0, 250)) for number in range(3)]
    trace = a_trace(*drifting, *idle, budget=2600, seconds=160)
    host = Host(kernel=KERNEL_6_12)
    right, wrong = played(trace, host=host), played(trace, ours(discount_returned_memory=False), host=host)
    assert right.figures.oom_kills == 0
    assert "emergency" not in words(right, "vm0")
    assert "emergency" in words(wrong, "vm0")
    assert right.figures.moves_per_vm_h < wrong.figures.moves_per_vm_h * 2 / 3


def test_grace_a_guest_that_has_just_booted_is_not_shrunk() -> None:
    new = a_vm("new", (0, 20), (29, 20), (31, 500), boots_at_s=20.0)
    hungry = a_vm("hungry", (0, 300), (20, 300), (35, 800))
    trace = a_trace(new, hungry, a_vm("idle", (0, 100)), budget=1700, seconds=50)

    def early(run: Run) -> list[float]:
        shrinks = [
            step for step in run.steps if step.vm == "new" and (step.target or step.actual) < step.actual
        ]
        return [step.at_s for step in shrinks if step.at_s < 20 + 2.7 + 3]

    assert early(played(trace)) == []
    assert early(played(trace, ours(grace=False))) != []


def test_pause_and_migration_a_guest_that_migrates_is_not_moved() -> None:
    def migrating(guest: GuestSnapshot, snapshot: Snapshot) -> GuestSnapshot:
        return replace(guest, migrating=guest.id == "idle")

    trace = a_trace(
        a_vm("idle", (0, 100)), a_vm("hungry", (0, 300), (10, 300), (50, 700)), budget=1400, seconds=60
    )
    view = of_guests(migrating)
    assert moves(played(trace, Between(ours(), sees=view)), "idle") == 0
    assert moves(played(trace, Between(ours(pause_and_migration=False), sees=view)), "idle") > 0


@pytest.fixture
def memory_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the guest ``locked`` gives stays resident in its QEMU, as locked memory does."""
    follows: Any = SimulatedVm.rss  # the property itself

    def rss(vm: SimulatedVm) -> Any:
        return QEMU_OVERHEAD + vm.vm.size if vm.name == "locked" else follows.fget(vm)

    monkeypatch.setattr(SimulatedVm, "rss", property(rss))


@dataclass
class Resident:
    """Records the largest resident memory of all QEMUs together."""

    most: int = 0

    def __call__(self, snapshot: Snapshot) -> Snapshot:
        if snapshot.now_s > 40:
            self.most = max(self.most, sum(min(guest.rss or 0, guest.size) for guest in snapshot.guests))
        return snapshot


@pytest.mark.usefixtures("memory_that_stays")
def test_contradiction_memory_that_was_not_freed_is_not_given_to_others() -> None:
    hungry = a_vm("hungry", (0, 300), (10, 300), (30, 500), (60, 500), (80, 900))
    locked = a_vm("locked", (0, 100))
    trace = a_trace(locked, hungry, a_vm("idle", (0, 300)), budget=2000, mem_total=4096, seconds=100)
    right, wrong = Resident(), Resident()
    trusted = played(trace, Between(ours(), sees=right), host=STRICT)
    played(trace, Between(ours(contradiction=False), sees=wrong), host=STRICT)
    assert "untrusted" in words(trusted, "locked")
    assert right.most < wrong.most


@dataclass
class OtherController:
    """Another controller that sets the balloon of one guest every few seconds."""

    target: int
    next_s: float = 20.0

    def refresh(self, vm: SimulatedVm, now_s: float) -> None:
        if vm.name == "contested" and now_s >= self.next_s:
            self.next_s = now_s + 5
            vm.guest.advance(now_s)
            vm.guest.set_target(self.target)


@pytest.fixture
def other_controller(monkeypatch: pytest.MonkeyPatch) -> OtherController:
    """Another controller sets the balloon of the guest ``contested``."""
    controller, refresh = OtherController(400 * MIB), SimulatedVm.refresh

    def with_controller(vm: SimulatedVm, now_s: float) -> None:
        refresh(vm, now_s)
        controller.refresh(vm, now_s)

    monkeypatch.setattr(SimulatedVm, "refresh", with_controller)
    return controller


def test_foreign_control_is_not_fought(other_controller: OtherController) -> None:
    trace = a_trace(
        a_vm("contested", (0, 100)), a_vm("hungry", (0, 300), (10, 300), (50, 900)), budget=1400, seconds=60
    )
    right = played(trace)
    other_controller.next_s = 20.0
    wrong = played(trace, ours(foreign_control=False))
    assert "foreign-hand" in words(right, "contested")
    assert moves(right, "contested") < moves(wrong, "contested")


def test_late_ticks_samples_from_before_a_stop_take_nothing() -> None:
    grown = a_vm("grown", (0, 100), (21, 100), (31, 600), (33, 760), stats_interval_s=20.0)
    trace = a_trace(grown, a_vm("hungry", (0, 300), (20, 300), (50, 700)), budget=1300, seconds=60)
    right = played(trace, Between(ours(), sees=Stopped()))
    wrong = played(trace, Between(ours(late_ticks=False), sees=Stopped()))

    def shrinks(run: Run) -> list[float]:
        return [
            step.at_s
            for step in run.steps
            if step.vm == "grown"
            and step.target is not None
            and step.target < step.actual
            and 20 < step.at_s < 36
        ]

    assert shrinks(right) == []
    assert shrinks(wrong) != []


@dataclass
class Stopped:
    """The agent is stopped from 20 s to 32 s; its samples are older than that until 36 s."""

    samples: dict[str, Sample | None] = field(default_factory=dict)
    late: bool = True

    def __call__(self, snapshot: Snapshot) -> Snapshot:
        if snapshot.now_s < 20:
            self.samples = {guest.id: guest.sample for guest in snapshot.guests}
            return snapshot
        if snapshot.now_s < 32:
            return replace(snapshot, guests=())
        late, self.late = self.late, False
        if snapshot.now_s < 36:
            snapshot = replace(
                snapshot,
                guests=tuple(
                    replace(guest, sample=self.samples[guest.id]) if guest.id == "grown" else guest
                    for guest in snapshot.guests
                ),
            )
        return replace(snapshot, elapsed_s=12.0 if late else snapshot.elapsed_s)


def swings(count: int, *, high: int, period_s: float = 0.4, seconds: float = 120.0) -> Trace:
    """Guests that touch and free memory without end, beside guests that have bursts."""
    claimers = []
    for number in range(count):
        rows, at_s = [(0.0, 60)], 10.0 + 0.1 * number
        while at_s < seconds:
            rows += [(at_s, 60), (at_s + 0.05, high), (at_s + period_s / 2, high)]
            rows += [(at_s + period_s / 2 + 0.05, 60)]
            at_s += period_s
        claimers.append(a_vm(f"claimer{number + 1}", *rows, floor=256))
    honest = [
        a_vm(
            f"honest{number + 1}",
            *((0, 180), (20 + 15 * number, 180), (40 + 15 * number, 520), (70 + 15 * number, 520)),
            (72 + 15 * number, 180),
            floor=256,
        )
        for number in range(3)
    ]
    return a_trace(*claimers, *honest, budget=(count + 3) * 614, seconds=seconds)


def kills(run: Run, of: str) -> int:
    return sum(len(times) for vm, times in run.kills.items() if vm.startswith(of))


@pytest.mark.parametrize("seed", [1, 2])
def test_doubt_unused_claims_swinging_ones_win_no_memory_of_others_and_cause_few_moves(seed: int) -> None:
    trace = swings(3, high=420)
    doubted = played(trace, ours(), host=Host(seed=seed))
    believed = played(trace, ours(doubt_unused_claims=False), host=Host(seed=seed))
    assert moves(doubted) * 4 < moves(believed)
    assert kills(doubted, "honest") == 0
    assert doubted.figures.over_budget_mib_s * 100 < believed.figures.over_budget_mib_s
    assert "unused-claims" in words(doubted, "claimer1")
    assert "unused-claims" not in words(doubted, "honest1")


def test_every_safety_has_a_scenario() -> None:
    tests = Path(__file__).read_text()
    names = [switch.name for kind in (Safeties, EstimateRules) for switch in fields(kind)]
    assert [name for name in names if f"def test_{name}_" not in tests] == []
