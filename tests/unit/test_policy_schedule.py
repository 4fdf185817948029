"""The times of polls and ticks, on a clock that the test sets."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from qmpballoon.model.names import VmId
from qmpballoon.model.records import GuestStats, Sample
from qmpballoon.policy.schedule import (
    FULL_POLL_EVERY_S,
    MOVING_FOR_S,
    WATCHED_EVERY_S,
    TickSchedule,
    VmSchedule,
    is_at_rest,
    is_urgent,
    sampling_interval_s,
)
from qmpballoon.policy.snapshot import GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB


def a_guest(available: int = 300 * MIB, *, at_s: float = 100.0, actual: int = 512 * MIB) -> GuestSnapshot:
    return GuestSnapshot(
        id=VmId("a"),
        life="1",
        size=1024 * MIB,
        actual=actual,
        target=None,
        floor=128 * MIB,
        ceiling=1024 * MIB,
        fresh_since_s=0.0,
        sample=Sample(GuestStats(available=available), at_s, actual),
    )


def is_sampled_fast(guest: GuestSnapshot, previous: GuestSnapshot | None) -> bool:
    return sampling_interval_s(guest, previous, calm_s=0.3, fast_s=0.2) == 0.2


def test_a_guest_at_rest_is_sampled_rarely() -> None:
    assert not is_sampled_fast(a_guest(), a_guest(at_s=98.0))


def test_a_thin_guest_is_sampled_fast() -> None:
    assert is_sampled_fast(a_guest(60 * MIB), a_guest(60 * MIB, at_s=98.0))
    assert not is_sampled_fast(a_guest(64 * MIB), a_guest(64 * MIB, at_s=98.0))


def test_a_guest_that_grows_by_more_than_a_percent_a_second_is_sampled_fast() -> None:
    before = a_guest(312 * MIB, at_s=98.0)  # holds 200 MiB: 1 % in 2 s is 4 MiB
    assert is_sampled_fast(a_guest(307 * MIB), before)
    assert not is_sampled_fast(a_guest(309 * MIB), before)


def test_growth_is_a_rate_at_any_interval_between_two_samples() -> None:
    assert is_sampled_fast(a_guest(311 * MIB), a_guest(312 * MIB, at_s=99.8))
    assert not is_sampled_fast(a_guest(311 * MIB), a_guest(312 * MIB, at_s=98.0))


def test_a_moving_balloon_is_sampled_fast_and_one_that_does_not_follow_is_not() -> None:
    asked = replace(a_guest(), target=400 * MIB)
    assert is_sampled_fast(asked, a_guest(at_s=99.8))
    assert is_sampled_fast(replace(asked, actual=500 * MIB), replace(asked, actual=510 * MIB))
    assert not is_sampled_fast(asked, replace(asked, sample=a_guest(at_s=98.0).sample))
    assert not is_sampled_fast(replace(asked, target=512 * MIB), a_guest(at_s=99.8))


def test_a_guest_that_cannot_be_sampled_is_not_sampled_fast() -> None:
    thin = a_guest(MIB)
    assert not is_sampled_fast(replace(thin, driver_up=False), None)
    assert not is_sampled_fast(replace(thin, answers=False), None)
    assert not is_sampled_fast(replace(thin, run_state="paused"), None)


def test_a_guest_is_sampled_four_times_before_a_burst_could_use_up_its_available_memory() -> None:
    def interval_s(available: int) -> float:
        before = a_guest(available, at_s=98.0, actual=1024 * MIB)
        return sampling_interval_s(a_guest(available, actual=1024 * MIB), before, calm_s=2.0, fast_s=0.2)

    assert interval_s(600 * MIB) == 2.0
    assert interval_s(160 * MIB) == 1.0  # 4 s at 40 MiB/s
    assert interval_s(100 * MIB) == 0.2  # thin


def test_without_a_fast_interval_all_guests_have_the_calm_interval() -> None:
    assert sampling_interval_s(a_guest(MIB), None, calm_s=2.0, fast_s=0.0) == 2.0


def test_a_large_guest_is_sampled_for_a_larger_burst() -> None:
    small = a_guest(320 * MIB, actual=2048 * MIB)
    large = replace(small, size=8192 * MIB)
    assert sampling_interval_s(small, small, calm_s=2.0, fast_s=0.2) == 2.0
    assert sampling_interval_s(large, large, calm_s=2.0, fast_s=0.2) == 320 / 256 / 4


@dataclass
class Settings:
    stats_interval_s: float = 2.0
    fast_interval_s: float = 0.2


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


CALM = Settings()
THIN = 10 * MIB  # available


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def vm(clock: Clock) -> VmSchedule:
    schedule = VmSchedule(CALM, clock)
    schedule.defer_full_poll()
    return schedule


def test_a_calm_vm_is_polled_at_its_interval_and_an_urgent_one_fast(vm: VmSchedule) -> None:
    assert vm.pause_s(CALM, hurried=False) == 2.0
    assert vm.pause_s(CALM, hurried=True) == 0.2
    assert vm.pause_s(Settings(fast_interval_s=0.0), hurried=True) == 2.0
    assert vm.pause_s(Settings(stats_interval_s=0.1), hurried=True) == 0.1


def test_the_full_poll_is_on_time_and_does_not_wait_for_a_sample(vm: VmSchedule, clock: Clock) -> None:
    assert not vm.is_full_poll_due
    clock.now_s += FULL_POLL_EVERY_S - 0.5
    assert vm.pause_s(CALM, hurried=False) == pytest.approx(0.5)
    vm.request_full_poll()
    assert vm.is_full_poll_due
    assert vm.pause_s(CALM, hurried=False) == 0.0
    vm.defer_full_poll()
    assert not vm.is_full_poll_due


def test_a_vm_with_a_waiting_request_is_polled_at_the_shortest_interval(vm: VmSchedule) -> None:
    vm.watchers += 1
    assert vm.pause_s(CALM, hurried=False) == WATCHED_EVERY_S
    vm.begin(CALM)
    assert vm.watchers == 1


def test_a_balloon_may_be_moving_for_a_while_after_a_target(vm: VmSchedule, clock: Clock) -> None:
    clock.now_s += 1.0
    assert not vm.may_be_moving
    vm.target_sent()
    assert vm.may_be_moving
    clock.now_s += MOVING_FOR_S + 0.1
    assert not vm.may_be_moving


def test_a_sample_sets_the_interval_until_the_samples_are_forgotten(vm: VmSchedule) -> None:
    vm.sampled(a_guest(THIN), CALM)
    assert vm.sample_every_s(CALM, hurried=False) == 0.2
    vm.forget_samples(CALM)
    assert vm.sample_every_s(CALM, hurried=False) == 2.0
    assert vm.sampled(a_guest(THIN), CALM)  # as the first sample


def test_a_guest_that_became_thin_or_thinner_needs_a_decision_now(vm: VmSchedule) -> None:
    assert not vm.sampled(a_guest(at_s=100.0), CALM)
    assert vm.sampled(a_guest(THIN, at_s=100.2), CALM)
    assert not vm.sampled(a_guest(THIN, at_s=100.4), CALM)
    assert vm.sampled(a_guest(THIN - 5 * MIB, at_s=100.6), CALM)
    assert not vm.sampled(a_guest(at_s=100.8), CALM)


def test_a_thin_guest_that_rss_refutes_is_not_urgent() -> None:
    assert is_urgent(a_guest(THIN), None)
    assert not is_urgent(replace(a_guest(THIN), rss=100 * MIB), None)
    assert is_urgent(replace(a_guest(THIN), rss=2048 * MIB), None)


# ── ticks: calm 2 s, shortest 0.1 s, a tenth of a core ───────────────────────────────────────────────


@pytest.fixture
def ticks(clock: Clock) -> TickSchedule:
    return TickSchedule(clock)


def tick(ticks: TickSchedule, clock: Clock, cost_s: float) -> None:
    ticks.began()
    clock.now_s += cost_s
    ticks.ended(cost_s)


def test_the_first_tick_is_due_now(ticks: TickSchedule) -> None:
    assert ticks.pause_s == 0.0


def test_an_unrequested_tick_comes_after_the_calm_interval(ticks: TickSchedule, clock: Clock) -> None:
    tick(ticks, clock, 0.001)
    assert ticks.pause_s == pytest.approx(2.0)
    clock.now_s += 5.0
    assert ticks.pause_s == 0.0


def test_a_requested_tick_comes_after_the_shortest_interval(ticks: TickSchedule, clock: Clock) -> None:
    tick(ticks, clock, 0.001)
    ticks.ask()
    assert ticks.pause_s == pytest.approx(0.1)


def test_a_requested_tick_waits_for_its_share_of_processor_time(ticks: TickSchedule, clock: Clock) -> None:
    tick(ticks, clock, 0.05)
    ticks.ask()
    assert ticks.pause_s == pytest.approx(0.5)
    tick(ticks, clock, 10.0)
    ticks.ask()
    assert ticks.pause_s == pytest.approx(2.0)  # no longer than without a request


@pytest.mark.parametrize(
    ("cost_s", "pause_s"), [(0.0, 0.0), (0.001, 0.01), (0.01, 0.1), (0.05, 0.1), (10.0, 0.1)]
)
def test_an_urgent_tick_never_waits_longer_than_the_shortest_interval(
    ticks: TickSchedule, clock: Clock, cost_s: float, pause_s: float
) -> None:
    tick(ticks, clock, cost_s)
    ticks.ask()
    ticks.ask_urgently()
    assert ticks.pause_s == pytest.approx(pause_s)


def test_a_sample_that_changed_little_requests_no_tick_of_a_host_at_rest(
    ticks: TickSchedule, clock: Clock
) -> None:
    tick(ticks, clock, 0.001)
    ticks.rests = True
    assert not ticks.ask(little=True)
    assert ticks.pause_s == pytest.approx(2.0)
    ticks.rests = False
    assert ticks.ask(little=True)
    assert ticks.pause_s == pytest.approx(0.1)


def test_held_memory_must_change_by_a_sixteenth_of_what_is_available(clock: Clock) -> None:
    schedule = VmSchedule(CALM, clock)

    def may_change(available: int, *, hurried: bool = False) -> bool:
        return schedule.may_change_decisions(a_guest(available), hurried=hurried)

    assert may_change(320 * MIB)  # the first one
    assert not may_change(302 * MIB)
    assert not may_change(339 * MIB)
    assert may_change(301 * MIB)  # slow growth has added up to 19 MiB of 301
    assert not may_change(301 * MIB)
    assert may_change(301 * MIB, hurried=True)
    assert may_change(THIN)
    assert may_change(THIN)
    schedule.watchers += 1
    assert may_change(THIN + 300 * MIB)
    assert may_change(THIN + 300 * MIB)
    schedule.watchers -= 1
    assert not may_change(THIN + 300 * MIB)
    schedule.forget_samples(CALM)
    assert may_change(THIN + 300 * MIB)
    assert schedule.may_change_decisions(replace(a_guest(), sample=None), hurried=False)


def test_a_host_rests_if_nothing_is_moved_and_an_eighth_of_its_memory_is_free() -> None:
    guest = a_guest(actual=700 * MIB)
    held, moved = {guest.id: Hold("dead-band")}, {guest.id: SetTarget(600 * MIB, "idle")}
    roomy = Snapshot(now_s=100.0, guests=(guest,), budget=800 * MIB, mem_total=4096 * MIB)
    assert is_at_rest(roomy, held)
    assert not is_at_rest(roomy, moved)
    assert not is_at_rest(replace(roomy, budget=799 * MIB), held)
    assert not is_at_rest(replace(roomy, mem_available=99 * MIB), held)
    assert is_at_rest(replace(roomy, budget=2048 * MIB, mem_total=800 * MIB, mem_available=100 * MIB), held)


def test_one_tick_serves_all_requests(ticks: TickSchedule, clock: Clock) -> None:
    tick(ticks, clock, 0.001)
    assert [ticks.ask(), ticks.ask(), ticks.ask_urgently(), ticks.ask_urgently()] == [
        True,
        False,
        True,
        False,
    ]
    tick(ticks, clock, 0.001)
    assert ticks.pause_s == pytest.approx(2.0)
    assert [ticks.ask_urgently(), ticks.ask()] == [True, True]


def test_the_cost_of_urgent_ticks_delays_later_ordinary_ticks(ticks: TickSchedule, clock: Clock) -> None:
    for _ in range(4):
        tick(ticks, clock, 0.04)  # each delays by 0.4 s
        ticks.ask_urgently()
        clock.now_s += ticks.pause_s
    tick(ticks, clock, 0.001)
    ticks.ask()
    assert ticks.pause_s == pytest.approx(4 * 0.4 - 3 * (0.1 + 0.04) - 0.1 - 0.001 + 0.01)


@pytest.mark.parametrize("cost_s", [0.002, 0.02, 0.2, 2.0])
def test_the_agent_has_time_between_ticks_while_guests_are_in_constant_emergency(
    ticks: TickSchedule, clock: Clock, cost_s: float
) -> None:
    """Each sample of a hundred guests requests an urgent tick: the interval depends on the cost of a tick."""
    between_s: list[float] = []
    for _ in range(100):
        tick(ticks, clock, cost_s)
        for _ in range(100):
            ticks.ask_urgently()
        between_s.append(ticks.pause_s)
        clock.now_s += ticks.pause_s
    assert min(between_s) == pytest.approx(min(0.1, 10 * cost_s))
    tick(ticks, clock, cost_s)
    ticks.ask()  # the emergency is over; the delay by a hundred ticks is bounded
    assert ticks.pause_s <= 2.0
    clock.now_s += ticks.pause_s
    tick(ticks, clock, 0.001)
    ticks.ask()
    assert ticks.pause_s == pytest.approx(0.1)
