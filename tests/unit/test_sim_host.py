"""The simulated host: samples, steps, execution of decisions, checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.policy.registry import simulated
from qmpballoon.policy.snapshot import Decisions, SetTarget, Snapshot
from qmpballoon.sim.guest import Behaviour
from qmpballoon.sim.host import Host, InvariantViolated, Run, play, starts
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.sim.traces import built_in
from qmpballoon.units import MIB

A = VmId("a")
Steps = Callable[[Snapshot], Decisions]


class Scripted:
    """A policy that follows a script and records its snapshots."""

    name = "scripted"

    def __init__(self, decide: Steps = lambda snapshot: {}) -> None:
        self.decide = decide
        self.seen: list[Snapshot] = []

    def start(self) -> None:
        return None

    def step(self, state: None, snapshot: Snapshot) -> tuple[None, Decisions]:
        self.seen.append(snapshot)
        return None, self.decide(snapshot)


def a_vm(*rows: tuple[float, int, int], name: str = "a", **changes: object) -> TraceVm:
    """``rows``: time, anonymous and cache in MiB."""
    demand = tuple(Demand(at_s, anonymous * MIB, cache * MIB) for at_s, anonymous, cache in rows)
    vm = TraceVm(name=name, size=512 * MIB, floor=128 * MIB, ceiling=512 * MIB, demand=demand)
    return replace(vm, **changes)  # type: ignore[arg-type]


def a_trace(*vms: TraceVm, duration_s: float = 30.0, budget: int = 1024 * MIB) -> Trace:
    return Trace(name="t", about="", duration_s=duration_s, mem_total=2 * budget, budget=budget, vms=vms)


def once(at_s: float, target: int, name: str = "a") -> Steps:
    """Return a script that sets ``target`` once."""
    asked: list[float] = []

    def decide(snapshot: Snapshot) -> Decisions:
        if asked or snapshot.now_s < at_s:
            return {}
        asked.append(snapshot.now_s)
        return {guest.id: SetTarget(target, "script") for guest in snapshot.guests if guest.id == name}

    return decide


def test_guests_start_with_their_part_of_the_budget_or_with_what_they_hold() -> None:
    small = a_vm((0, 50, 0))
    large = a_vm((0, 400, 0), name="b")
    assert starts([small, small], 600 * MIB) == [300 * MIB, 300 * MIB]
    assert starts([small, large], 600 * MIB) == [129 * MIB, 471 * MIB]
    no_driver = replace(small, behaviour=Behaviour.NO_DRIVER)
    assert starts([small, no_driver], 700 * MIB) == [188 * MIB, 512 * MIB]


def test_a_kill_comes_when_the_demand_exceeds_the_available_memory_and_not_at_a_tick() -> None:
    trace = a_trace(a_vm((0, 50, 0), (10, 50, 0), (30, 450, 0)), budget=256 * MIB)
    run = play(trace, Scripted(), host=Host(calm_tick_s=7.0))
    crossing_s = 10 + (256 - 5 - 55 - 50) / 20
    assert run.kills[A][0] == pytest.approx(crossing_s, abs=0.11)


def test_deflate_on_oom_prevents_a_kill() -> None:
    trace = a_trace(a_vm((0, 50, 0), (10, 50, 0), (30, 350, 0), deflate_on_oom=True), budget=256 * MIB)
    run = play(trace, Scripted())
    assert run.figures.oom_kills == 0
    assert run.figures.over_budget_mib_s > 0


def test_a_killed_workload_grows_slowly_after_its_restart() -> None:
    vm = a_vm((0, 50, 0), (10, 50, 0), (15, 300, 0), (20, 300, 0), (20.1, 100, 0))
    trace = a_trace(vm, budget=256 * MIB)
    run = play(trace, Scripted(), record=True)
    assert run.figures.oom_kills == 1
    back_s = run.kills[A][0] + 10.0
    held = {round(point.at_s, 1): point.held for point in run.points[A]}
    assert held[round(back_s - 0.5, 1)] == 55 * MIB
    assert 55 * MIB < held[round(back_s + 1.0, 1)] < 155 * MIB
    assert held[30.0] == 155 * MIB


def test_calm_guests_are_sampled_at_their_interval_and_growing_ones_fast() -> None:
    calm, growing = a_vm((0, 50, 0)), a_vm((0, 50, 0), (10, 50, 0), (30, 250, 0), name="b")
    policy = Scripted()
    play(a_trace(calm, growing), policy, host=Host(calm_tick_s=0.1, fast_interval_s=0.2))
    seen: dict[str, set[float]] = {"a": set(), "b": set()}
    for snapshot in policy.seen:
        for guest in snapshot.guests:
            if guest.sample is not None and snapshot.now_s >= 15:
                seen[guest.id].add(guest.sample.seen_at_s)
    assert len(seen["a"]) in (7, 8, 9)
    assert len(seen["b"]) in range(70, 78)


def test_ticks_are_rare_while_all_guests_are_calm_and_frequent_after_a_move() -> None:
    policy = Scripted(once(10.0, 700 * MIB))
    large = a_vm((0, 50, 0), size=1024 * MIB, ceiling=1024 * MIB, inflate_bytes_per_s=40.0 * MIB)
    play(a_trace(large), policy)
    ticks = [snapshot.now_s for snapshot in policy.seen]
    assert ticks[:5] == pytest.approx([0.0, 2.0, 4.0, 6.0, 8.0])
    assert len([at_s for at_s in ticks if 10.0 < at_s <= 15.0]) >= 8
    assert len([at_s for at_s in ticks if 20.0 < at_s <= 30.0]) == 5


def test_a_new_vm_is_in_the_next_snapshot_and_charged_with_its_size() -> None:
    policy = Scripted()
    play(a_trace(a_vm((0, 50, 0)), a_vm((0, 50, 0), name="b", boots_at_s=7.3)), policy)
    first = next(snapshot for snapshot in policy.seen if len(snapshot.guests) == 2)
    assert first.now_s == pytest.approx(7.3)
    assert (first.guests[1].driver_up, first.guests[1].charge) == (False, 512 * MIB)
    last = policy.seen[-1].guests[1]
    assert last.driver_up
    assert last.fresh_since_s == pytest.approx(10.0, abs=0.3)


def test_a_reset_clears_the_sample_and_charges_the_size() -> None:
    policy = Scripted(once(2.0, 300 * MIB))
    play(a_trace(a_vm((0, 50, 0), resets_at_s=(10.0,))), policy, host=Host(calm_tick_s=0.5))
    during = next(snapshot for snapshot in policy.seen if snapshot.now_s > 10.1).guests[0]
    assert (during.driver_up, during.sample, during.booted_at_s) == (False, None, 10.0)
    assert (during.target, during.charge) == (300 * MIB, 512 * MIB)
    after = policy.seen[-1].guests[0]
    assert after.fresh_since_s is not None
    assert 12.7 <= after.fresh_since_s <= 13.2
    assert after.actual == 300 * MIB


def test_rss_is_all_touched_memory_outside_the_balloon() -> None:
    policy = Scripted(once(20.0, 300 * MIB))
    play(a_trace(a_vm((0, 50, 0), (5, 350, 0), (10, 350, 0), (10.1, 50, 0))), policy)
    assert policy.seen[0].guests[0].rss == (40 + 55 + 50) * MIB
    before = [snapshot.guests[0].rss for snapshot in policy.seen if 12 < snapshot.now_s < 20]
    assert set(before) == {(40 + 55 + 350) * MIB}
    assert policy.seen[-1].guests[0].rss == (40 + 300) * MIB


@pytest.mark.parametrize(
    ("behaviour", "actual"),
    [
        (Behaviour.IDEAL, 200),
        (Behaviour.SLOW, 472),
        (Behaviour.STUCK, 512),
        (Behaviour.LIMITED, 350),
        (Behaviour.NO_DRIVER, 512),
    ],
)
def test_balloons_move_by_the_behaviour_of_the_guest(behaviour: Behaviour, actual: int) -> None:
    vm = a_vm((0, 50, 0), behaviour=behaviour, limit=350 * MIB, inflate_bytes_per_s=64.0 * MIB)
    policy = Scripted(once(5.0, 200 * MIB))
    play(a_trace(vm, duration_s=16.0), policy)
    assert policy.seen[-1].guests[0].actual // MIB == pytest.approx(actual, abs=4)


def test_the_age_of_frozen_figures_increases() -> None:
    policy = Scripted()
    play(a_trace(a_vm((0, 50, 0), behaviour=Behaviour.FROZEN_STATS)), policy)
    guest = policy.seen[-1].guests[0]
    assert guest.sample_age_s(30.0) == pytest.approx(30.0)


@pytest.mark.parametrize(
    ("behaviour", "available"), [(Behaviour.CLAIMS_ALL, 0), (Behaviour.CLAIMS_NONE, 475)]
)
def test_guests_with_false_claims_report_false_figures(behaviour: Behaviour, available: int) -> None:
    policy = Scripted()
    play(a_trace(a_vm((0, 50, 0), behaviour=behaviour)), policy)
    sample = policy.seen[-1].guests[0].sample
    assert sample is not None
    assert sample.available == pytest.approx(available * MIB, abs=MIB)


def violations(trace: Trace, decide: Steps) -> list[str]:
    return play(trace, Scripted(decide)).violations


def test_decisions_that_break_a_rule_are_recorded() -> None:
    trace = a_trace(a_vm((0, 50, 0), ceiling=400 * MIB))
    assert violations(trace, once(5.0, 200 * MIB)) == []
    assert "below its floor" in violations(trace, once(5.0, 100 * MIB))[0]
    assert "over its ceiling" in violations(trace, once(5.0, 500 * MIB))[0]
    floors_do_not_fit = replace(trace, budget=120 * MIB)
    assert violations(floors_do_not_fit, once(5.0, 112 * MIB)) == []
    frozen = a_trace(a_vm((0, 50, 0), behaviour=Behaviour.FROZEN_STATS))
    assert violations(frozen, once(3.0, 200 * MIB)) == []
    assert "stale" in violations(frozen, once(9.0, 200 * MIB))[0]
    without = a_trace(a_vm((0, 50, 0), behaviour=Behaviour.NO_DRIVER))
    assert "without a driver" in violations(without, once(3.0, 200 * MIB))[0]


@pytest.mark.parametrize("target", [float("nan"), 0, -1, 2**50, 3.0 * MIB, None])
def test_a_target_that_is_no_size_ends_the_run(target: int) -> None:
    with pytest.raises(InvariantViolated, match="scripted asked for"):
        play(a_trace(a_vm((0, 50, 0))), Scripted(once(1.0, target)))


def test_a_decision_about_an_unknown_vm_ends_the_run() -> None:
    with pytest.raises(InvariantViolated, match="not present"):
        play(
            a_trace(a_vm((0, 50, 0))),
            Scripted(lambda snapshot: {"ghost": SetTarget(MIB, "x")}),  # type: ignore[dict-item]
        )


def test_the_same_seed_gives_the_same_run() -> None:
    trace = replace(built_in("liars", 3), duration_s=100.0)

    def run(seed: int) -> Run:
        return play(trace, simulated("qubes"), host=Host(seed=seed))

    first, second = run(3), run(3)
    assert (first.figures, first.steps) == (second.figures, second.steps)
    assert len(run(4).steps) > 0
    assert [step.at_s for step in run(4).steps] != [step.at_s for step in first.steps]


def test_recording_does_not_change_the_figures() -> None:
    trace = built_in("equilibrium", 2)
    plain = play(trace, simulated("qubes"))
    recorded = play(trace, simulated("qubes"), record=True)
    assert plain.figures == recorded.figures
    assert not plain.points
    assert len(recorded.points[VmId("starving")]) == pytest.approx(601, abs=2)


def test_a_static_split_is_never_over_budget_without_deflate_on_oom_and_boots() -> None:
    figures = play(built_in("bursts", 1), simulated("fixed")).figures
    assert figures.over_budget_mib_s == 0
    assert figures.oom_kills > 0
    assert figures.moves_per_vm_h == 0


def test_a_demand_larger_than_the_guest_causes_a_kill_in_the_trace_and_not_before_it() -> None:
    run = play(a_trace(a_vm((0, 600, 0)), duration_s=5.0), Scripted())
    assert run.kills[A] == [0.0]
    assert run.figures.oom_kills == 1
