"""When a socket is connected again: soon, later each time, and much later where it is no use."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

FIRST_RETRY_S: Final = 0.1
LAST_RETRY_S: Final = 5.0
FIRST_LONG_RETRY_S: Final = 10.0  # no QMP monitor, or one that sends too much
LAST_LONG_RETRY_S: Final = 300.0
HELD_FOR_S: Final = 10.0  # after a session of this length the next retry is soon
BEHAVED_FOR_S: Final = 60.0  # after a session of this length an earlier excess is forgotten
MOST_RENEWALS: Final = 20  # sockets that replace the one at the path and are connected at once
RENEWAL_EVERY_S: Final = 2.0  # one more
_MOST_PATHS: Final = 4096


class BackOff:
    """The pauses between the connections to the sockets at one path.

    ``waits``: the socket that is there now is not to be connected at once.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._retry_s = FIRST_RETRY_S
        self._foreign_s: float | None = None  # None: it may be a QMP monitor
        self._excess_s: float | None = None  # None: it sends no more than its share
        self._renewals = float(MOST_RENEWALS)
        self._renewed_at_s = clock()
        self.waits = False

    def pause_s(self) -> float:
        """Return the next pause in seconds; the one after it is longer."""
        pause_s = max(self._foreign_s or self._retry_s, self._excess_s or 0.0)
        self._retry_s = min(LAST_RETRY_S, self._retry_s * 2)
        return pause_s * random.uniform(0.5, 1.0)

    def renewed(self) -> None:
        """Note that another socket is at the path."""
        now_s = self._clock()
        refilled = (now_s - self._renewed_at_s) / RENEWAL_EVERY_S
        self._renewals = min(MOST_RENEWALS, self._renewals + refilled)
        self._renewed_at_s = now_s
        self._foreign_s = None
        self.waits = self._renewals < 1 or self._excess_s is not None
        if not self.waits:
            self._renewals -= 1
            self._retry_s = FIRST_RETRY_S

    def foreign(self) -> None:
        """Note that the socket is no QMP monitor: it is not ours to hold."""
        self._foreign_s = _longer(self._foreign_s)

    def greeted(self) -> None:
        """Note that it is a QMP monitor."""
        self._foreign_s = None

    def lasted(self, session_s: float, *, exceeded: bool) -> None:
        """Note how long a session was, and whether it ended because QEMU sent too much."""
        if session_s > HELD_FOR_S:
            self._retry_s = FIRST_RETRY_S
        if exceeded:
            self._excess_s = _longer(self._excess_s)
        elif session_s > BEHAVED_FOR_S:
            self._excess_s = None


class BackOffs:
    """The back-off of each path; it outlives the socket, which its owner may remove and create again."""

    def __init__(self) -> None:
        self._by_path: dict[str, BackOff] = {}

    def of_new(self, path: str) -> BackOff:
        """Return the back-off for a socket that has appeared at a path."""
        back_off = self._by_path.pop(path, None)
        if back_off is None:
            back_off = BackOff()
        else:
            back_off.renewed()
        self._by_path[path] = back_off
        if len(self._by_path) > _MOST_PATHS:
            del self._by_path[next(iter(self._by_path))]
        return back_off


def _longer(retry_s: float | None) -> float:
    return FIRST_LONG_RETRY_S if retry_s is None else min(LAST_LONG_RETRY_S, 2 * retry_s)
