"""Pauses between the connections to one path."""

from __future__ import annotations

import pytest

from qmpballoon.agent.back_off import (
    BEHAVED_FOR_S,
    FIRST_LONG_RETRY_S,
    FIRST_RETRY_S,
    HELD_FOR_S,
    LAST_LONG_RETRY_S,
    LAST_RETRY_S,
    MOST_RENEWALS,
    RENEWAL_EVERY_S,
    BackOff,
    BackOffs,
)


class Clock:
    """Monotonic seconds that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def no_jitter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.uniform", lambda _low, high: high)


def test_pauses_grow_up_to_a_limit_and_a_long_session_makes_them_short_again() -> None:
    back_off = BackOff(Clock())
    pauses = [back_off.pause_s() for _ in range(20)]
    assert (pauses[0], pauses[1], pauses[-1]) == (FIRST_RETRY_S, 2 * FIRST_RETRY_S, LAST_RETRY_S)
    back_off.lasted(HELD_FOR_S / 2, exceeded=False)
    assert back_off.pause_s() == LAST_RETRY_S
    back_off.lasted(HELD_FOR_S + 1, exceeded=False)
    assert back_off.pause_s() == FIRST_RETRY_S


def test_what_is_no_monitor_is_left_alone_for_long_until_it_greets() -> None:
    back_off = BackOff(Clock())
    for expected in (FIRST_LONG_RETRY_S, 2 * FIRST_LONG_RETRY_S):
        back_off.foreign()
        assert back_off.pause_s() == expected
    back_off.greeted()
    assert back_off.pause_s() < LAST_RETRY_S


def test_who_sends_too_much_is_left_alone_for_long_until_it_behaves_for_some_time() -> None:
    back_off = BackOff(Clock())
    pauses = []
    for _ in range(10):
        back_off.greeted()
        back_off.lasted(HELD_FOR_S + 1, exceeded=True)
        pauses.append(back_off.pause_s())
    assert (pauses[0], pauses[-1]) == (FIRST_LONG_RETRY_S, LAST_LONG_RETRY_S)
    back_off.lasted(BEHAVED_FOR_S - 1, exceeded=False)
    assert back_off.pause_s() == LAST_LONG_RETRY_S
    back_off.renewed()
    assert back_off.waits
    back_off.lasted(BEHAVED_FOR_S + 1, exceeded=False)
    assert back_off.pause_s() == FIRST_RETRY_S
    back_off.renewed()
    assert not back_off.waits


def test_a_path_whose_socket_is_replaced_all_the_time_has_to_wait() -> None:
    clock = Clock()
    back_off = BackOff(clock)
    waits = []
    for _ in range(MOST_RENEWALS + 2):
        back_off.renewed()
        waits.append(back_off.waits)
    assert waits == [False] * MOST_RENEWALS + [True] * 2
    clock.now_s += RENEWAL_EVERY_S * 1.1
    back_off.renewed()
    assert not back_off.waits


def test_a_socket_that_is_removed_and_created_again_has_the_same_back_off() -> None:
    back_offs = BackOffs()
    first = back_offs.of_new("/run/a.qmp")
    first.lasted(1.0, exceeded=True)
    again = back_offs.of_new("/run/a.qmp")
    assert again is first
    assert again.waits
    assert not back_offs.of_new("/run/b.qmp").waits
