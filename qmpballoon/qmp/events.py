"""QMP events: their translation into the events that are published, and a log of the last ones."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping
from typing import Final

from qmpballoon.model.records import Event, utc_now

_MOST_EVENTS: Final = 1000
_WORDS: Final = {"STOP": "stopped", "RESUME": "resumed"}
_DOCUMENTED: Final[Mapping[str, type]] = {"actual": int, "guest": bool, "reason": str, "action": str}


def translated(name: str, details: Mapping[str, object]) -> Event:
    """Return the event of a QMP event: ``BALLOON_CHANGE`` is ``balloon-change``, ``STOP`` ``stopped``.

    The details are QMP's; one that is not of the documented type is left out. The time stamp is the agent's,
    because QEMU's may be of another clock.
    """
    sound = {key: value for key, value in details.items() if type(value) is _DOCUMENTED.get(key, type(value))}
    return Event(_WORDS.get(name, name.lower().replace("_", "-")), utc_now(), sound)


class EventLog:
    """The last events, numbered from connect on; a bounded ring, which needs no reader."""

    def __init__(self) -> None:
        self.count = 0
        self.changed = asyncio.Event()  # set and replaced at each event
        self._kept: deque[Event] = deque(maxlen=_MOST_EVENTS)

    @property
    def first(self) -> int:
        """The number of the oldest event in the ring."""
        return self.count - len(self._kept)

    def __getitem__(self, number: int) -> Event:
        return self._kept[number - self.first]

    def add(self, name: str, details: Mapping[str, object]) -> None:
        """Take an event of QMP."""
        self._kept.append(translated(name, details))
        self.count += 1
        self.changed.set()
        self.changed = asyncio.Event()
