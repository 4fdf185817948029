"""Answers that wait to be sent. No I/O.

VMs are served in turn, and so are the askers of each VM. An answer whose delivery is uncertain, because the
connection broke before its PUBACK, is sent again, alone: if the connection breaks again, that answer is the
cause. If nobody is subscribed to its topic yet, because the requester has not reconnected, it is sent again
later.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.mqtt.turns import Turns
from qmpballoon.protocol.payloads import Format

MOST_ANSWERS: Final = 1000  # then requests are read no longer; those that run add at most 32 for each VM
ANSWER_KEPT_S: Final = 60.0  # as long as a repeated request would be answered again
UNHEARD_PAUSES_S: Final = (0.3, 0.7, 1.0, 2.0, 4.0, 8.0, 16.0, 20.0)  # until the next time
SETTLED_S: Final = 2.0  # after a connect; then a requester has reconnected, too


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer: its topic, value, format and correlation data, and when it was made (monotonic).

    ``own_topic`` is the one below the base. Answers have turns by ``group``: a VM. ``times_lost`` counts
    connections that broke before its PUBACK, ``times_unheard`` the times that nobody was subscribed to its
    topic.
    """

    topic: str
    value: Mapping[str, object]
    payload_format: Format
    correlation: bytes | None
    made_at_s: float
    asked_at_s: float
    own_topic: str
    group: str = ""
    times_lost: int = 0
    times_unheard: int = 0


@dataclass(slots=True)
class Answers:
    """Answers in the order in which they are sent."""

    _waiting: Turns[Answer] = field(default_factory=Turns)
    _lost: deque[Answer] = field(default_factory=deque)
    _later: list[tuple[float, int, Answer]] = field(default_factory=list)  # a heap
    _number: Iterator[int] = field(default_factory=itertools.count)

    def __len__(self) -> int:
        """Return how many may be sent now."""
        return len(self._waiting) + len(self._lost)

    @property
    def is_full(self) -> bool:
        """Whether so many wait that no more requests should be read."""
        return len(self) + len(self._later) >= MOST_ANSWERS

    @property
    def next_is_uncertain(self) -> bool:
        """Whether the next answer was being sent when a connection broke."""
        return bool(self._lost) and self._lost[0].times_lost > 0

    @property
    def next_later_s(self) -> float | None:
        """When an answer that was put off is due, None if there is none."""
        return self._later[0][0] if self._later else None

    def put(self, answer: Answer) -> None:
        """Add an answer."""
        self._waiting.put(answer.group, answer.topic, answer)

    def take(self) -> Answer | None:
        """Remove and return the next answer, None if there is none."""
        return self._lost.popleft() if self._lost else self._waiting.take()

    def lost(self, answers: Iterable[Answer]) -> None:
        """Queue answers again whose connection broke before their PUBACK."""
        again = [dataclasses.replace(answer, times_lost=answer.times_lost + 1) for answer in answers]
        self._lost.extendleft(reversed(again))

    def unheard(self, answer: Answer, now_s: float) -> bool:
        """Put an answer off that nobody was subscribed to; return False if its time is over."""
        pause_s = UNHEARD_PAUSES_S[min(answer.times_unheard, len(UNHEARD_PAUSES_S) - 1)]
        if now_s + pause_s > answer.made_at_s + ANSWER_KEPT_S or self.is_full:
            return False
        again = dataclasses.replace(answer, times_lost=0, times_unheard=answer.times_unheard + 1)
        self._put_off(again, now_s + pause_s)
        return True

    def put_off_all(self, until_s: float) -> None:
        """Put every answer off."""
        while (answer := self.take()) is not None:
            self._put_off(answer, until_s)

    def wake(self, now_s: float) -> None:
        """Queue the answers that were put off until now."""
        while self._later and self._later[0][0] <= now_s:
            self._lost.append(heapq.heappop(self._later)[2])

    def wake_all(self) -> None:
        """Queue all answers that were put off."""
        self.wake(float("inf"))

    def drop_old(self, now_s: float) -> int:
        """Drop the answers whose requesters wait no longer, and return their number; call it on each connect.

        The pauses for answers that nobody received start again: requesters reconnect, too.
        """
        self.wake_all()
        answers = list(iter(self.take, None))
        kept = [answer for answer in answers if answer.made_at_s >= now_s - ANSWER_KEPT_S]
        for answer in kept:
            if answer.times_lost or answer.times_unheard:
                self._lost.append(dataclasses.replace(answer, times_unheard=0))
            else:
                self.put(answer)
        return len(answers) - len(kept)

    def _put_off(self, answer: Answer, until_s: float) -> None:
        heapq.heappush(self._later, (until_s, next(self._number), answer))
