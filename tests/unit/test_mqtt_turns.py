"""Fair turns: groups, members, shares; the inbox and the answers that stand on them."""

from __future__ import annotations

from qmpballoon.mqtt import inbox as inbox_module
from qmpballoon.mqtt.answers import ANSWER_KEPT_S, MOST_ANSWERS, Answer, Answers
from qmpballoon.mqtt.commands import LONGEST_CORRELATION, LONGEST_RESPONSE_TOPIC, Message
from qmpballoon.mqtt.inbox import MOST_BYTES, MOST_MESSAGES, Inbox
from qmpballoon.mqtt.turns import Turns
from qmpballoon.protocol.payloads import LARGEST_REQUEST


def test_groups_have_turns_and_so_have_their_members() -> None:
    turns: Turns[str] = Turns()
    for number in range(4):
        turns.put("web1", "flood", f"f{number}")
    turns.put("web1", "other", "o")
    turns.put("web2", "victim", "v")
    assert len(turns) == 6
    assert list(iter(turns.take, None)) == ["f0", "v", "o", "f1", "f2", "f3"]
    assert len(turns) == 0


def inbox(dropped: list[int]) -> Inbox:
    return Inbox(lambda topic: topic.partition("/")[0], lambda: dropped.append(1))


def test_a_flood_fills_the_inbox_and_another_vm_still_finds_room() -> None:
    dropped: list[int] = []
    box = inbox(dropped)
    for number in range(MOST_MESSAGES + 500):
        box.put(Message("web1/get", b"%d" % number))
    assert len(dropped) == 500
    box.put(Message("web2/get", b"victim"))
    assert len(dropped) == 500
    taken = [one.payload for one in iter(box.take, None)]
    assert taken[1] == b"victim"
    assert taken[:1] + taken[2:] == [b"%d" % number for number in range(MOST_MESSAGES)]


def test_the_inbox_is_bounded_in_bytes_whatever_is_sent() -> None:
    dropped: list[int] = []
    box = inbox(dropped)
    large = b"x" * LARGEST_REQUEST
    for number in range(2000):
        box.put(Message(f"vm{number % 40}/get", large))
    assert dropped
    assert sum(len(one.payload) for one in iter(box.take, None)) <= 2 * MOST_BYTES + LARGEST_REQUEST
    assert box._bytes == 0


def test_what_is_too_long_is_cut_and_is_still_too_long() -> None:
    box = inbox([])
    box.put(Message("a", b"x" * 10**6, response_topic="t" * 10**5, correlation=b"c" * 10**5))
    taken = box.take()
    assert taken is not None
    assert len(taken.payload) == LARGEST_REQUEST + 1
    assert len(taken.response_topic or "") == LONGEST_RESPONSE_TOPIC + 1
    assert len(taken.correlation or b"") == LONGEST_CORRELATION + 1
    assert box._bytes == 0
    assert inbox_module.MOST_MESSAGES >= 3000  # a burst of so many requests is answered


def answer(value: str, *, group: str = "", topic: str = "t", made_at_s: float = 0.0) -> Answer:
    return Answer(topic, {"result": value}, "json", None, made_at_s, made_at_s, "own", group)


def values(answers: Answers) -> list[object]:
    return [one.value["result"] for one in iter(answers.take, None)]


def test_answers_to_one_asker_do_not_delay_those_to_others() -> None:
    answers = Answers()
    for number in range(3):
        answers.put(answer(f"f{number}", group="web1", topic="flood"))
    answers.put(answer("v", group="web2"))
    answers.put(answer("o", group="web1", topic="other"))
    assert values(answers) == ["f0", "v", "o", "f1", "f2"]


def test_answers_are_full_at_a_bound_and_nothing_is_dropped() -> None:
    answers = Answers()
    for number in range(MOST_ANSWERS + 5):
        assert answers.is_full is (number >= MOST_ANSWERS)
        answers.put(answer(str(number)))
    assert len(values(answers)) == MOST_ANSWERS + 5


def test_a_lost_answer_is_sent_first_and_is_uncertain() -> None:
    answers = Answers()
    answers.put(answer("new"))
    answers.lost([answer("a"), answer("b")])
    assert answers.next_is_uncertain
    assert [answers.take(), answers.take()] == [
        Answer("t", {"result": name}, "json", None, 0.0, 0.0, "own", times_lost=1) for name in ("a", "b")
    ]
    assert not answers.next_is_uncertain
    assert values(answers) == ["new"]


def test_an_answer_that_nobody_received_is_sent_again_until_its_time_is_over() -> None:
    answers, now_s, times = Answers(), 10.0, 0
    waiting: Answer | None = answer("a", made_at_s=10.0)
    while waiting is not None and answers.unheard(waiting, now_s):
        assert answers.take() is None
        assert answers.next_later_s is not None
        now_s = answers.next_later_s
        answers.wake(now_s)
        waiting = answers.take()
        times += 1
    assert 5 <= times <= 12
    assert 10.0 + ANSWER_KEPT_S / 2 < now_s <= 10.0 + ANSWER_KEPT_S


def test_answers_that_were_put_off_keep_their_order() -> None:
    answers = Answers()
    for name in ("a", "b", "c"):
        answers.put(answer(name))
    answers.put_off_all(5.0)
    answers.wake(4.9)
    assert len(answers) == 0
    answers.wake(5.0)
    assert values(answers) == ["a", "b", "c"]


def test_the_pauses_start_again_with_a_connection() -> None:
    answers = Answers()
    again = answer("a")
    for _ in range(4):
        assert answers.unheard(again, 0.0)
        answers.wake_all()
        again = answers.take() or again
    assert again.times_unheard == 4
    assert answers.unheard(again, 0.0)
    assert answers.drop_old(10.0) == 0
    resumed = answers.take()
    assert resumed == answer("a")
