"""What is learned about a broker that does not announce its limits: it refuses, or ends the connection.

A reason code names the limit. Without one (3.1.1 has none) the message is found by its effect:

- A broker that closes before its CONNACK may not take the last will. Wills without the retain flag, at QoS 0
  and both are tried in turn. One that works is used if the usual one is then refused again: a proxy whose
  broker is down closes, too.
- After a connection that ended while messages were unconfirmed, the next one sends one message at a time. If
  it ends as well, that message is the cause. If the connection had confirmed smaller ones, its size is
  assumed, else its retain flag, then its QoS. Two ends in a row with an unconfirmed message that is larger
  than all confirmed ones show its size, too.

An interval in which the broker is unreachable proves a restart, and ends the suspicion. What was learned is
forgotten after an hour, because a broker's configuration may change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.mqtt.limits import (
    IMPLEMENTATION_SPECIFIC,
    MALFORMED_PACKET,
    PACKET_TOO_LARGE,
    PROTOCOL_ERROR,
    QOS_NOT_SUPPORTED,
    RECEIVE_MAXIMUM_EXCEEDED,
    RETAIN_NOT_SUPPORTED,
    UNSPECIFIED,
    WINDOW,
    Limits,
)
from qmpballoon.mqtt.window import Sent

KEPT_S: Final = 3600.0
_SMALL: Final = 512  # bytes that every broker takes
_UNCLEAR: Final = frozenset({None, UNSPECIFIED, MALFORMED_PACKET, PROTOCOL_ERROR, IMPLEMENTATION_SPECIFIC})
_WILLS: Final = (Limits(), Limits(retain=False), Limits(qos=0), Limits(qos=0, retain=False))


@dataclass(slots=True)
class Guesses:
    """The guessed limits of one broker. ``clock`` is monotonic.

    ``one_at_a_time``: the next connection is to send one message at a time until all are confirmed.
    """

    clock: Callable[[], float]
    one_at_a_time: bool = False
    _limits: Limits = field(default_factory=Limits)
    _learned_at_s: float = 0.0
    _will: int = 0  # in _WILLS: tried because the broker closed before its CONNACK
    _doubted: int = 0  # one that worked, while the usual one is tried again
    _alone_lost: int = 0  # connections in a row that ended before anything was confirmed
    _suspect: int = 0  # bytes of a larger message than was confirmed, unconfirmed at the last end

    @property
    def limits(self) -> Limits:
        """What the next connection has to keep to."""
        if self._limits != Limits() and self.clock() > self._learned_at_s + KEPT_S:
            self._limits = Limits()
        return self._limits.within(_WILLS[self._will])

    def unreachable(self) -> None:
        """Note that the broker could not be reached: it was down, so its cuts had another cause."""
        self.one_at_a_time = False
        self._alone_lost = self._suspect = 0

    def refused(self, code: int | None) -> bool:
        """Note the reason code of a CONNACK or DISCONNECT; return whether a limit was learned from it."""
        if code == RETAIN_NOT_SUPPORTED:
            return self._learn(retain=False)
        return code == QOS_NOT_SUPPORTED and self._learn(qos=0)

    def closed_early(self) -> bool:
        """Note a close before the CONNACK; return whether another will is to be tried at once."""
        if self._doubted:
            self._learn(qos=_WILLS[self._doubted].qos, retain=_WILLS[self._doubted].retain)
            self._will = self._doubted = 0
            return True
        self._will = (self._will + 1) % len(_WILLS)
        return self._will != 0

    def established(self) -> bool:
        """Note a CONNACK; return False if the connection is to be opened again, with the usual will."""
        self._doubted, self._will = self._will, 0
        return self._doubted == 0

    def lost(self, code: int | None, sent: Sequence[Sent], largest_confirmed: int, *, alone: bool) -> bool:
        """Note the end of a connection; return whether a limit was learned from it.

        ``sent`` are the unconfirmed messages. ``alone``: at most one of them was sent at a time.
        """
        if code in (RETAIN_NOT_SUPPORTED, QOS_NOT_SUPPORTED):
            return self.refused(code)
        if code == RECEIVE_MAXIMUM_EXCEEDED:
            return self._learn(window=max(1, min(self.limits.window, WINDOW) // 2))
        largest = max((one.size for one in sent), default=0)
        if code == PACKET_TOO_LARGE and largest > largest_confirmed:
            return self._learn(packet=_below(largest, largest_confirmed))
        if code not in _UNCLEAR or not sent:
            return False
        if not alone:
            self.one_at_a_time = True
            before, self._suspect = (
                self._suspect,
                largest if largest > max(largest_confirmed, _SMALL) and largest_confirmed else 0,
            )
            return bool(before and self._suspect) and self._learn(
                packet=_below(min(before, self._suspect), largest_confirmed)
            )
        return self._found(sent[0], largest_confirmed)

    def steady(self) -> None:
        """Note that everything was sent and confirmed: the cause is gone, or avoided."""
        self.one_at_a_time = False
        self._alone_lost = 0

    def _found(self, sent: Sent, largest_confirmed: int) -> bool:
        """Learn from a message that was sent alone when the connection ended."""
        if largest_confirmed and sent.size > max(largest_confirmed, _SMALL):
            return self._learn(packet=_below(sent.size, largest_confirmed))
        if largest_confirmed:
            return False  # others of its size are taken
        self._alone_lost += 1
        if self._alone_lost < 2:
            return False
        self._alone_lost = 0
        if sent.size > _SMALL:
            return self._learn(packet=_below(sent.size, 0))
        if sent.publication.retain:
            return self._learn(retain=False)
        return bool(self._limits.qos) and self._learn(qos=0)

    def _learn(self, **limits: int | bool) -> bool:
        before = self._limits
        self._limits = before.within(dataclasses.replace(Limits(), **limits))  # type: ignore[arg-type]
        self._learned_at_s = self.clock()
        return self._limits != before


def _below(size: int, confirmed: int) -> int:
    """Return a limit between what was taken and what was not: half, so that few attempts find it."""
    return max(confirmed, size // 2, _SMALL)
