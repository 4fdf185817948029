"""Messages that wait to be published. No I/O.

Retained topics are slots: a topic has one maker, called at the moment of sending. So the newest value
wins, ages are right, and after an outage of the broker the current state is published. Events and
samples are dropped without a connection. Answers are kept over a short outage, because their requester
waits for them. Every queue is bounded.

Changes are sent before repetitions, which are paced: mosquitto drops what a slow subscriber has not
confirmed beyond 1000 messages, and after a connect all topics are repeated at once (seen with 1000 VMs: a
subscriber that needs 1 ms for a message lost 772 of 2002).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Final, TypeAlias

from qmpballoon.mqtt.answers import Answer, Answers

Make: TypeAlias = Callable[[], object]
"""Returns a topic's current value: an object of JSON values, or a bare word as text."""

MOST_EVENTS: Final = 1000  # about 300 bytes each
REPEATS_AT_ONCE: Final = 600
REPEATS_PER_S: Final = 1000.0
ANSWERS_IN_A_ROW: Final = 8  # then one other message: a flood of requests must not hold back all state
CHANGES_IN_A_ROW: Final = 32  # then one repetition: over a slow connection changes may never cease
_BEFORE_ALL: Final = -1


class Rank(IntEnum):
    """Which retained topics are sent first, of those that changed and of those that are repeated."""

    FIRST = 0  # who is there; changes before events, too
    USUAL = 1
    LAST = 2  # when few changes of other topics wait, and paced as repetitions; removed first


@dataclass(frozen=True, slots=True)
class Publication:
    """One message to be sent; ``make`` None clears a retained topic, or ``answer`` has the value."""

    topic: str
    make: Make | None
    qos: int = 1
    retain: bool = False
    answer: Answer | None = None
    is_repeat: bool = False
    is_sample: bool = False  # without a connection, or over a slow one, it is left out

    @property
    def is_uncertain(self) -> bool:
        """Whether it is an answer that was being sent when a connection broke: it is sent alone."""
        return self.answer is not None and self.answer.times_lost > 0


@dataclass(slots=True)
class Pace:
    """Allows REPEATS_AT_ONCE repetitions, and REPEATS_PER_S from then on; times are monotonic."""

    _left: float = REPEATS_AT_ONCE
    _filled_at_s: float | None = None

    def allows(self, now_s: float) -> bool:
        """Tell whether one more may be sent now."""
        if self._filled_at_s is not None:
            self._left = min(REPEATS_AT_ONCE, self._left + (now_s - self._filled_at_s) * REPEATS_PER_S)
        self._filled_at_s = now_s
        return self._left >= 1

    def count(self) -> None:
        """Note that one was sent."""
        self._left -= 1


