"""What is learned from a broker that announces nothing."""

from __future__ import annotations

import pytest

from qmpballoon.mqtt.guesses import KEPT_S, Guesses
from qmpballoon.mqtt.limits import (
    PACKET_TOO_LARGE,
    QOS_NOT_SUPPORTED,
    RECEIVE_MAXIMUM_EXCEEDED,
    RETAIN_NOT_SUPPORTED,
    SESSION_TAKEN_OVER,
    UNSPECIFIED,
    Limits,
)
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.window import Sent


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def guesses() -> Guesses:
    return Guesses(Clock())


def sent(*sizes: int, retain: bool = False) -> list[Sent]:
    return [Sent(Publication("x", dict, retain=retain), size) for size in sizes]


def test_a_reason_code_names_the_limit_which_is_forgotten_after_a_while() -> None:
    clock = Clock()
    learned = Guesses(clock)
    assert learned.refused(RETAIN_NOT_SUPPORTED)
    assert learned.refused(QOS_NOT_SUPPORTED)
    assert not learned.refused(QOS_NOT_SUPPORTED)  # no news: wait before the next attempt
    assert learned.lost(RECEIVE_MAXIMUM_EXCEEDED, sent(10), 0, alone=False)
    assert learned.lost(PACKET_TOO_LARGE, sent(100, 3000), 100, alone=False)
    assert learned.limits == Limits(1500, 10, 0, retain=False)
    clock.now_s = KEPT_S + 1
    assert learned.limits == Limits()


def test_the_message_that_was_sent_alone_shows_the_limit() -> None:
    learned = guesses()
    assert not learned.lost(UNSPECIFIED, sent(500, 6000, 500), 0, alone=False)
    assert learned.one_at_a_time
    assert learned.lost(UNSPECIFIED, sent(6000), 900, alone=True)
    assert learned.lost(UNSPECIFIED, sent(2900), 900, alone=True)
    assert learned.limits == Limits(packet=1450)
    learned.steady()
    assert not learned.one_at_a_time


def test_two_ends_with_a_larger_message_than_was_confirmed_show_its_size() -> None:
    learned = guesses()
    assert not learned.lost(UNSPECIFIED, sent(500, 6000), 900, alone=False)
    learned.steady()
    assert learned.lost(UNSPECIFIED, sent(5000, 500), 900, alone=False)
    assert learned.limits == Limits(packet=2500)


@pytest.mark.parametrize("between", ["unreachable", "confirmed"])
def test_a_broker_that_was_restarted_is_not_limited(between: str) -> None:
    learned = guesses()
    for _ in range(5):
        assert not learned.lost(UNSPECIFIED, sent(500, 6000), 900, alone=False)
        if between == "unreachable":
            learned.unreachable()
        else:
            assert not learned.lost(UNSPECIFIED, sent(500, 6000), 9000, alone=False)
    assert learned.limits == Limits()


def test_ends_that_are_not_about_a_message_show_nothing() -> None:
    learned = guesses()
    for _ in range(5):
        assert not learned.lost(SESSION_TAKEN_OVER, sent(10_000), 10, alone=True)
        assert not learned.lost(UNSPECIFIED, [], 10, alone=False)
    assert learned.limits == Limits()


def test_where_nothing_small_is_confirmed_retain_and_then_qos_are_given_up() -> None:
    learned = guesses()
    found = [learned.lost(UNSPECIFIED, sent(60, retain=True), 0, alone=True) for _ in range(2)]
    assert found == [False, True]
    assert learned.limits == Limits(retain=False)
    for _ in range(2):
        learned.lost(UNSPECIFIED, sent(60), 0, alone=True)
    assert learned.limits == Limits(qos=0, retain=False)


def test_other_wills_are_tried_and_the_usual_one_again_before_one_is_kept() -> None:
    learned = guesses()
    tried = [learned.limits]
    while learned.closed_early():
        tried.append(learned.limits)
    assert tried == [Limits(), Limits(retain=False), Limits(qos=0), Limits(qos=0, retain=False)]
    assert learned.limits == Limits()
    assert learned.closed_early()
    assert not learned.established()  # without retain; the usual will is tried again
    assert learned.limits == Limits()
    assert learned.closed_early()
    assert learned.limits == Limits(retain=False)
    assert learned.established()
    assert learned.limits == Limits(retain=False)


def test_a_proxy_whose_broker_was_down_costs_no_retained_messages() -> None:
    learned = guesses()
    assert learned.closed_early()
    assert not learned.established()
    assert learned.established()
    assert learned.limits == Limits()
