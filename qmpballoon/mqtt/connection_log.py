"""What is logged about connections to brokers: each outage once, with a cause that an operator can fix.

Lines begin with a stable word: ``broker-connected``, ``broker-lost``, ``broker-unreachable``,
``broker-refused``, ``broker-protocol``, ``broker-acl``, ``client-id-taken``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import aiomqtt
from aiomqtt.exceptions import MqttConnectError

from qmpballoon.log import say
from qmpballoon.mqtt.connection import SESSION_TAKEN_OVER, Broker, Login, reason_code
from qmpballoon.mqtt.topics import Topics

STEADY_S: Final = 10.0  # a connection that lasted so long was sound
TAKEN_WITHIN_S: Final = 300.0
_UNSPECIFIED: Final = 128  # what paho makes of a connection that just ended
_SURELY_TAKEN: Final = 2  # times that the broker said so
_PROBABLY_TAKEN: Final = 3  # times that a connection ended right after it began: 3.1.1 gives no reason


class ConnectionLog:
    """Logs what happens to connections, each fact once per outage."""

    def __init__(self, login: Login, topics: Topics, clock: Callable[[], float]) -> None:
        self._login = login
        self._topics = topics
        self._clock = clock
        self._said: set[tuple[str, Broker]] = set()  # in this outage
        self._short_lives: deque[float] = deque(maxlen=_PROBABLY_TAKEN)
        self._taken_said_at_s = float("-inf")
        self._denied_said = False

    def connected(self, broker: Broker, *, mqtt5: bool) -> None:
        """Say that all is published and ``online`` is said: an outage, if there was one, is over."""
        self._said.clear()
        say("broker-connected", url=broker, protocol="5" if mqtt5 else "3.1.1")

    def failed(self, broker: Broker, error: aiomqtt.MqttError) -> None:
        """Say that a connection did not come about."""
        refused = isinstance(error, MqttConnectError)
        word = "broker-refused" if refused else "broker-unreachable"
        if (word, broker) in self._said:
            return
        self._said.add((word, broker))
        if refused:
            say(word, str(error), level=logging.ERROR, url=broker, **{"as": self._who()})
        else:
            say(word, str(error), level=logging.WARNING, url=broker)

    def lost(self, broker: Broker, error: aiomqtt.MqttError, held_s: float) -> None:
        """Say that a connection ended after ``held_s``, and whether a second agent may be the cause."""
        if ("broker-lost", broker) not in self._said:
            self._said |= {("broker-lost", broker), ("broker-unreachable", broker)}
            reason = "it broke" if reason_code(error) == _UNSPECIFIED else str(error)
            say("broker-lost", reason, level=logging.WARNING, url=broker, after=f"{held_s:.1f}s")
        taken = reason_code(error) == SESSION_TAKEN_OVER
        if not taken and held_s >= STEADY_S:
            return
        now_s, enough = self._clock(), _SURELY_TAKEN if taken else _PROBABLY_TAKEN
        self._short_lives.append(now_s)
        if now_s < self._taken_said_at_s + TAKEN_WITHIN_S:
            return
        if len(self._short_lives) >= enough and now_s - self._short_lives[-enough] < TAKEN_WITHIN_S:
            self._taken_said_at_s = now_s
            say(
                "client-id-taken",
                "connections end right after they began; does a second agent use this client id? "
                "Give each its own",
                level=logging.ERROR,
                url=broker,
                client_id=self._login.client_id,
            )

    def only_311(self, broker: Broker) -> None:
        """Say that a broker does not speak MQTT 5."""
        say("broker-protocol", "it refuses MQTT 5, so 3.1.1 is spoken", url=broker)

    def not_heard(self, waited_s: float) -> None:
        """Say that our own status did not come back."""
        readable = ", ".join((self._topics.status, *self._topics.subscriptions()))
        self._deny(
            f"our own {self._topics.status} did not come back within {waited_s:g} s: the broker's ACL must "
            f"let {self._who()} write {self._topics.root}/# and read {readable}"
        )

    def not_taken(self, topic: str, reason: str) -> None:
        """Say that the broker refused a message."""
        self._deny(f"the broker did not take {topic} ({reason}): does its ACL let {self._who()} write there?")

    def not_readable(self, filters: Iterable[str]) -> None:
        """Say that the broker refused subscriptions."""
        self._deny(
            f"the broker refused the subscription to {', '.join(filters)}: check its ACL for {self._who()}"
        )

    def heard(self) -> None:
        """Take note that our own status came back."""
        self._denied_said = False

    def _deny(self, sentence: str) -> None:
        if not self._denied_said:
            self._denied_said = True
            say("broker-acl", sentence, level=logging.ERROR)

    def _who(self) -> str:
        user = self._login.username
        return f"user {user}" if user else f"client {self._login.client_id}"