@dataclass(slots=True)
class Outbox:
    """Slots and queues between the agent and a connection; ``changed`` is called when something is due."""

    changed: Callable[[], None]
    last: str  # the retained topic that is sent after all others
    before: frozenset[str] = frozenset()  # topics that an earlier run may have retained
    answers: Answers = field(default_factory=Answers)
    _connected: bool = False
    _slots: dict[str, Make | None] = field(default_factory=dict)
    _ranks: dict[str, Rank] = field(default_factory=dict)
    _unsent: set[str] = field(default_factory=set)  # new topics: the broker has nothing of them
    _due: OrderedDict[str, None] = field(default_factory=OrderedDict)  # a dict is slow at removing its first
    _first_due: OrderedDict[str, None] = field(default_factory=OrderedDict)  # no topic is in two of these
    _repeats: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _changes_in_a_row: int = 0
    _last_due: bool = False
    _answers_in_a_row: int = 0
    _events: deque[Publication] = field(default_factory=deque)
    _samples: dict[str, Make] = field(default_factory=dict)

    @property
    def topics(self) -> Iterable[str]:
        """The retained topics that have a value or are being cleared."""
        return self._slots.keys()

    @property
    def has_repeats(self) -> bool:
        """Whether topics wait to be repeated."""
        return bool(self._repeats)

    def retain(self, topic: str, make: Make, *, rank: Rank = Rank.USUAL) -> None:
        """Publish what ``make`` returns as the topic's retained value, now and on each connect."""
        if topic not in self._slots and topic not in self.before:
            self._unsent.add(topic)
        self._slots[topic] = make
        self._ranks[topic] = rank
        if rank is Rank.LAST:
            self.repeat(topic)
        else:
            self._mark(topic)

    def clear(self, topic: str) -> bool:
        """Remove the topic's retained value from the broker; return False if it has none of this topic."""
        if topic in self._unsent:
            self._forget(topic)
            return False
        self._slots[topic] = None
        self._mark(topic)
        return True

    def say_again(self, topic: str) -> None:
        """Publish a topic's current value as soon as a change."""
        if topic in self._slots:
            self._mark(topic)

    def repeat(self, topic: str) -> None:
        """Publish a topic's current value after all changes, and as paced as all repetitions."""
        if topic == self.last:
            self._last_due = True
        elif topic in self._slots and topic not in self._due and topic not in self._first_due:
            self._repeats[topic] = None
        self.changed()

    def has_value(self, topic: str) -> bool:
        """Tell whether something is, or is to be, retained on a topic."""
        return self._slots.get(topic) is not None

    def event(self, topic: str, make: Make) -> None:
        """Publish an event; without a connection it is dropped, and if too many wait, the oldest is."""
        if not self._connected:
            return
        if len(self._events) >= MOST_EVENTS:
            self._events.popleft()
        self._events.append(Publication(topic, make))
        self.changed()

    def sample(self, topic: str, make: Make) -> None:
        """Publish at QoS 0; a newer value replaces one that was not sent yet."""
        if self._connected:
            self._samples[topic] = make
            self.changed()

    def answer(self, answer: Answer) -> None:
        """Publish an answer, now or on the next connect."""
        self.answers.put(answer)
        self.changed()

    def republish(self) -> None:
        """Make every retained topic due again, the last one last."""
        self._due.clear()
        self._first_due.clear()
        self._repeats = OrderedDict.fromkeys(sorted(self._slots, key=self._place))
        self._repeats.pop(self.last, None)
        self._last_due = self.last in self._slots
        self.changed()

    def connected(self) -> None:
        """Start on a new connection: all retained topics are due."""
        self._connected = True
        self.republish()

    def disconnected(self, unconfirmed: Iterable[Publication]) -> None:
        """End a connection: undelivered events and samples are dropped, unconfirmed answers queued again."""
        self._connected = False
        self._events.clear()
        self._samples.clear()
        self.answers.lost(sent.answer for sent in unconfirmed if sent.answer)

    def confirmed(self, sent: Publication) -> bool:
        """Note that the broker confirmed a message; return whether that cleared a topic for good."""
        if sent.make is None and sent.answer is None and self._slots.get(sent.topic, sent) is None:
            self._forget(sent.topic)
            return True
        return False

    def _forget(self, topic: str) -> None:
        del self._slots[topic]
        self._unsent.discard(topic)
        for table in (self._ranks, self._due, self._first_due, self._repeats):
            table.pop(topic, None)

    def take(self, *, retained: bool = True, repeats: bool = True) -> Publication | None:
        """Return the next: answers, changes of rank FIRST, events, other changes, repeats, `last`, samples.

        Without ``retained``, retained topics stay due; without ``repeats``, repeated ones (and so `last`).
        """
        if self._answers_in_a_row < ANSWERS_IN_A_ROW and (answer := self.take_answer()) is not None:
            self._answers_in_a_row += 1
            return answer
        self._answers_in_a_row = 0
        other = self._take_other(retained=retained, repeats=repeats)
        return self.take_answer() if other is None else other

    def take_answer(self) -> Publication | None:
        """Return the next answer, None if there is none."""
        answer = self.answers.take()
        return None if answer is None else Publication(answer.topic, None, answer=answer)

    def _take_other(self, *, retained: bool, repeats: bool) -> Publication | None:
        if self._first_due and retained:
            return self._retained(self._first_due)
        if self._events:
            return self._events.popleft()
        may_repeat = bool(self._repeats) and retained and repeats
        if self._due and retained and not (may_repeat and self._changes_in_a_row >= CHANGES_IN_A_ROW):
            self._changes_in_a_row += 1
            return self._retained(self._due)
        self._changes_in_a_row = 0
        if may_repeat:
            return self._retained(self._repeats, is_repeat=True)
        if self._last_due and retained and not self._repeats:
            self._last_due = False
            return Publication(self.last, self._slots[self.last], retain=True)
        if self._samples:
            topic, make = self._samples.popitem()
            return Publication(topic, make, qos=0, is_sample=True)
        return None

    def _place(self, topic: str) -> int:
        rank = self._ranks.get(topic, Rank.USUAL)
        return _BEFORE_ALL if rank is Rank.LAST and self._slots[topic] is None else rank

    def _retained(self, waiting: OrderedDict[str, None], *, is_repeat: bool = False) -> Publication:
        topic, _ = waiting.popitem(last=False)
        self._unsent.discard(topic)
        return Publication(topic, self._slots[topic], retain=True, is_repeat=is_repeat)

    def _mark(self, topic: str) -> None:
        if topic == self.last:
            self._last_due = True
        else:
            self._repeats.pop(topic, None)
            # What is cleared keeps its order: a device goes before what it reads.
            is_first = self._ranks.get(topic) is Rank.FIRST and self._slots[topic] is not None
            due, other = (self._first_due, self._due) if is_first else (self._due, self._first_due)
            other.pop(topic, None)
            due[topic] = None
        if self._connected:
            self.changed()
