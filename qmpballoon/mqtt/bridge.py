"""Keeps one connection to a broker up, and its retained topics current.

On every connect it subscribes, publishes all retained topics again, ``status: online`` last, and checks
that this message comes back: a broker does not report a publish that its ACL denies. While no broker is
connected, publishing only fills slots (see ``outbox``): bounded memory, no waiting.

What is logged about it, and how often: `connection_log`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

import aiomqtt
from aiomqtt.exceptions import MqttConnectError
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.mqtt.commands import arrival_of
from qmpballoon.mqtt.connection import (
    REFUSED_CREDENTIALS,
    UNSUPPORTED_PROTOCOL,
    Broker,
    Connection,
    ContentType,
    Login,
    reason_code,
)
from qmpballoon.mqtt.connection_log import STEADY_S, ConnectionLog
from qmpballoon.mqtt.outbox import Make, Outbox, Pace, Publication
from qmpballoon.mqtt.topics import BIRTH_TOPIC, Topics
from qmpballoon.protocol.payloads import CONTENT_TYPES, Format, encode
from qmpballoon.protocol.requests import Handle, Requests

ECHO_TIMEOUT_S: Final = 5.0
_PARTS: Final = 5  # of that time-out: a delay of our own loop ends one of them only
ANNOUNCE_INTERVAL_S: Final = 0.2
OFFLINE_TIMEOUT_S: Final = 2.0
SHORTEST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
REFUSED_PAUSE_S: Final = (
    60.0  # a bad password stays bad until it is corrected, and some brokers ban clients that retry
)
BIRTH_WAIT_S: Final = (1.0, 10.0)

_PACE_S: Final = 0.02  # between the repetitions that `Pace` allows

_CONTENT_TYPES: Final = {name: ContentType(media_type) for name, media_type in CONTENT_TYPES.items()}


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """What the bridge needs of the configuration.

    ``brokers``, at least one, are tried in turn. ``protocol`` ``auto`` is 5, and 3.1.1 where a broker
    refuses it. ``host`` is the plain host name; the bridge makes it safe for topics. Files are paths.
    ``response_topics`` are filters of the MQTT 5 response topics that are used.
    """

    brokers: tuple[Broker, ...]
    client_id: str
    host: str
    base_topic: str = "qmpballoon"
    protocol: Literal["auto", "5", "3.1.1"] = "auto"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    payload: Format = "json"
    heartbeat_s: float = 60.0
    min_interval_s: float = 1.0
    samples: bool = False
    response_topics: tuple[str, ...] = ("#",)


class Bridge:
    """The agent's side of MQTT; `run` it in a task, publish through it from anywhere in the loop.

    ``handle`` carries out a request (see `Handle`). ``vm_exists`` returns whether there is a VM of that
    name in topics. ``announced_before`` are the retained topics of the last run. ``on_announced`` is
    called with all topics that a later run may have to clear, before the first message to a new one;
    it must not wait. All that is new within ANNOUNCE_INTERVAL_S is announced in one call.
    """

    def __init__(
        self,
        settings: BridgeSettings,
        handle: Handle,
        *,
        vm_exists: Callable[[str], bool],
        announced_before: Iterable[str] = (),
        on_announced: Callable[[frozenset[str]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.topics: Final = Topics(settings.base_topic, settings.host, settings.response_topics)
        self._settings = settings
        self._clock = clock
        self._login = Login(
            settings.client_id,
            settings.username,
            settings.password,
            settings.ca_file,
            settings.cert_file,
            settings.key_file,
        )
        self._wake = asyncio.Event()
        self._outbox = Outbox(self._wake.set, self.topics.status)
        self._outbox.retain(self.topics.status, lambda: "online")
        self._requests = Requests(handle, vm_exists, clock)
        self._announced = set(announced_before)
        self._announced_changed = asyncio.Event()
        self._has_unannounced = False
        self._on_announced = on_announced
        self._announce(self.topics.status)
        self._online = asyncio.Event()
        self._seen_status = asyncio.Event()
        self._birth = asyncio.Event()
        self._connection: Connection | None = None
        self._only_311: set[Broker] = set()
        self._connected_at_s: float | None = None  # of the current or the last connection
        self._log = ConnectionLog(self._login, self.topics, clock)

    # What the agent publishes.

    @property
    def connected(self) -> bool:
        """Whether ``status: online`` was sent over the current connection."""
        return self._online.is_set()

    @property
    def connection(self) -> Connection | None:
        """The current connection, if any."""
        return self._connection

    async def wait_connected(self, timeout_s: float) -> bool:
        """Wait until `connected`; return False if that takes longer than ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._online.wait()
        except TimeoutError:
            return False
        return True

    def retain(self, topic: str, make: Make) -> None:
        """Publish what ``make()`` returns as the topic's retained value.

        ``make`` is called at the moment of sending, and again on each connect; a later call of `retain`
        replaces it. Text is sent as it is, anything else as an object in the configured format.
        """
        self._announce(topic)
        self._outbox.retain(topic, make)

    def clear(self, topic: str) -> None:
        """Remove the topic's retained value from the broker, now or on the next connect."""
        self._outbox.clear(topic)

    def clear_leftovers(self) -> None:
        """Clear the topics of an earlier run that this run does not retain; call it after all `retain`."""
        for topic in self._announced.difference(self._outbox.topics):
            self._outbox.clear(topic)

    def event(self, topic: str, value: object) -> None:
        """Publish an event; without a connection it is dropped."""
        self._outbox.event(topic, lambda: value)

    def sample(self, topic: str, make: Make) -> None:
        """Publish at QoS 0; a sample that was not sent yet is replaced."""
        self._outbox.sample(topic, make)

    # The connection.

    async def run(self) -> None:
        """Stay connected until cancelled; then answer pending requests, publish ``offline`` and disconnect.

        An exception of a handler or maker that is outside the package's error tree is raised.
        """
        try:
            async with asyncio.TaskGroup() as group:
                self._requests.open(group)
                await self._keep_connected()
        finally:
            self._requests.stop()

    async def _keep_connected(self) -> None:
        brokers = deque(self._settings.brokers)
        pause_s, failures = SHORTEST_PAUSE_S, 0
        while True:
            broker = brokers[0]
            error = await self._session(broker)
            if self._should_fall_back(broker, error):
                self._only_311.add(broker)
                self._log.only_311(broker)
                continue
            if self._connected_at_s is not None:
                held_s = self._clock() - self._connected_at_s
                self._log.lost(broker, error, held_s)
                failures = 0
                if held_s >= STEADY_S:
                    pause_s = SHORTEST_PAUSE_S
            else:
                self._log.failed(broker, error)
                failures += 1
                brokers.rotate(-1)
                if failures % len(brokers):
                    continue
            refused = isinstance(error, MqttConnectError) and reason_code(error) in REFUSED_CREDENTIALS
            await asyncio.sleep((REFUSED_PAUSE_S if refused else pause_s) * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def _session(self, broker: Broker) -> aiomqtt.MqttError:
        """Connect to one broker and serve the connection until it ends; return the reason."""
        mqtt5 = self._settings.protocol == "5" or (
            self._settings.protocol == "auto" and broker not in self._only_311
        )
        connection = Connection(
            broker,
            self._login,
            mqtt5=mqtt5,
            will=aiomqtt.Will(self.topics.status, "offline", qos=1, retain=True),
            confirmed=self._confirmed,
            refused=self._refused,
        )
        lost: aiomqtt.MqttError | None = None
        self._seen_status.clear()
        self._connected_at_s = None
        try:
            await connection.open()
            refused = await connection.subscribe((*self._filters, BIRTH_TOPIC))
            _raise_if_cancelled()  # aiomqtt uses asyncio.wait_for, which may lose it (CPython 3.11)
            if unreadable := [one for one in refused if one != BIRTH_TOPIC]:  # which is optional
                self._log.subscription_refused(unreadable)
            self._connection, self._connected_at_s = connection, self._clock()
            self._outbox.connected(self._clock())
            self._wake.set()
            async with asyncio.TaskGroup() as group:
                group.create_task(self._report_announced(), name="mqtt announced")
                group.create_task(self._send(connection, broker), name="mqtt send")
                group.create_task(self._receive(connection), name="mqtt receive")
                group.create_task(self._check_status(), name="mqtt self-check")
                group.create_task(self._republish_on_birth(), name="mqtt birth")
                await connection.wait_lost()
        except* aiomqtt.MqttError as errors:
            lost = _first(errors)
        finally:
            try:
                if self._connection is not None and lost is None:
                    await self._publish_offline(connection)
            finally:
                if self._connection is not None:
                    self._online.clear()
                    self._outbox.disconnected(connection.unconfirmed)
                    self._connection = None
                await connection.close()
        # If a loss and a cancellation coincide, the group raises the loss alone (CPython 3.11). The count
        # of cancellations is right if an exception of the group's body ended the group, as here.
        _raise_if_cancelled()
        return lost or aiomqtt.MqttError("closed")

    @property
    def _filters(self) -> tuple[str, ...]:
        return (*self.topics.subscriptions(), self.topics.status)

    async def _send(self, connection: Connection, broker: Broker) -> None:
        pace = Pace()
        while True:
            if self._outbox.has_repeats:
                with suppress(TimeoutError):
                    async with asyncio.timeout(_PACE_S):
                        await self._wake.wait()
            else:
                await self._wake.wait()
            self._wake.clear()
            while True:
                await connection.wait_window()
                publication = self._outbox.take(
                    retained=not self._has_unannounced, repeats=pace.allows(self._clock())
                )
                if publication is None:
                    break
                if publication.is_repeat:
                    pace.count()
                self._publish(connection, publication)
                if publication.topic == self.topics.status and not self._online.is_set():
                    self._online.set()
                    self._log.connected(broker, mqtt5=connection.mqtt5)

    def _publish(self, connection: Connection, publication: Publication) -> None:
        value = None if publication.make is None else publication.make()
        answer = publication.answer
        payload_format = self._settings.payload if answer is None else answer.payload_format
        if value is None or isinstance(value, str):
            connection.send(publication, b"" if value is None else value.encode("utf-8", "replace"), None)
            return
        properties: Properties | None = None
        if connection.mqtt5:
            properties = _CONTENT_TYPES[payload_format]
            if answer is not None and answer.correlation is not None:
                properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
                properties.ContentType = CONTENT_TYPES[payload_format]
                properties.CorrelationData = answer.correlation
        connection.send(publication, encode(value, payload_format), properties)

    async def _receive(self, connection: Connection) -> None:
        while True:
            message = await connection.receive()
            topic, payload = message.topic, message.payload
            if topic == self.topics.status:
                if connection.mqtt5 or not message.retain:  # else it is the value retained before
                    self._on_status(payload)
            elif topic == BIRTH_TOPIC:
                if payload == b"online" and not message.retain:
                    self._birth.set()
            else:
                arrival = arrival_of(message, self.topics, self._outbox.answer, self._clock)
                if arrival is not None:
                    self._requests.receive(arrival)

    def _on_status(self, payload: bytes) -> None:
        if payload == b"online":
            self._seen_status.set()
        elif self._seen_status.is_set():
            # The will of our previous connection, which the broker closed only now.
            self._seen_status.clear()
            self._outbox.retain(self.topics.status, lambda: "online")

    async def _check_status(self) -> None:
        await self._online.wait()
        for _ in range(_PARTS):
            with suppress(TimeoutError):
                async with asyncio.timeout(ECHO_TIMEOUT_S / _PARTS):
                    await self._seen_status.wait()
                self._log.status_received()
                return
        self._log.status_missing(ECHO_TIMEOUT_S)

    async def _republish_on_birth(self) -> None:
        while True:
            await self._birth.wait()
            await asyncio.sleep(random.uniform(*BIRTH_WAIT_S))  # all agents receive it at once
            self._birth.clear()
            self._outbox.republish()

    async def _publish_offline(self, connection: Connection) -> None:
        """Answer pending requests, publish ``offline``, and wait a bounded time for its PUBACK."""
        self._requests.stop()
        try:
            while (publication := self._outbox.take_answer()) is not None:
                self._publish(connection, publication)
            offline = Publication(self.topics.status, lambda: "offline", retain=True)
            self._publish(connection, offline)
        except aiomqtt.MqttError:
            return  # the connection was lost: the will publishes it
        await connection.wait_all_confirmed(OFFLINE_TIMEOUT_S)

    # Topics that have, or had, a retained value.

    def _announce(self, topic: str) -> None:
        if topic not in self._announced:
            self._announced.add(topic)
            self._has_unannounced = self._on_announced is not None
            self._announced_changed.set()

    async def _report_announced(self) -> None:
        """Pass the announced topics on when they change, all at once: not for each of many new VMs.

        Retained topics are held back meanwhile.
        """
        if self._on_announced is None:
            return
        while True:
            await self._announced_changed.wait()
            self._announced_changed.clear()
            self._has_unannounced = False
            self._on_announced(frozenset(self._announced))
            self._wake.set()
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    def _confirmed(self, publication: Publication) -> None:
        if self._outbox.confirmed(publication):
            self._announced.discard(publication.topic)
            self._announced_changed.set()

    def _refused(self, publication: Publication, reason: str) -> None:
        if publication.answer is None or publication.topic.startswith(f"{self.topics.root}/"):
            self._log.publish_refused(publication.topic, reason)

    def _should_fall_back(self, broker: Broker, error: aiomqtt.MqttError) -> bool:
        return (
            self._settings.protocol == "auto"
            and broker not in self._only_311
            and isinstance(error, MqttConnectError)
            and reason_code(error) == UNSUPPORTED_PROTOCOL
        )


def _raise_if_cancelled() -> None:
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


def _first(errors: BaseExceptionGroup[aiomqtt.MqttError]) -> aiomqtt.MqttError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
