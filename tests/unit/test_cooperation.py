"""Every case of trouble with a balloon, told apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from policy_makers import a_guest

from qmpballoon.model.records import GuestStats
from qmpballoon.policy.cooperation import Cooperation, Judgement, Safeties, judge
from qmpballoon.policy.snapshot import GuestSnapshot
from qmpballoon.units import MIB

ALL = Safeties()


class Watched:
    """A guest that is judged every second."""

    def __init__(self, guest: GuestSnapshot, safeties: Safeties = ALL) -> None:
        self.guest = guest
        self.now_s = 100.0
        self.state: Cooperation | None = None
        self.safeties = safeties

    def after(self, seconds: int, *, fresh: bool = True, **changes: object) -> Judgement:
        for _ in range(seconds):
            self.now_s += 1
            self.guest = replace(self.guest, **changes)  # type: ignore[arg-type]
            if fresh and self.guest.sample is not None:
                sample = replace(self.guest.sample, seen_at_s=self.now_s, actual=self.guest.actual)
                self.guest = replace(self.guest, sample=sample)
            self.state, judgement = judge(
                self.state, self.guest, self.now_s, stale_before_s=0.0, safeties=self.safeties
            )
        return judgement


def test_a_guest_that_is_well_may_be_moved_as_the_policy_wants() -> None:
    assert Watched(a_guest()).after(30) == Judgement()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"answers": False}, "silent"),
        ({"migrating": True}, "migrating"),
        ({"run_state": "paused"}, "paused"),
        ({"driver_up": False}, "booting"),
    ],
)
def test_a_guest_that_cannot_or_must_not_move_is_left_alone(changes: dict[str, object], why: str) -> None:
    judgement = Watched(replace(a_guest(), **changes)).after(1)  # type: ignore[arg-type]
    assert (judgement.why, judgement.may_shrink, judgement.may_grow) == (why, False, False)


def test_a_guest_just_booted_may_grow_and_not_shrink() -> None:
    judgement = Watched(a_guest(fresh_since_s=99.0)).after(1)
    assert (judgement.why, judgement.may_shrink, judgement.may_grow) == ("grace", False, True)


def test_stale_figures_forbid_a_shrink_and_long_stale_ones_say_nothing_at_all() -> None:
    watched = Watched(a_guest())
    assert watched.after(5, fresh=False) == Judgement()
    assert watched.after(3, fresh=False) == Judgement("stale", may_shrink=False)
    assert watched.after(30, fresh=False) == Judgement("long-stale", may_shrink=False, proportional=True)


AWAITS = Judgement("awaits-figures", may_shrink=False, awaits=True)
LONG_STALE = Judgement("long-stale", may_shrink=False, proportional=True)


@pytest.mark.parametrize("changes", [{}, {"target": 700 * MIB}, {"deflate_on_oom": True}])
def test_a_guest_awaits_its_first_figures_for_half_a_minute_of_observation(
    changes: dict[str, Any],
) -> None:
    watched = Watched(a_guest(actual=512, available=None))
    assert watched.after(1, **changes) == AWAITS
    assert watched.after(30) == AWAITS
    assert watched.after(1) == LONG_STALE
    assert watched.after(1, sample=a_guest(actual=512).sample).why is None


@pytest.mark.parametrize(
    "unseen", [{"answers": False}, {"run_state": "paused"}, {"migrating": True}, {"driver_up": False}]
)
def test_a_guest_that_could_not_be_observed_awaits_figures_anew(unseen: dict[str, Any]) -> None:
    for sample in (None, a_guest().sample):  # a new session has none; after a pause there are old ones
        watched = Watched(replace(a_guest(), sample=sample))
        watched.after(5, fresh=False)
        watched.after(100, fresh=False, **unseen)
        seen: dict[str, Any] = {"answers": True, "run_state": "running", "migrating": False}
        assert watched.after(31, fresh=False, driver_up=True, **seen) == AWAITS
        assert watched.after(1, fresh=False) == LONG_STALE


def test_the_time_in_which_the_agent_was_stopped_is_no_observation() -> None:
    guest = a_guest(available=None)
    state, _ = judge(None, guest, 100.0, stale_before_s=0.0, safeties=ALL)
    state, judgement = judge(state, guest, 200.0, stale_before_s=200.0, safeties=ALL)
    assert judgement == AWAITS
    _, judgement = judge(state, guest, 230.1, stale_before_s=200.0, safeties=ALL)
    assert judgement == LONG_STALE


def test_a_booted_guest_without_figures_is_in_its_grace_time_and_awaits_them() -> None:
    watched = Watched(a_guest(available=None, fresh_since_s=None))
    assert watched.after(1) == Judgement("grace", may_shrink=False, awaits=True)


def test_after_a_late_tick_figures_from_before_it_move_nothing() -> None:
    guest = a_guest(seen_at_s=99.0)
    _, judgement = judge(None, guest, 100.0, stale_before_s=99.5, safeties=ALL)
    assert judgement == AWAITS
    _, judgement = judge(None, guest, 100.0, stale_before_s=99.5, safeties=replace(ALL, late_ticks=False))
    assert judgement == Judgement()


def test_a_guest_with_nothing_left_is_not_stuck() -> None:
    watched = Watched(a_guest(actual=512, available=30))
    watched.after(1)
    judgement = watched.after(6, target=400 * MIB)
    assert (judgement.why, judgement.set_back, judgement.health) == ("nothing-left", True, None)


def test_a_guest_that_claims_plenty_and_gives_none_is_contradicted_for_a_minute() -> None:
    watched = Watched(a_guest(actual=512, available=400))
    watched.after(1)
    judgement = watched.after(6, target=400 * MIB)
    assert (judgement.why, judgement.proportional, judgement.may_shrink) == ("contradicted", True, False)
    assert judgement.health == "untrusted"
    assert watched.after(50, target=512 * MIB).why == "contradicted"
    assert watched.after(15).why == "probe"


def test_a_stuck_guest_is_set_back_left_alone_probed_and_at_last_called_uncooperative() -> None:
    watched = Watched(a_guest(actual=512, available=100))
    watched.after(1)
    judgement = watched.after(6, target=400 * MIB)
    assert (judgement.why, judgement.set_back, judgement.health) == ("stuck", True, "stuck")
    assert watched.after(4, target=512 * MIB).why == "backs-off"
    judgement = watched.after(3)
    assert (judgement.why, judgement.probe, judgement.may_grow) == ("probe", True, True)
    watched.after(6, target=500 * MIB)
    assert watched.after(8, target=512 * MIB).health == "uncooperative"


def test_a_stuck_guest_that_moves_again_is_forgiven() -> None:
    watched = Watched(a_guest(actual=512, available=100))
    watched.after(1)
    watched.after(6, target=400 * MIB)
    watched.after(12, target=512 * MIB)
    watched.after(1, target=500 * MIB)
    assert watched.after(1, actual=500 * MIB) == Judgement()


def test_slow_progress_is_progress() -> None:
    watched = Watched(a_guest(actual=512, available=400))
    watched.after(1)
    for step in range(20):
        assert watched.after(1, target=400 * MIB, actual=(510 - 2 * step) * MIB).why is None


def test_somebody_elses_hand_on_the_balloon_stops_ours() -> None:
    watched = Watched(a_guest(actual=512, available=300))
    watched.after(1)
    watched.after(2, target=500 * MIB, actual=500 * MIB)
    assert watched.after(1, actual=350 * MIB).why == "foreign-hand"
    assert watched.after(30).may_grow is False
    assert watched.after(40).why is None


def test_a_driver_that_goes_is_nobodys_hand() -> None:
    watched = Watched(a_guest(actual=512, available=300))
    watched.after(1)
    watched.after(2, target=500 * MIB, actual=500 * MIB)
    assert watched.after(1, actual=1024 * MIB).why == "foreign-hand"  # it looks so until the driver is asked
    assert watched.after(1, driver_up=False).why == "booting"
    assert watched.after(1, driver_up=True).why is None


def test_plugged_memory_is_nobodys_hand() -> None:
    watched = Watched(a_guest(actual=512, available=300))
    watched.after(1)
    watched.after(2, target=500 * MIB, actual=500 * MIB)
    assert watched.after(20, fresh=True).why is None
    assert watched.after(1, actual=756 * MIB).why == "foreign-hand"  # as it seems until the size is known
    assert watched.after(1, size=1280 * MIB, target=756 * MIB).why is None


def test_deflate_on_oom_is_nobodys_hand() -> None:
    watched = Watched(a_guest(actual=512, available=300, deflate_on_oom=True))
    watched.after(1)
    watched.after(2, target=500 * MIB, actual=500 * MIB)
    assert watched.after(1, actual=600 * MIB).why is None


def test_a_gift_that_the_host_never_sees_is_contradicted_by_rss() -> None:
    watched = Watched(a_guest(actual=512, available=300, rss=560 * MIB))
    watched.after(1)
    watched.after(1, target=412 * MIB)
    judgement = watched.after(20, actual=412 * MIB)
    assert (judgement.why, judgement.health) == ("untrusted", "untrusted")
    assert judgement.charge == (560 - 128) * MIB
    assert watched.after(1, rss=460 * MIB).health is None


def test_rss_that_never_told_anything_contradicts_nobody() -> None:
    watched = Watched(a_guest(actual=512, available=300, rss=560 * MIB, rss_is_complete=False))
    watched.after(1)
    watched.after(1, target=412 * MIB)
    assert watched.after(20, actual=412 * MIB).health is None


def test_a_new_life_starts_without_a_record() -> None:
    watched = Watched(a_guest(actual=512, available=100))
    watched.after(1)
    watched.after(6, target=400 * MIB)
    assert watched.after(1, life="2-2", target=None).why is None


def test_a_guest_that_gives_again_and_again_is_checked_by_rss_all_the_same() -> None:
    watched = Watched(a_guest(size=4096, actual=4000, available=3000, rss=4300 * MIB))
    for actual in range(4000, 3500, -50):
        watched.after(1, target=(actual - 50) * MIB)
        judgement = watched.after(3, actual=(actual - 50) * MIB)
    assert judgement.health == "untrusted"


def test_a_grant_that_does_not_come_is_set_back_and_only_emergencies_are_granted_anything() -> None:
    watched = Watched(a_guest(actual=512, available=40))
    watched.after(1)
    assert watched.after(5, target=700 * MIB) == Judgement()
    judgement = watched.after(1)
    assert (judgement.why, judgement.health, judgement.set_back) == ("stuck", "stuck", True)
    assert (judgement.may_grow, judgement.emergency_only) == (True, True)
    hung = Watched(a_guest(actual=512, available=40))
    hung.after(1)
    hung.after(6, fresh=False, target=700 * MIB)
    judgement = hung.after(2, fresh=False, target=512 * MIB)  # its figures stopped with its balloon
    assert (judgement.why, judgement.emergency_only) == ("stale", True)
    judgement = watched.after(4, target=512 * MIB)
    assert (judgement.why, judgement.emergency_only) == ("backs-off", True)
    watched.after(10, target=524 * MIB)
    assert watched.after(10).health == "uncooperative"
    assert watched.after(1, actual=520 * MIB) == Judgement()


def test_a_target_that_somebody_changed_meanwhile_is_no_jam() -> None:
    watched = Watched(a_guest(actual=512, available=300))
    watched.after(1)
    watched.after(2, target=500 * MIB, actual=500 * MIB)
    watched.after(70, actual=350 * MIB)  # another hand's, for a minute
    assert watched.after(10) == Judgement()


def test_a_claim_that_rss_refutes_for_long_is_reported_and_the_guest_may_still_be_moved() -> None:
    watched = Watched(a_guest(size=1024, available=0, rss=200 * MIB))
    assert watched.after(10) == Judgement()
    assert watched.after(10) == Judgement(refuted=True)
    assert watched.after(1, rss=1024 * MIB) == Judgement()


def test_a_guest_that_does_not_report_what_it_has_left_gives_nothing_and_may_grow_to_an_equal_part() -> None:
    guest = a_guest()
    assert guest.sample is not None
    silent = replace(guest, sample=replace(guest.sample, stats=GuestStats(total=512 * MIB)))
    assert Watched(silent).after(60) == Judgement("figures-missing", may_shrink=False, proportional=True)
