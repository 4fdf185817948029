"""Which guests are sampled fast, and when the next tick is."""

from __future__ import annotations

from dataclasses import replace

from qmpballoon.model.names import VmId
from qmpballoon.model.records import Figures, Sample
from qmpballoon.policy.schedule import Pace, sampling_interval_s
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.units import MIB


def a_guest(available: int = 300 * MIB, *, at_s: float = 100.0, actual: int = 512 * MIB) -> GuestSnapshot:
    return GuestSnapshot(
        vm=VmId("a"),
        life="1",
        size=1024 * MIB,
        actual=actual,
        target=None,
        floor=128 * MIB,
        ceiling=1024 * MIB,
        fresh_since_s=0.0,
        reading=Sample(Figures(available=available), at_s, actual),
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


def test_growth_is_a_rate_whatever_lies_between_two_samples() -> None:
    assert is_sampled_fast(a_guest(311 * MIB), a_guest(312 * MIB, at_s=99.8))
    assert not is_sampled_fast(a_guest(311 * MIB), a_guest(312 * MIB, at_s=98.0))


def test_a_moving_balloon_is_watched_and_one_that_does_not_follow_is_not() -> None:
    asked = replace(a_guest(), target=400 * MIB)
    assert is_sampled_fast(asked, a_guest(at_s=99.8))
    assert is_sampled_fast(replace(asked, actual=500 * MIB), replace(asked, actual=510 * MIB))
    assert not is_sampled_fast(asked, replace(asked, reading=a_guest(at_s=98.0).reading))
    assert not is_sampled_fast(replace(asked, target=512 * MIB), a_guest(at_s=99.8))


def test_a_guest_that_cannot_be_sampled_is_not_asked_more_often() -> None:
    thin = a_guest(MIB)
    assert not is_sampled_fast(replace(thin, driver_up=False), None)
    assert not is_sampled_fast(replace(thin, answers=False), None)
    assert not is_sampled_fast(replace(thin, run_state="paused"), None)


def test_ticks_come_sooner_while_somebody_moves_and_soonest_while_somebody_is_thin() -> None:
    pace = Pace(calm_tick_s=2.0, moving_tick_s=0.5, thin_tick_s=0.2)
    assert pace.tick_s(thin=False, moving=False) == 2.0
    assert pace.tick_s(thin=False, moving=True) == 0.5
    assert pace.tick_s(thin=True, moving=True) == 0.2


def test_a_guest_is_looked_at_four_times_before_a_burst_could_use_up_what_it_has() -> None:
    def interval_s(available: int) -> float:
        before = a_guest(available, at_s=98.0, actual=1024 * MIB)
        return sampling_interval_s(a_guest(available, actual=1024 * MIB), before, calm_s=2.0, fast_s=0.2)

    assert interval_s(600 * MIB) == 2.0
    assert interval_s(160 * MIB) == 1.0  # 4 s at 40 MiB/s
    assert interval_s(100 * MIB) == 0.2  # thin


def test_without_a_fast_interval_all_are_sampled_alike() -> None:
    assert sampling_interval_s(a_guest(MIB), None, calm_s=2.0, fast_s=0.0) == 2.0


def test_a_large_guest_is_looked_at_as_if_its_burst_were_larger() -> None:
    small = a_guest(320 * MIB, actual=2048 * MIB)
    large = replace(small, size=8192 * MIB)
    assert sampling_interval_s(small, small, calm_s=2.0, fast_s=0.2) == 2.0
    assert sampling_interval_s(large, large, calm_s=2.0, fast_s=0.2) == 320 / 256 / 4
