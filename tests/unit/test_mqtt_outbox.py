"""Messages that wait to be sent: newest wins, bounded, current values."""

from __future__ import annotations

from qmpballoon.mqtt.answers import ANSWER_KEPT_S, Answer
from qmpballoon.mqtt.outbox import (
    ANSWERS_IN_A_ROW,
    CHANGES_IN_A_ROW,
    MOST_EVENTS,
    REPEATS_AT_ONCE,
    REPEATS_PER_S,
    Outbox,
    Pace,
    Publication,
    Rank,
)


def outbox() -> Outbox:
    return Outbox(lambda: None, "status")


def drained(box: Outbox) -> list[Publication]:
    return list(iter(box.take, None))


def sent(box: Outbox) -> list[tuple[str, object]]:
    return [(one.topic, value_of(one)) for one in drained(box)]


def value_of(publication: Publication) -> object:
    if publication.answer is not None:
        return publication.answer.value["result"]
    return publication.make() if publication.make else None


def answer(value: object, made_at_s: float = 0.0, topic: str = "reply") -> Answer:
    return Answer(topic, {"result": value}, "json", None, made_at_s, made_at_s, "own")


def test_the_newest_value_of_a_topic_is_sent_once_and_status_last() -> None:
    box = outbox()
    box.connected()
    box.retain("status", lambda: "online")
    box.retain("a", lambda: 1)
    box.retain("b", lambda: 2)
    box.retain("a", lambda: 3)
    assert sent(box) == [("a", 3), ("b", 2), ("status", "online")]
    assert sent(box) == []


def test_everything_retained_is_due_again_on_a_connect() -> None:
    box = outbox()
    box.retain("status", lambda: "online")
    box.retain("a", lambda: 1)
    box.connected()
    assert len(drained(box)) == 2
    box.disconnected([])
    box.retain("b", lambda: 2)
    box.connected()
    assert sent(box) == [("a", 1), ("b", 2), ("status", "online")]


def test_events_and_samples_of_an_outage_are_not_sent_after_it() -> None:
    box = outbox()
    box.event("event", lambda: 1)
    box.connected()
    assert sent(box) == []
    box.event("event", lambda: 2)
    box.sample("samples", lambda: 3)
    box.disconnected([])
    box.connected()
    assert sent(box) == []


def test_events_are_bounded_and_the_oldest_is_dropped() -> None:
    box = outbox()
    box.connected()
    for number in range(MOST_EVENTS + 5):
        box.event("event", lambda number=number: number)  # type: ignore[misc]
    values = [value for _, value in sent(box)]
    assert values == list(range(5, MOST_EVENTS + 5))


def test_a_newer_sample_replaces_one_that_was_not_sent() -> None:
    box = outbox()
    box.connected()
    box.sample("samples", lambda: 1)
    box.sample("samples", lambda: 2)
    publications = drained(box)
    assert [(one.qos, one.make() if one.make else None) for one in publications] == [(0, 2)]


def test_a_clear_is_repeated_until_the_broker_confirms_it() -> None:
    box = outbox()
    box.retain("a", lambda: 1)
    box.connected()
    assert sent(box) == [("a", 1)]
    box.clear("a")
    (cleared,) = drained(box)
    assert (cleared.topic, cleared.make, cleared.retain) == ("a", None, True)
    box.disconnected([cleared])
    box.connected()
    (again,) = drained(box)
    assert box.confirmed(again)
    assert "a" not in box.topics
    box.connected()
    assert drained(box) == []


def test_a_topic_that_is_retained_again_meanwhile_is_kept() -> None:
    box = outbox()
    box.connected()
    box.clear("a")
    (cleared,) = drained(box)
    box.retain("a", lambda: 1)
    assert not box.confirmed(cleared)
    assert sent(box) == [("a", 1)]


def test_answers_are_kept_over_a_short_outage_in_order_and_dropped_after_a_long_one() -> None:
    box = outbox()
    box.connected()
    box.answer(answer("first", 1.0))
    box.answer(answer("second", 2.0))
    lost = drained(box)
    box.disconnected(lost)
    box.answer(answer("third", 10.0))
    assert box.answers.drop_old(ANSWER_KEPT_S + 1.5) == 1
    box.connected()
    assert [value for _, value in sent(box)] == ["second", "third"]


def test_answers_and_events_pass_the_states_of_a_thousand_vms() -> None:
    box = outbox()
    box.connected()
    for number in range(1000):
        box.retain(f"vm{number}", lambda number=number: number)  # type: ignore[misc]
    assert [taken.topic for taken in (box.take(), box.take()) if taken] == ["vm0", "vm1"]
    box.event("event", lambda: "e")
    box.answer(answer("a"))
    assert sent(box)[:3] == [("reply", "a"), ("event", "e"), ("vm2", 2)]


def test_a_change_passes_the_repetitions_of_a_thousand_vms_and_is_sent_once() -> None:
    box = outbox()
    box.retain("status", lambda: "online")
    for number in range(1000):
        box.retain(f"vm{number}", lambda number=number: number)  # type: ignore[misc]
    box.connected()
    drained(box)
    box.connected()
    first = box.take()
    assert first is not None
    assert first.is_repeat
    box.retain("vm500", lambda: "new")
    box.clear("vm600")
    topics = [one.topic for one in drained(box)]
    assert topics[:3] == ["vm500", "vm600", "vm1"]
    assert topics[-1] == "status"
    assert len(topics) == len(set(topics)) == 1000


