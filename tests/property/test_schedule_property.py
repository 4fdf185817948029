"""Properties of schedules for any samples and any cost of ticks, also in the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from policy_makers import a_guest

from qmpballoon.policy.fairshare import FairShare
from qmpballoon.policy.guard import Guard, GuardState
from qmpballoon.policy.schedule import TickSchedule, VmSchedule
from qmpballoon.policy.snapshot import Decisions, Snapshot
from qmpballoon.sim.host import Host, play
from qmpballoon.sim.trace import Demand, Trace, TraceVm
from qmpballoon.units import MIB

CALM_S, SHORTEST_S, SHARE = 2.0, 0.1, 0.1
STEP_S = 0.1  # of the simulator's clock
NEAR = 1e-6


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Sampling:
    stats_interval_s: float
    fast_interval_s: float


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["sampled", "target", "forget", "hurried", "nothing"]),
        st.integers(0, 1024),  # available MiB
        st.floats(0.0, 15.0),  # seconds that pass
    ),
    max_size=30,
)


@given(STEPS, st.floats(0.2, 30.0), st.floats(0.05, 0.2))
def test_the_sampling_interval_is_between_the_fast_and_the_calm_one(
    steps: list[tuple[str, int, float]], calm_s: float, fast_s: float
) -> None:
    clock, sampling = Clock(), Sampling(calm_s, fast_s)
    schedule = VmSchedule(sampling, clock)
    for what, available, passed_s in steps:
        clock.now_s += passed_s
        if what == "sampled":
            schedule.sampled(a_guest(available=available, seen_at_s=clock.now_s), sampling)
        elif what == "target":
            schedule.target_sent()
        elif what == "forget":
            schedule.forget_samples(sampling)
        if schedule.is_full_poll_due:
            assert schedule.pause_s(sampling, hurried=what == "hurried") == 0.0
            schedule.defer_full_poll()
        every_s = schedule.sample_every_s(sampling, hurried=what == "hurried")
        assert fast_s <= every_s <= calm_s
        assert 0.0 < schedule.pause_s(sampling, hurried=what == "hurried") <= every_s


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(["none", "ordinary", "urgent"]),
        st.sampled_from([0.0, 0.001, 0.02, 0.3, 5.0]) | st.floats(0.0, 10.0),  # cost of the previous tick
        st.floats(0.0, 3.0),  # seconds from its end until the request
    ),
    max_size=60,
)


@given(REQUESTS)
def test_ticks_come_neither_too_early_nor_too_late_and_an_emergency_waits_the_shortest_interval_at_most(
    requests: list[tuple[str, float, float]],
) -> None:
    clock = Clock()
    ticks = TickSchedule(clock, calm_s=CALM_S, shortest_s=SHORTEST_S, share=SHARE)
    for kind, cost_s, after_s in requests:
        ticks.began()
        clock.now_s += cost_s
        ticks.ended(cost_s)
        ended_at_s = clock.now_s
        assert abs(ticks.due_at_s - ended_at_s - CALM_S) < NEAR
        clock.now_s += min(after_s, CALM_S)
        if kind == "ordinary":
            ticks.ask()
            assert ticks.due_at_s >= ended_at_s + min(CALM_S, max(SHORTEST_S, cost_s / SHARE)) - NEAR
        elif kind == "urgent":
            ticks.ask_urgently()
            assert ticks.pause_s <= SHORTEST_S + NEAR
            assert ticks.due_at_s <= ended_at_s + SHORTEST_S + NEAR
            assert ticks.due_at_s >= ended_at_s + min(SHORTEST_S, cost_s / SHARE) - NEAR
        assert ticks.due_at_s <= ended_at_s + CALM_S + NEAR
        clock.now_s += ticks.pause_s


@given(st.lists(st.floats(0.0, SHARE * CALM_S / 2), min_size=1, max_size=60))
def test_ordinary_ticks_take_at_most_their_share_at_any_rate_of_requests(
    costs_s: list[float],
) -> None:
    clock = Clock()
    ticks = TickSchedule(clock, calm_s=CALM_S, shortest_s=SHORTEST_S, share=SHARE)
    for cost_s in costs_s:
        ticks.began()
        clock.now_s += cost_s
        ticks.ended(cost_s)
        ticks.ask()
        clock.now_s += ticks.pause_s
    assert sum(costs_s) <= SHARE * clock.now_s + NEAR


class Watched:
    """A policy that records its snapshots."""

    name = "watched"

    def __init__(self) -> None:
        self.inner = Guard(FairShare())
        self.seen: list[Snapshot] = []

    def start(self) -> GuardState[Any]:
        return self.inner.start()

    def step(self, state: GuardState[Any], snapshot: Snapshot) -> tuple[GuardState[Any], Decisions]:
        self.seen.append(snapshot)
        return self.inner.step(state, snapshot)


ROWS = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 400)), min_size=1, max_size=4)


@settings(max_examples=20)
@given(st.lists(ROWS, min_size=1, max_size=4), st.integers(0, 1000))
def test_the_simulator_keeps_the_schedules(demands: list[list[tuple[int, int]]], seed: int) -> None:
    vms = []
    for number, rows in enumerate(demands):
        at_s, demand = 0.0, [Demand(0.0, 50 * MIB, 0)]
        for passed_s, anonymous in rows:
            at_s += passed_s
            demand.append(Demand(at_s, anonymous * MIB, 0))
        vms.append(
            TraceVm(
                name=f"vm{number}",
                size=512 * MIB,
                floor=128 * MIB,
                ceiling=512 * MIB,
                demand=tuple(demand),
            )
        )
    budget = 300 * len(vms) * MIB
    trace = Trace(name="t", about="", duration_s=30.0, mem_total=2 * budget, budget=budget, vms=tuple(vms))
    policy = Watched()
    play(trace, policy, host=Host(seed=seed, fast_interval_s=0.2))
    ticks = [snapshot.now_s for snapshot in policy.seen]
    assert all(SHORTEST_S - NEAR <= after - before <= CALM_S + NEAR for before, after in pairwise(ticks))
    for vm in range(len(vms)):
        samples = [sample for one in policy.seen if (sample := one.guests[vm].sample) is not None]
        seen_at_s = sorted({sample.seen_at_s for sample in samples})
        assert all(after - before <= 2 * CALM_S + STEP_S for before, after in pairwise(seen_at_s))
        assert seen_at_s[-1] > 30.0 - 2 * CALM_S - STEP_S
