"""What is logged about connections to brokers: each outage once, with a cause that an operator can fix.

Lines begin with a stable word: ``broker-connected``, ``broker-lost``, ``broker-unreachable``,
``broker-refused``, ``broker-protocol``, ``broker-acl``, ``broker-limits``, ``too-large``,
``publish-refused``, ``retained-changed``, ``requests-dropped``, ``answers-dropped``, ``client-id-taken``.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Final

import aiomqtt
from aiomqtt.exceptions import MqttConnectError

from qmpballoon.log import log_event
from qmpballoon.mqtt.connection import Broker, Login
from qmpballoon.mqtt.limits import NOT_AUTHORIZED, SESSION_TAKEN_OVER, UNSPECIFIED, Limits
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Loss
from qmpballoon.mqtt.refusals import reason, reason_code
from qmpballoon.mqtt.topics import Topics

STEADY_S: Final = 10.0  # a connection that lasted so long was stable
TAKEN_WITHIN_S: Final = 300.0
_TAKEN_WITH_REASON: Final = 2  # ends with the reason code SESSION_TAKEN_OVER
_TAKEN_WITHOUT_REASON: Final = 3  # short connections: 3.1.1 has no reason codes


class ConnectionLog:
    """Logs what happens to connections, each fact once per outage."""

    def __init__(self, login: Login, topics: Topics, clock: Callable[[], float]) -> None:
        self._login = login
        self._topics = topics
        self._clock = clock
        self._logged: set[tuple[str, Broker]] = set()  # in the current outage
        self._short_connections: deque[float] = deque(maxlen=_TAKEN_WITHOUT_REASON)
        self._taken_logged_at_s = float("-inf")
        self._acl_logged = False
        self._limits: dict[Broker, Limits] = {}  # as logged
        self._too_large: set[tuple[str, Loss]] = set()

    def connected(self, broker: Broker, *, mqtt5: bool) -> None:
        """Log that all retained topics are published, ``online`` last: an outage is over."""
        self._logged.clear()
        log_event("broker-connected", url=broker, protocol="5" if mqtt5 else "3.1.1")

    def failed(self, broker: Broker, error: aiomqtt.MqttError) -> None:
        """Log that a connection could not be established."""
        refused = isinstance(error, MqttConnectError)
        word = "broker-refused" if refused else "broker-unreachable"
        if (word, broker) in self._logged:
            return
        self._logged.add((word, broker))
        why = reason(error, self._login.username)
        if refused:
            log_event(word, why, level=logging.ERROR, url=broker, **{"as": self._user()})
        else:
            log_event(word, why, level=logging.WARNING, url=broker)

    def lost(self, broker: Broker, error: aiomqtt.MqttError, held_s: float, *, is_idle: bool) -> None:
        """Log that a connection ended after ``held_s``, and whether a second agent may be the cause.

        ``is_idle``: every message was confirmed, so none was the cause.
        """
        code = reason_code(error)
        if ("broker-lost", broker) not in self._logged:
            self._logged |= {("broker-lost", broker), ("broker-unreachable", broker)}
            broke = code in (None, UNSPECIFIED)
            log_event(
                "broker-lost",
                "the connection broke" if code == UNSPECIFIED else str(error),
                level=logging.WARNING,
                url=broker,
                after=f"{held_s:.1f}s",
                reason=None if broke else f"{code:#04x}",
            )
        taken = code == SESSION_TAKEN_OVER
        if not taken and (held_s >= STEADY_S or not is_idle or code not in (None, UNSPECIFIED)):
            return
        now_s, enough = self._clock(), _TAKEN_WITH_REASON if taken else _TAKEN_WITHOUT_REASON
        self._short_connections.append(now_s)
        if now_s < self._taken_logged_at_s + TAKEN_WITHIN_S:
            return
        if (
            len(self._short_connections) >= enough
            and now_s - self._short_connections[-enough] < TAKEN_WITHIN_S
        ):
            self._taken_logged_at_s = now_s
            log_event(
                "client-id-taken",
                "connections end right after they began; does a second agent use this client id? Give each "
                "machine its own [agent] host (--host): two agents of one host publish on the same topics",
                level=logging.ERROR,
                url=broker,
                client_id=self._login.client_id,
            )

    def only_311(self, broker: Broker) -> None:
        """Log that a broker does not speak MQTT 5."""
        log_event("broker-protocol", "it refuses MQTT 5, so 3.1.1 is used", url=broker)

    def limited(self, broker: Broker, limits: Limits) -> None:
        """Log what a broker does not take, when that is new."""
        if self._limits.get(broker, Limits()) == limits:
            return
        self._limits[broker] = limits
        sentences = []
        if limits.qos == 0:
            sentences.append("QoS 0 only: messages may be lost when a connection ends")
        if not limits.retain:
            sentences.append("no retained messages: all state is published every 10 s instead")
        if limits.packet is not None:
            sentences.append(f"packets of {limits.packet} bytes at most: what is larger is cut or left out")
        log_event(
            "broker-limits",
            "; ".join(sentences),
            level=logging.INFO if limits.qos and limits.retain else logging.WARNING,
            url=broker,
            packet=limits.packet,
            unconfirmed=limits.window,
            qos=limits.qos,
            retain="yes" if limits.retain else "no",
        )

    def too_large(self, publication: Publication, loss: Loss) -> None:
        """Log that a message does not fit what the broker takes, once for each kind of topic."""
        kind = "answer" if publication.answer else publication.topic.rpartition("/")[2]
        if (kind, loss) not in self._too_large:
            self._too_large.add((kind, loss))
            done = {
                "replaced": "the answer became an error",
                "cut": "its largest parts were emptied and are named in its key cut",
                "emptied": "the topic was cleared",
            }.get(loss, "it was left out")
            log_event(
                "too-large",
                f"{done}: allow larger packets on the broker (this is logged once)",
                level=logging.WARNING,
                topic=publication.topic,
            )

    def corrected(self, topic: str) -> None:
        """Log that somebody else changed what is retained on a topic."""
        sentence = "somebody else, or a bridge, changed what is retained there; it is corrected"
        log_event("retained-changed", sentence, level=logging.WARNING, topic=topic)

    def request_dropped(self) -> None:
        """Log that a request was dropped: too many wait."""
        log_event("requests-dropped", "more requests arrive than can be answered", level=logging.WARNING)

    def answers_dropped(self, number: int) -> None:
        """Log that answers were dropped, because their time was over."""
        if number:
            sentence = "nobody received these answers within a minute"
            log_event("answers-dropped", sentence, level=logging.WARNING, number=number)

    def status_missing(self, waited_s: float) -> None:
        """Log that our own status did not come back."""
        readable = ", ".join((self._topics.status, *self._topics.subscriptions()))
        self._log_acl(
            f"our own {self._topics.status} did not come back within {waited_s:g} s: the broker's ACL must "
            f"let {self._user()} write {self._topics.root}/# and read {readable}"
        )

    def publish_refused(self, topic: str, code: int) -> None:
        """Log that the broker refused a message, by the reason code of its PUBACK."""
        if code == NOT_AUTHORIZED:
            self._log_acl(f"the broker did not take {topic}: its ACL must let {self._user()} write there")
        else:
            sentence = "the broker did not take the message"
            log_event("publish-refused", sentence, level=logging.WARNING, topic=topic, reason=f"{code:#04x}")

    def subscription_refused(self, filters: Iterable[str]) -> None:
        """Log that the broker refused subscriptions."""
        self._log_acl(
            f"the broker refused the subscription to {', '.join(filters)}: check its ACL for {self._user()} "
            "(it is asked again: a cluster may refuse while it elects a leader)"
        )

    def subscription_granted(self, filters: Iterable[str]) -> None:
        """Log that the broker granted subscriptions that it had refused."""
        self._acl_logged = False
        log_event("broker-acl", f"the broker granted the subscription to {', '.join(filters)} after all")

    def status_received(self) -> None:
        """Note that our own status came back: a later ACL error is logged again."""
        self._acl_logged = False

    def _log_acl(self, sentence: str) -> None:
        if not self._acl_logged:
            self._acl_logged = True
            log_event("broker-acl", sentence, level=logging.ERROR)

    def _user(self) -> str:
        user = self._login.username
        return f"user {user}" if user else f"client {self._login.client_id}"