def test_what_is_last_passes_no_change_and_who_is_there_comes_first_on_a_connect() -> None:
    box = outbox()
    box.connected()
    drained(box)
    box.retain("device", lambda: "first", rank=Rank.LAST)
    box.retain("a", lambda: 1)
    box.event("e", lambda: "event")
    box.retain("b", lambda: "online", rank=Rank.FIRST)
    assert sent(box) == [("b", "online"), ("e", "event"), ("a", 1), ("device", "first")]
    box.retain("device", lambda: "second", rank=Rank.LAST)
    box.retain("a", lambda: 2)
    assert sent(box) == [("a", 2), ("device", "second")]
    box.retain("a", lambda: 3)
    box.connected()
    assert [topic for topic, _ in sent(box)] == ["b", "a", "device"]
    for topic in ("device", "b", "a"):
        box.clear(topic)
    assert sent(box) == [("device", None), ("b", None), ("a", None)]


def test_what_was_never_sent_is_forgotten_and_not_cleared_unless_an_earlier_run_may_have_sent_it() -> None:
    box = Outbox(lambda: None, "status", frozenset(["old"]))
    for topic in ("a", "old", "sent", "device"):
        box.retain(topic, lambda: 1, rank=Rank.LAST if topic == "device" else Rank.USUAL)
    assert [box.clear(topic) for topic in ("a", "old", "device")] == [False, True, False]
    assert set(box.topics) == {"old", "sent"}
    box.connected()
    assert sent(box) == [("old", None), ("sent", 1)]
    box.disconnected([])
    assert box.clear("sent")
    box.retain("new", lambda: 1, rank=Rank.FIRST)
    assert not box.clear("new")
    box.connected()
    assert sent(box) == [("old", None), ("sent", None)]


def test_changes_that_never_cease_do_not_hold_back_what_is_last() -> None:
    box = outbox()
    box.connected()
    box.retain("device", lambda: "here", rank=Rank.LAST)
    taken: list[str] = []
    while "device" not in taken:
        for topic in ("a", "b"):
            box.retain(topic, lambda: 1)
        publication = box.take()
        assert publication is not None
        taken.append(publication.topic)
    assert len(taken) == CHANGES_IN_A_ROW + 1


def test_a_device_that_is_removed_goes_before_what_it_reads_on_a_connect_as_well() -> None:
    box = outbox()
    for topic, rank in (("a", Rank.FIRST), ("s", Rank.USUAL), ("device", Rank.LAST)):
        box.retain(topic, lambda: 1, rank=rank)
    box.connected()
    drained(box)
    for topic in ("device", "a", "s"):
        box.clear(topic)
    box.connected()
    assert sent(box) == [("device", None), ("a", None), ("s", None)]


def test_repetitions_that_are_held_back_delay_neither_changes_nor_samples_but_the_last_topic() -> None:
    box = outbox()
    box.retain("status", lambda: "online")
    box.retain("a", lambda: 1)
    box.connected()
    box.retain("b", lambda: 2)
    box.sample("samples", lambda: 3)
    assert [one.topic for one in iter(lambda: box.take(repeats=False), None)] == ["b", "samples"]
    assert box.has_repeats
    assert sent(box) == [("a", 1), ("status", "online")]
    assert not box.has_repeats


def test_a_topic_that_the_broker_cleared_is_not_repeated() -> None:
    box = outbox()
    box.connected()
    box.clear("a")
    (cleared,) = drained(box)
    box.republish()
    assert box.confirmed(cleared)
    assert drained(box) == []


def allowed(pace: Pace, now_s: float) -> int:
    number = 0
    while pace.allows(now_s):
        pace.count()
        number += 1
    return number


def test_repetitions_have_a_pace_after_a_first_burst() -> None:
    pace = Pace()
    assert allowed(pace, 10.0) == REPEATS_AT_ONCE
    assert allowed(pace, 10.0) == 0
    assert allowed(pace, 10.1) in (round(REPEATS_PER_S / 10) - 1, round(REPEATS_PER_S / 10))
    assert allowed(pace, 1000.0) == REPEATS_AT_ONCE


def test_retained_topics_that_are_held_back_stay_due_in_order_and_delay_nothing_else() -> None:
    box = outbox()
    box.retain("status", lambda: "online")
    box.retain("a", lambda: 1)
    box.connected()
    box.event("event", lambda: 2)
    box.sample("samples", lambda: 3)
    taken = list(iter(lambda: box.take(retained=False), None))
    assert [one.topic for one in taken] == ["event", "samples"]
    assert sent(box) == [("a", 1), ("status", "online")]


def test_answers_are_sent_first_and_can_be_taken_alone() -> None:
    box = outbox()
    box.connected()
    box.retain("a", lambda: 1)
    box.answer(answer("first"))
    taken = box.take_answer()
    assert taken is not None
    assert taken.topic == "reply"
    assert box.take_answer() is None
    assert sent(box) == [("a", 1)]


def test_a_flood_of_answers_does_not_hold_back_the_state() -> None:
    box = outbox()
    box.connected()
    for number in range(3 * ANSWERS_IN_A_ROW):
        box.answer(answer(number))
    box.retain("a", lambda: "a")
    box.event("event", lambda: "e")
    values = [value for _, value in sent(box)]
    assert values[ANSWERS_IN_A_ROW] == "e"
    assert values[2 * ANSWERS_IN_A_ROW + 1] == "a"
    assert [one for one in values if isinstance(one, int)] == list(range(3 * ANSWERS_IN_A_ROW))
