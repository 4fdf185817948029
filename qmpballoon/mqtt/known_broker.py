"""One broker of the configuration, and what was learned of it: its version of MQTT, and its limits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import aiomqtt
from aiomqtt.exceptions import MqttConnectError

from qmpballoon.mqtt.connection import Broker, ClosedEarly
from qmpballoon.mqtt.guesses import Guesses
from qmpballoon.mqtt.limits import REFUSED_CREDENTIALS
from qmpballoon.mqtt.refusals import reason_code
from qmpballoon.mqtt.versions import Protocol, Versions
from qmpballoon.mqtt.window import Sent


class KnownBroker:
    """A broker, and what was learned of it. ``clock`` is monotonic."""

    def __init__(self, broker: Broker, protocol: Protocol, clock: Callable[[], float]) -> None:
        self.broker = broker
        self.guesses = Guesses(clock)
        self.versions = Versions(protocol, clock)

    def refused(self, error: aiomqtt.MqttError) -> bool:
        """Note a connection that was not established; return whether to try another way at once."""
        if self.versions.refused(error) or self._learn_from(error):
            return True
        self.versions.given_up(error)
        return False

    def _learn_from(self, error: aiomqtt.MqttError) -> bool:
        if isinstance(error, MqttConnectError):
            return self.guesses.refused(reason_code(error))
        if isinstance(error, ClosedEarly):
            return self.guesses.closed_early()
        self.guesses.unreachable()
        return False

    def lost(
        self, error: aiomqtt.MqttError, sent: Sequence[Sent], largest_confirmed: int, *, was_alone: bool
    ) -> None:
        """Note the end of a connection, and find out whether one of the unconfirmed messages was the cause.

        ``was_alone``: the connection began with one message at a time.
        """
        is_alone = len(sent) == 1 and (
            (was_alone and self.guesses.one_at_a_time) or sent[0].publication.is_uncertain
        )
        self.guesses.lost(reason_code(error), sent, largest_confirmed, alone=is_alone)


def refuses_login(error: aiomqtt.MqttError) -> bool:
    """Tell whether a broker refused the user name, password or client id: it will do so again."""
    return isinstance(error, MqttConnectError) and reason_code(error) in REFUSED_CREDENTIALS
