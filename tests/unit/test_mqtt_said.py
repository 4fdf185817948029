"""What was said is remembered, said again, and corrected with pauses."""

from __future__ import annotations

import pytest

from qmpballoon.mqtt.said import FIRST_PAUSE_S, LONGEST_PAUSE_S, MOST_FOREIGN, Said


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_record(*, echoes: bool = False) -> tuple[Said, Clock]:
    clock = Clock()
    said = Said(clock)
    said.connected(echoes=echoes)
    return said, clock


def test_a_value_that_is_not_ours_is_to_be_said_again_and_ours_is_not() -> None:
    said, _ = a_record()
    said.said("a", b"1")
    assert not said.heard("a", b"1")
    assert said.heard("a", b"2")
    assert not said.heard("b", b"2")  # nothing was said there yet


def test_what_comes_back_of_our_own_is_no_change_however_late() -> None:
    said, _ = a_record(echoes=True)
    for payload in (b"1", b"2", b"3"):
        said.said("a", payload)
    assert [said.heard("a", payload) for payload in (b"1", b"2", b"3")] == [False] * 3
    assert said.heard("a", b"2")  # once more: somebody brought it back


@pytest.mark.parametrize("answers", [b"x", b""])
def test_two_who_contradict_each_other_say_it_more_and_more_seldom(answers: bytes) -> None:
    said, clock = a_record()
    said.said("a", b"1")
    corrections = 0
    for _ in range(6000):  # ten minutes; each correction is overwritten at once
        if said.heard("a", answers) or said.due(1e9) == ["a"]:
            corrections += 1
            said.said("a", b"1")
        clock.now_s += 0.1
    assert 10 <= corrections <= 16
    clock.now_s += 10 * LONGEST_PAUSE_S
    assert said.heard("a", answers)
    said.said("a", b"1")
    clock.now_s += FIRST_PAUSE_S
    assert said.heard("a", answers)  # the pauses began again


def test_a_correction_that_waits_is_made_after_the_pause_unless_it_is_right_by_then() -> None:
    said, clock = a_record()
    said.said("a", b"1")
    said.said("b", b"1")
    for topic in ("a", "b"):
        assert said.heard(topic, b"x")
        said.said(topic, b"1")
        assert not said.heard(topic, b"y")
    said.said("b", b"2")
    assert said.due(1e9) == []
    clock.now_s += FIRST_PAUSE_S
    assert said.due(1e9) == ["a"]
    assert said.due(1e9) == []


def test_what_was_not_said_for_a_heartbeat_is_due() -> None:
    said, clock = a_record()
    said.said("a", b"1")
    said.said("b", b"1")
    clock.now_s = 30.0
    said.said("a", b"1")
    clock.now_s = 60.0
    assert said.due(60.0) == ["b"]
    said.forget("b")
    assert said.due(60.0) == []


def test_foreign_topics_are_cleared_once_in_a_while_and_not_too_many() -> None:
    said, clock = a_record()
    assert [said.is_news("x"), said.is_news("x")] == [True, False]
    assert sum(said.is_news(str(number)) for number in range(2 * MOST_FOREIGN)) == MOST_FOREIGN - 1
    clock.now_s = LONGEST_PAUSE_S + 1
    assert said.is_news("x")
