"""The reason that is in force: until its cause is over, and long enough to be seen."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from qmpballoon.policy.in_force import STANDS_S, UNDER_WAY_FOR_S, Reason, given, is_over, of_mode
from qmpballoon.policy.reasons import WORDS

THEN = datetime(2026, 11, 23, 8, 31, 5, tzinfo=UTC)
LATER = THEN + timedelta(seconds=5)
GROWS = Reason("grow", "auto", THEN, 100.0, moves=True)


def over(reason: Reason | None, age_s: float, *, is_relieved: bool = True, is_at_target: bool = True) -> bool:
    given_at_s = 100.0 if reason is None else reason.given_at_s
    return is_over(reason, given_at_s + age_s, is_relieved=is_relieved, is_at_target=is_at_target)


def test_the_same_word_is_in_force_since_it_was_first_given() -> None:
    again = Reason("grow", "auto", LATER, 105.0, moves=True)
    assert given(GROWS, again) == replace(again, since=THEN)
    assert given(None, again) == again


@pytest.mark.parametrize("change", [{"why": "give"}, {"mode": "observe"}])
def test_another_word_and_another_mode_are_in_force_from_now(change: dict[str, str]) -> None:
    after = replace(GROWS, since=LATER, **change)  # type: ignore[arg-type]
    assert given(GROWS, after) is after


def test_without_a_reason_the_first_one_follows_at_once() -> None:
    assert over(None, 0.0)
    assert over(of_mode("auto", THEN, 100.0), 0.0)


def test_a_reason_stands_until_it_was_seen() -> None:
    for reason in (GROWS, replace(GROWS, why="at-ease", moves=False), replace(GROWS, why="emergency")):
        assert not over(reason, STANDS_S - 0.1)
        assert over(reason, STANDS_S)


def test_the_reason_of_a_move_stands_until_it_is_complete_or_takes_too_long() -> None:
    assert not over(GROWS, STANDS_S, is_at_target=False)
    assert over(GROWS, UNDER_WAY_FOR_S, is_at_target=False)


def test_an_emergency_is_in_force_as_long_as_it_lasts_and_no_longer() -> None:
    emergency = replace(GROWS, why="emergency")
    assert not over(emergency, 600.0, is_relieved=False)
    assert over(emergency, STANDS_S, is_at_target=False)


@pytest.mark.parametrize("mode", ["auto", "manual", "observe"])
def test_a_change_of_the_mode_has_a_documented_word(mode: str) -> None:
    reason = of_mode(mode, LATER, 105.0)
    assert (reason.mode, reason.since, reason.moves) == (mode, LATER, False)
    assert reason.why in WORDS
    assert reason.why == mode or mode == "auto"
