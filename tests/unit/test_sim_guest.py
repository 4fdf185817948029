"""The simulated guest, compared with observations of real ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qmpballoon.sim.guest import NOT_REPORTED, Behaviour, GuestSpec, SimulatedGuest
from qmpballoon.units import MIB

SPEC = GuestSpec(size=256 * MIB, inflate_bytes_per_s=64 * MIB, deflate_bytes_per_s=128 * MIB)


def a_guest(spec: GuestSpec = SPEC, *, booted: bool = True) -> SimulatedGuest:
    return SimulatedGuest(spec, epoch_s=1_700_000_000.0, booted=booted)


def test_a_guest_moves_at_its_rates_in_steps_of_a_mebibyte() -> None:
    guest = a_guest()
    guest.set_target(128 * MIB)
    assert guest.next_step_s() == pytest.approx(1 / 64)
    guest.advance(1 / 64)
    assert guest.actual == 255 * MIB
    guest.advance(1.0)
    assert guest.actual == 192 * MIB
    guest.advance(100.0)
    assert guest.actual == 128 * MIB
    assert guest.next_step_s() is None
    guest.set_target(256 * MIB)
    guest.advance(100.5)
    assert guest.actual == 192 * MIB


def test_a_target_rounds_up_to_a_page_and_is_clamped_to_the_size() -> None:
    guest = a_guest()
    guest.set_target(100 * MIB + 1)
    assert guest.target == 100 * MIB + 4096
    guest.advance(10.0)
    assert guest.actual == 100 * MIB + 4096
    guest.set_target(2**40)
    assert guest.target == 256 * MIB


def test_a_guest_gives_only_what_its_workload_does_not_hold() -> None:
    guest = a_guest()
    guest.set_demand(40 * MIB)
    guest.set_target(1)
    guest.advance(60.0)
    assert guest.actual == SPEC.base + 40 * MIB + 6 * MIB
    assert guest.available == 6 * MIB
    assert guest.oom_kills == 0


def test_nothing_moves_until_the_driver_has_loaded() -> None:
    guest = a_guest(booted=False)
    guest.set_target(128 * MIB)
    guest.advance(2.6)
    assert (guest.actual, guest.driver_loaded, guest.last_update) == (256 * MIB, False, 0)
    assert set(guest.statistics.values()) == {NOT_REPORTED}
    assert guest.next_step_s() == pytest.approx(2.7 + 1 / 64)
    guest.advance(10.0)
    assert guest.actual == 128 * MIB


def test_after_a_reset_actual_is_wrong_until_the_driver_moves_again() -> None:
    guest = a_guest()
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.reset()
    guest.advance(12.0)
    assert (guest.actual, guest.balloon) == (128 * MIB, 0)
    first_step_s = guest.next_step_s()
    assert first_step_s is not None
    assert first_step_s == pytest.approx(12.7 + 1 / 64)
    guest.advance(first_step_s)
    assert guest.actual == 255 * MIB
    guest.advance(20.0)
    assert guest.actual == 128 * MIB


def test_a_guest_whose_target_is_raised_during_a_reboot_keeps_a_wrong_actual() -> None:
    # Seen with Linux 6.1: a driver without work does not write its balloon's size.
    guest = a_guest()
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.reset()
    guest.set_target(256 * MIB)
    guest.advance(20.0)
    assert (guest.driver_loaded, guest.actual, guest.balloon) == (True, 128 * MIB, 0)


def test_a_paused_guest_does_not_change_and_continues_from_its_state() -> None:
    guest = a_guest()
    guest.set_polling_interval(1)
    guest.set_target(128 * MIB)
    guest.advance(1.0)
    guest.pause()
    guest.advance(1000.0)
    assert (guest.actual, guest.next_step_s()) == (192 * MIB, None)
    frozen = guest.last_update
    guest.resume()
    guest.advance(1001.0)
    assert guest.actual == 128 * MIB
    assert guest.last_update == frozen + 1000


def test_a_plugged_dimm_raises_size_actual_and_target() -> None:
    guest = a_guest()
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.plug(64 * MIB)
    guest.advance(20.0)
    assert (guest.size, guest.actual, guest.target) == (320 * MIB, 192 * MIB, 192 * MIB)


def test_the_driver_pushes_one_sample_when_it_loads_with_polling_off() -> None:
    guest = a_guest(booted=False)
    guest.advance(5000.9)
    assert guest.last_update == 1_700_000_002


def test_a_polling_interval_changed_from_zero_requests_a_sample_at_once() -> None:
    guest = a_guest()
    guest.advance(100.0)
    guest.set_polling_interval(5)
    guest.advance(100.003)
    assert guest.last_update == 1_700_000_100
    guest.advance(104.9)
    assert guest.last_update == 1_700_000_100
    guest.advance(105.1)
    assert guest.last_update == 1_700_000_105


def test_the_same_or_another_interval_requests_no_sample_at_once() -> None:
    guest = a_guest()
    guest.advance(1.0)
    guest.set_polling_interval(60)
    guest.advance(10.0)
    guest.set_polling_interval(60)
    guest.set_polling_interval(50)
    guest.advance(59.9)
    assert guest.last_update == 1_700_000_001
    guest.advance(60.1)
    assert guest.last_update == 1_700_000_060


def test_a_second_request_right_after_the_first_waits_for_the_interval() -> None:
    guest = a_guest()
    guest.advance(10.0)
    guest.set_polling_interval(1)
    guest.advance(10.001)
    guest.set_polling_interval(0)
    guest.set_polling_interval(1)
    guest.set_demand(20 * MIB)
    guest.advance(10.5)
    first = guest.statistics["stat-available-memory"]
    guest.set_demand(40 * MIB)
    guest.advance(10.9)
    assert guest.statistics["stat-available-memory"] == first


@pytest.mark.parametrize(("deflate_on_oom", "total"), [(False, 91 * MIB), (True, 219 * MIB)])
def test_the_total_shrinks_only_without_deflate_on_oom(deflate_on_oom: bool, total: int) -> None:
    guest = a_guest(replace(SPEC, deflate_on_oom=deflate_on_oom))
    guest.set_polling_interval(1)
    guest.set_demand(10 * MIB, cache=5 * MIB)
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    assert guest.statistics["stat-total-memory"] == total
    assert guest.statistics["stat-available-memory"] == 128 * MIB - SPEC.base - 10 * MIB
    assert guest.statistics["stat-disk-caches"] == 5 * MIB


def test_without_deflate_on_oom_a_workload_short_of_memory_is_killed_and_restarts() -> None:
    guest = a_guest()
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.set_demand(70 * MIB)
    assert (guest.oom_kills, guest.anonymous, guest.shortfall) == (1, 0, 70 * MIB)
    guest.set_target(256 * MIB)
    guest.advance(30.0)
    assert (guest.oom_kills, guest.anonymous, guest.shortfall) == (1, 70 * MIB, 0)


def test_deflate_on_oom_takes_memory_back_until_the_balloon_is_empty() -> None:
    guest = a_guest(replace(SPEC, deflate_on_oom=True))
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.set_demand(100 * MIB)
    guest.advance(20.0)
    assert (guest.oom_kills, guest.available) == (0, 7 * MIB)
    assert guest.actual == SPEC.base + 107 * MIB
    guest.set_demand(200 * MIB)
    assert (guest.oom_kills, guest.actual) == (1, 256 * MIB)


def moved_after(behaviour: Behaviour, after_s: float, **more: int) -> int:
    guest = a_guest(replace(SPEC, behaviour=behaviour, **more))  # type: ignore[arg-type]
    guest.set_target(100 * MIB)
    guest.advance(after_s)
    return 256 * MIB - guest.actual


def test_each_faulty_behaviour_moves_as_documented() -> None:
    assert moved_after(Behaviour.IDEAL, 1.0) == 64 * MIB
    assert moved_after(Behaviour.SLOW, 1.0) == 4 * MIB
    assert moved_after(Behaviour.STUCK, 1000.0) == 0
    assert moved_after(Behaviour.NO_DRIVER, 1000.0) == 0
    assert moved_after(Behaviour.INTERMITTENT, 1.0) == 64 * MIB
    assert moved_after(Behaviour.INTERMITTENT, 9.9) == 128 * MIB
    assert moved_after(Behaviour.INTERMITTENT, 20.0) == 156 * MIB
    assert moved_after(Behaviour.LIMITED, 1000.0, limit=200 * MIB) == 56 * MIB


def test_the_next_step_of_an_intermittent_guest_is_after_its_pause() -> None:
    guest = a_guest(replace(SPEC, behaviour=Behaviour.INTERMITTENT))
    guest.set_target(100 * MIB)
    guest.advance(5.0)
    assert guest.next_step_s() == pytest.approx(10.0 + 1 / 64)


@pytest.mark.parametrize(
    ("behaviour", "available"), [(Behaviour.CLAIMS_ALL, 0), (Behaviour.CLAIMS_NONE, 219 * MIB)]
)
def test_a_guest_with_false_claims_reports_false_figures(behaviour: Behaviour, available: int) -> None:
    guest = a_guest(replace(SPEC, behaviour=behaviour))
    guest.set_demand(30 * MIB)
    guest.set_polling_interval(1)
    guest.advance(5.0)
    assert guest.statistics["stat-available-memory"] == available
    assert guest.available == 256 * MIB - SPEC.base - 30 * MIB


def test_frozen_statistics_do_not_change_while_the_balloon_moves() -> None:
    guest = a_guest()
    guest.set_polling_interval(1)
    guest.advance(5.0)
    guest.set_behaviour(Behaviour.FROZEN_STATS)
    before = guest.statistics, guest.last_update
    guest.set_target(128 * MIB)
    guest.advance(50.0)
    assert (guest.statistics, guest.last_update) == before
    assert guest.actual == 128 * MIB
    guest.set_behaviour(Behaviour.IDEAL)
    guest.advance(55.0)
    assert guest.last_update > before[1]


def test_a_driver_may_be_unloaded_and_loaded() -> None:
    guest = a_guest()
    guest.set_target(128 * MIB)
    guest.advance(10.0)
    guest.set_behaviour(Behaviour.NO_DRIVER)
    assert guest.actual == 256 * MIB
    guest.advance(20.0)
    guest.set_behaviour(Behaviour.IDEAL)
    guest.advance(30.0)
    assert guest.actual == 128 * MIB


MOVES = st.lists(
    st.tuples(
        st.floats(0.0, 3.0).map(lambda passed_s: round(passed_s, 3)),
        st.integers(1, 300 * MIB),
        st.none() | st.integers(0, 200 * MIB),
    ),
    min_size=1,
    max_size=8,
)
BEHAVIOURS = st.sampled_from(Behaviour)


@given(MOVES, BEHAVIOURS, st.booleans())
def test_the_state_does_not_depend_on_how_often_a_guest_is_advanced(
    moves: list[tuple[float, int, int | None]], behaviour: Behaviour, deflate_on_oom: bool
) -> None:
    spec = replace(SPEC, behaviour=behaviour, limit=90 * MIB, deflate_on_oom=deflate_on_oom)
    rarely, often = a_guest(spec), a_guest(spec)
    now_s = 0.0
    for passed_s, target, anonymous in moves:
        for part in range(1, 8):
            often.advance(now_s + passed_s * part / 8)
        now_s += passed_s
        for guest in (rarely, often):
            guest.advance(now_s)
            guest.set_target(target)
            if anonymous is not None:
                guest.set_demand(anonymous)
        assert (rarely.actual, rarely.balloon) == (often.actual, often.balloon)
        assert (rarely.oom_kills, rarely.anonymous) == (often.oom_kills, often.anonymous)
        assert 0 <= rarely.balloon <= rarely.size


@given(MOVES, BEHAVIOURS, st.booleans())
def test_the_next_step_is_when_actual_changes_and_not_before(
    moves: list[tuple[float, int, int | None]], behaviour: Behaviour, booted: bool
) -> None:
    guest = a_guest(replace(SPEC, behaviour=behaviour, limit=90 * MIB), booted=booted)
    for passed_s, target, anonymous in moves:
        guest.advance(guest.now_s + passed_s)
        guest.set_target(target)
        if anonymous is not None:
            guest.set_demand(anonymous)
        guest.advance(guest.now_s)
        before, due_s = guest.actual, guest.next_step_s()
        if due_s is None:
            guest.advance(guest.now_s + 5.0)  # less than the restart time of a killed workload
            assert guest.actual == before
        else:
            guest.advance(due_s - 1e-4)
            assert guest.actual == before
            guest.advance(due_s + 1e-4)
            assert guest.actual != before
