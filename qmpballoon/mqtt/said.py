"""What was last said on each retained topic, so that it can be said again. No I/O.

Anybody with the right to may clear or overwrite a retained value, and a bridge to another broker may bring an
old one back. What comes back different is corrected at once; the same topic again only after a pause that
doubles, so that two brokers or two agents that contradict each other do not exchange messages without end.
What nobody reports is healed by the heartbeat.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

FIRST_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 60.0
MOST_FOREIGN: Final = 100
_MOST_ECHOES: Final = 16


@dataclass(slots=True)
class _Value:
    """``digest`` is that of the payload, ``echoes`` those of payloads that have not come back yet.

    Without a broker that sends them back there is no deque, of which each takes 0.7 KB.
    """

    digest: int
    said_at_s: float
    echoes: deque[int] | None = None
    corrected_at_s: float = float("-inf")
    pause_s: float = 0.0

    def may_be_corrected(self, now_s: float) -> bool:
        return now_s >= self.corrected_at_s + self.pause_s

    def correct(self, now_s: float) -> None:
        is_calm = now_s > self.corrected_at_s + LONGEST_PAUSE_S + self.pause_s
        self.pause_s = FIRST_PAUSE_S if is_calm else min(LONGEST_PAUSE_S, 2 * self.pause_s)
        self.corrected_at_s = now_s


@dataclass(slots=True)
class Said:
    """The values of retained topics as sent. ``clock`` is monotonic."""

    clock: Callable[[], float]
    _echoes: bool = False  # what is sent comes back, too
    _values: OrderedDict[str, _Value] = field(default_factory=OrderedDict)  # the oldest first
    _wrong: dict[str, None] = field(default_factory=dict)
    _foreign: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def connected(self, *, echoes: bool) -> None:
        """Start on a new connection; ``echoes``: the broker sends back what this client publishes."""
        self._echoes = echoes
        self._wrong.clear()
        for value in self._values.values():
            value.echoes = None

    def said(self, topic: str, payload: bytes) -> None:
        """Note what was sent as a topic's retained value."""
        digest, now_s = hash(payload), self.clock()
        value = self._values.pop(topic, None)
        if value is None:
            value = _Value(digest, now_s)
        value.digest, value.said_at_s = digest, now_s
        if self._echoes:
            value.echoes = value.echoes or deque(maxlen=_MOST_ECHOES)
            value.echoes.append(digest)
        self._values[topic] = value
        self._wrong.pop(topic, None)

    def forget(self, topic: str) -> None:
        """Note that a topic is cleared for good."""
        self._values.pop(topic, None)
        self._wrong.pop(topic, None)

    def heard(self, topic: str, payload: bytes) -> bool:
        """Note what came back on a topic that has a value; return whether it is to be said again now."""
        value = self._values.get(topic)
        if value is None:
            return False  # it was not sent yet
        digest = hash(payload)
        if value.echoes is not None and digest in value.echoes:
            while value.echoes.popleft() != digest:
                pass
            return False
        if digest == value.digest:
            self._wrong.pop(topic, None)
            return False
        now_s = self.clock()
        if not value.may_be_corrected(now_s):
            self._wrong[topic] = None
            return False
        value.correct(now_s)
        return True

    def is_news(self, foreign: str) -> bool:
        """Note a value on a topic that has none; return whether to clear it: once in LONGEST_PAUSE_S."""
        now_s = self.clock()
        while self._foreign and next(iter(self._foreign.values())) < now_s - LONGEST_PAUSE_S:
            self._foreign.popitem(last=False)
        if foreign in self._foreign or len(self._foreign) >= MOST_FOREIGN:
            return False
        self._foreign[foreign] = now_s
        return True

    def due(self, heartbeat_s: float) -> list[str]:
        """Return the topics that are to be said again: wrong ones after their pauses, and old ones."""
        now_s = self.clock()
        due = [topic for topic in self._wrong if self._values[topic].may_be_corrected(now_s)]
        for topic in due:
            self._values[topic].correct(now_s)
            del self._wrong[topic]
        for topic, value in self._values.items():
            if value.said_at_s + heartbeat_s > now_s:
                break
            due.append(topic)
        return due
