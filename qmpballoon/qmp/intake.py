"""What one monitor may send: a share of bytes and of processor time, which refills.

A QEMU belongs to somebody, and may send anything at any rate. A session over its share is not read for some
time, so its QEMU has to wait. A session that stays over its share ends.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Final

from qmpballoon.errors import ConnectionLost
from qmpballoon.qmp.wire import LONGEST_GREETING, LONGEST_MESSAGE, Splitter

BYTES_PER_S: Final = 1024**2  # a guest that is sampled five times a second causes some 50 KB
MOST_BYTES: Final = 4 * 1024**2
PER_READ: Final = 1024  # bytes that one read counts in addition: each costs about 20 µs
TIME_PER_S: Final = 0.05  # processor time; a sample takes less than 0.1 ms
MOST_TIME_S: Final = 0.2
PATIENCE_S: Final = 5.0  # a session that is over its share for so long ends
_ASKED_BYTES: Final = 8 * 1024  # what a request of ours adds: its reply is not the QEMU's fault
_ASKED_TIME_S: Final = 0.0002
_BYTES_AT_A_TIME: Final = 64 * 1024  # used before the clock is read
_TIME_AT_A_TIME_S: Final = 0.002
_FEW: Final = 8  # messages of one read that are taken before the share is checked


class Share:
    """What is left of one session's share. ``size`` and ``spent_s`` were used and are not deducted yet."""

    __slots__ = ("_at_s", "_bytes", "_clock", "_over_since_s", "_time_s", "size", "spent_s")

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.size = 0
        self.spent_s = 0.0
        self._clock = clock
        self._at_s = clock()
        self._bytes = float(MOST_BYTES)
        self._time_s = MOST_TIME_S
        self._over_since_s: float | None = None

    @property
    def over_for_s(self) -> float:
        """For how many seconds the session has been over its share; 0: it is not."""
        return 0.0 if self._over_since_s is None else self._clock() - self._over_since_s

    @property
    def is_due(self) -> bool:
        """Tell whether so much was used that it has to be deducted."""
        return self.size >= _BYTES_AT_A_TIME or self.spent_s >= _TIME_AT_A_TIME_S

    def asked(self) -> None:
        """Add what the reply to one more request may use."""
        self.size -= _ASKED_BYTES
        self.spent_s -= _ASKED_TIME_S

    def deduct(self) -> float:
        """Deduct what was used; return in how many seconds the share is enough again."""
        now_s = self._clock()
        passed_s, self._at_s = now_s - self._at_s, now_s
        self._bytes = min(MOST_BYTES, self._bytes + passed_s * BYTES_PER_S - self.size)
        self._time_s = min(MOST_TIME_S, self._time_s + passed_s * TIME_PER_S - self.spent_s)
        self.size, self.spent_s = 0, 0.0
        pause_s = max(0.0, -self._bytes / BYTES_PER_S, -self._time_s / TIME_PER_S)
        if pause_s and self._over_since_s is None:
            self._over_since_s = now_s
        elif self._bytes > MOST_BYTES / 2 and self._time_s > MOST_TIME_S / 2:
            self._over_since_s = None
        return pause_s


class Intake:
    """Cuts what a session receives into messages, and passes them on within its share.

    ``take`` gets each message, and adds the processor time that it used to ``share.spent_s``.
    """

    def __init__(self, path: str, take: Callable[[bytes], None]) -> None:
        self.share = Share()
        self.take = take
        self.longest = LONGEST_GREETING
        self.exceeded = False  # the session ended because of too much input
        self._path = path
        self._splitter = Splitter()
        self._held: deque[bytes] | None = None  # received, and over the share

    @property
    def rest(self) -> int:
        """The number of bytes of a message that is not complete."""
        return self._splitter.rest

    @property
    def is_pretty(self) -> bool:
        """Tell whether messages came over many lines, as from a monitor with ``pretty=on``."""
        return self._splitter.has_spread

    @property
    def is_over(self) -> bool:
        """Tell whether the session is over its share: messages wait."""
        return self.share.over_for_s > 0

    def excess(self) -> ConnectionLost:
        """Note that the session ends because it stays over its share, and return that as the reason."""
        return self.too_much(
            f"this QEMU sends more than its share: over {BYTES_PER_S // 1024} KiB a second, or what takes "
            f"{TIME_PER_S:.0%} of a processor core"
        )

    def too_much(self, what: str) -> ConnectionLost:
        """Note that the session ends because of what was sent, and return that as the reason."""
        self.exceeded = True
        return ConnectionLost(f"{self._path}: {what}")

    def greeted(self, take: Callable[[bytes], None]) -> None:
        """Pass all further messages to another function: the session runs."""
        self.take, self.longest = take, LONGEST_MESSAGE

    def received(self, data: bytes) -> float:
        """Take received bytes; return for how many seconds nothing more may be read.

        Raises:
            ConnectionLost: a message is too long, or invalid, or there is too much of them.
        """
        share = self.share
        share.size += len(data) + PER_READ
        messages = self._splitter.feed(data)
        if self._splitter.rest > self.longest:
            raise self.too_much(f"a message of more than {self.longest} bytes")
        if len(messages) <= _FEW and not self._held and not share.is_due:
            for message in messages:
                self.take(message)
            return 0.0
        if self._held is None:
            self._held = deque()
        self._held.extend(messages)
        return self.take_held()

    def take_held(self) -> float:
        """Pass on the messages that were held back; return as `received` does, and raise the same."""
        share, held = self.share, self._held
        while True:
            if share.is_due and (pause_s := share.deduct()):
                if share.over_for_s >= PATIENCE_S:
                    raise self.excess()
                return pause_s
            if not held:
                self._held = None
                return 0.0
            self.take(held.popleft())
