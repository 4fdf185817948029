"""Which version of MQTT a broker speaks: 5, or 3.1.1 if it refuses 5. Pure.

Brokers that lack MQTT 5 refuse it in many ways: with its reason code or another one, in the format of 3.1.1,
with something else, by closing, some of them only at the first SUBSCRIBE, or not at all (amqtt 0.12 waits for
the rest of a CONNECT that it misreads).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

import aiomqtt
from aiomqtt.exceptions import MqttCodeError

from qmpballoon.mqtt.connection import NoConnack
from qmpballoon.mqtt.guesses import KEPT_S
from qmpballoon.mqtt.limits import (
    CLIENT_ID_NOT_VALID,
    IMPLEMENTATION_SPECIFIC,
    MALFORMED_PACKET,
    PROTOCOL_ERROR,
    UNSPECIFIED,
    UNSUPPORTED_PROTOCOL,
)
from qmpballoon.mqtt.refusals import reason_code

Protocol: TypeAlias = Literal["auto", "5", "3.1.1"]

ANSWERS_5_WITHIN_S: Final = 3.0
"""A broker that does not answer a CONNECT of MQTT 5 for so long is asked with 3.1.1."""

_REFUSED_5: Final = frozenset(
    {
        UNSUPPORTED_PROTOCOL,
        # of a broker that takes what is new in MQTT 5 for something else:
        UNSPECIFIED,
        MALFORMED_PACKET,
        PROTOCOL_ERROR,
        IMPLEMENTATION_SPECIFIC,
        CLIENT_ID_NOT_VALID,
    }
)


def may_refuse_5(error: aiomqtt.MqttError) -> bool:
    """Tell whether a broker that lacks MQTT 5 may be why a connection with it was not established."""
    if isinstance(error, MqttCodeError):
        return reason_code(error) in _REFUSED_5
    return isinstance(error, NoConnack)


@dataclass(slots=True)
class Versions:
    """Which version the next connection to one broker uses. ``clock`` is monotonic.

    A broker that took 3.1.1 after it had refused 5 is not asked for 5 for KEPT_S, unless it refuses 3.1.1.
    """

    protocol: Protocol
    clock: Callable[[], float]
    _tries_311: bool = False
    _learned_at_s: float | None = None  # that it lacks MQTT 5

    @property
    def mqtt5(self) -> bool:
        """Whether the next connection uses MQTT 5."""
        if self._learned_at_s is not None and self.clock() > self._learned_at_s + KEPT_S:
            self._learned_at_s = None
        return self.protocol == "5" or (
            self.protocol == "auto" and not self._tries_311 and self._learned_at_s is None
        )

    @property
    def is_doubtful(self) -> bool:
        """Whether the next connection uses MQTT 5, and 3.1.1 would be used if that were refused."""
        return self.protocol == "auto" and self.mqtt5

    def established(self) -> bool:
        """Note a connection; return whether it shows that the broker lacks MQTT 5, and did not before."""
        was_tried, self._tries_311 = self._tries_311, False
        if was_tried:
            self._learned_at_s = self.clock()
        return was_tried

    def refused(self, error: aiomqtt.MqttError) -> bool:
        """Note a connection that was not established; return whether to try 3.1.1 at once."""
        if self.is_doubtful and may_refuse_5(error):
            self._tries_311 = True
            return True
        return False

    def given_up(self, error: aiomqtt.MqttError) -> None:
        """Note that the last attempt of several in a row failed: the next ones begin with MQTT 5."""
        self._tries_311 = False
        if isinstance(error, NoConnack | MqttCodeError):  # the broker was reached
            self._learned_at_s = None
