"""Keeps one connection to a broker up, and its retained topics current.

On every connect it subscribes, publishes all retained topics again, ``status: online`` last, and checks
that this message comes back: a broker does not report a publish that its ACL denies. While no broker is
connected, publishing only fills slots (see ``outbox``): bounded memory, no waiting.

What a broker does not take is not sent to it: see `limits`, `guesses` and `packets`. Where it retains
nothing, all is published again every WITHOUT_RETAIN_S. What somebody else changed is corrected: see `said`.
What is logged, and how often: `connection_log`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

import aiomqtt

from qmpballoon.mqtt.announced import Announced, Report
from qmpballoon.mqtt.answers import SETTLED_S
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.connection import (
    CONNECT_TIMEOUT_S,
    Broker,
    Connection,
    Login,
)
from qmpballoon.mqtt.connection_log import STEADY_S, ConnectionLog
from qmpballoon.mqtt.known_broker import KnownBroker, refuses_login
from qmpballoon.mqtt.limits import (
    NO_MATCHING_SUBSCRIBERS,
    REFUSED,
)
from qmpballoon.mqtt.outbox import Make, Outbox, Publication, Rank
from qmpballoon.mqtt.own_status import OwnStatus
from qmpballoon.mqtt.packets import Composer
from qmpballoon.mqtt.request_reader import RequestReader
from qmpballoon.mqtt.said import Said
from qmpballoon.mqtt.sender import Sender
from qmpballoon.mqtt.subscribing import subscribe_again
from qmpballoon.mqtt.topics import DISCOVERY_PREFIX, Topics
from qmpballoon.mqtt.versions import ANSWERS_5_WITHIN_S, Protocol
from qmpballoon.protocol.payloads import Format
from qmpballoon.protocol.requests import Handle, NoteAnswer, Requests

OFFLINE_TIMEOUT_S: Final = 2.0
_ANSWERS_TIMEOUT_S: Final = 1.5  # of that time: ``offline`` is sent also if answers are not confirmed
SHORTEST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 30.0
REFUSED_PAUSE_S: Final = (
    60.0  # a bad password stays bad until it is corrected, and some brokers ban clients that retry
)
BIRTH_WAIT_S: Final = (1.0, 10.0)
WITHOUT_RETAIN_S: Final = 10.0
LOOK_S: Final = 1.0  # for topics whose heartbeat is due


@dataclass(frozen=True, slots=True)
class BridgeSettings:
    """What the bridge needs of the configuration.

    ``brokers``, at least one, are tried in turn. ``protocol`` ``auto`` is 5, and 3.1.1 where a broker
    refuses it. ``host`` is the plain host name; the bridge makes it safe for topics. Files are paths.
    ``response_topics`` are filters of the MQTT 5 response topics that are used. ``discovery_prefix`` is that
    of Home Assistant.
    """

    brokers: tuple[Broker, ...]
    client_id: str
    host: str
    base_topic: str = "qmpballoon"
    protocol: Protocol = "auto"
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
    discovery_prefix: str = DISCOVERY_PREFIX


class Bridge:
    """The agent's side of MQTT; `run` it in a task, publish through it from anywhere in the loop.

    ``handle`` carries out a request (see `Handle`). ``vm_exists`` returns whether there is a VM of that
    name in topics. ``announced_before`` are the retained topics of the last run. ``on_announced`` is
    awaited with all topics that a later run may have to clear, before the first message to a new one
    (see `Announced`). ``note_answer`` counts answers (see `NoteAnswer`).
    """

    def __init__(
        self,
        settings: BridgeSettings,
        handle: Handle,
        *,
        vm_exists: Callable[[str], bool],
        announced_before: Iterable[str] = (),
        on_announced: Report | None = None,
        note_answer: NoteAnswer = lambda verb, outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.topics: Final = Topics(
            settings.base_topic, settings.host, settings.response_topics, settings.discovery_prefix
        )
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
        before = frozenset(announced_before)
        self._outbox = Outbox(self._wake.set, self.topics.status, before)
        self._publish_status()
        self._announced = Announced(before, on_announced)
        self._announced.add(self.topics.status)
        self._said = Said(clock)
        self._online = asyncio.Event()
        self._birth = asyncio.Event()
        self._connection: Connection | None = None
        self._connected_at_s: float | None = None  # of the current or the last connection
        self._known = {one: KnownBroker(one, settings.protocol, clock) for one in settings.brokers}
        self._log = ConnectionLog(self._login, self.topics, clock)
        self._status = OwnStatus(self._log, self._publish_status)
        self._requests = Requests(handle, vm_exists, clock, note_answer)
        self._reader = RequestReader(
            self._requests, vm_exists, self.topics, self._outbox, clock, self._log.request_dropped
        )

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

    def retain(self, topic: str, make: Make, *, rank: Rank = Rank.USUAL) -> None:
        """Publish what ``make()`` returns as the topic's retained value.

        ``make`` is called at the moment of sending, and again on each connect; a later call of `retain`
        replaces it. Text is sent as it is, anything else as an object in the configured format.
        """
        self._announced.add(topic)
        self._outbox.retain(topic, make, rank=rank)

    def clear(self, topic: str) -> None:
        """Remove the topic's retained value from the broker, now or on the next connect."""
        if not self._outbox.clear(topic):
            self._announced.discard(topic)

    def clear_leftovers(self) -> None:
        """Clear the topics of an earlier run that this run does not retain; call it after all `retain`."""
        for topic in self._announced.topics - set(self._outbox.topics):
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
                group.create_task(self._reader.run(), name="mqtt requests")
                await self._keep_connected()
        finally:
            self._requests.stop()

    async def _keep_connected(self) -> None:
        brokers = deque(self._known.values())
        pause_s, failures = SHORTEST_PAUSE_S, 0
        while True:
            known = brokers[0]
            limits = known.guesses.limits
            error = await self._session(known)
            if known.guesses.limits != limits:
                pause_s = SHORTEST_PAUSE_S
            if isinstance(error, _Again) or (self._connected_at_s is None and known.refused(error)):
                continue
            if self._connected_at_s is not None:
                held_s = self._clock() - self._connected_at_s
                failures = 0
                if held_s >= STEADY_S:
                    pause_s = SHORTEST_PAUSE_S
            else:
                self._log.failed(known.broker, error)
                failures += 1
                brokers.rotate(-1)
                if failures % len(brokers):
                    continue
            longest_s = REFUSED_PAUSE_S if refuses_login(error) else pause_s
            await asyncio.sleep(longest_s * random.uniform(0.5, 1.0))
            pause_s = min(LONGEST_PAUSE_S, pause_s * 2)

    async def _session(self, known: KnownBroker) -> aiomqtt.MqttError:
        """Connect to one broker and serve the connection until it ends; return the reason."""
        broker, versions, guesses = known.broker, known.versions, known.guesses
        mqtt5 = versions.mqtt5
        limits, alone = guesses.limits, guesses.one_at_a_time
        connection = Connection(
            broker,
            self._login,
            mqtt5=mqtt5,
            answers_within_s=ANSWERS_5_WITHIN_S if versions.is_doubtful else CONNECT_TIMEOUT_S,
            will=aiomqtt.Will(self.topics.status, "offline", qos=limits.qos, retain=limits.retain),
            received=self._received,
            confirmed=self._confirmed,
        )
        lost: aiomqtt.MqttError | None = None
        sender: Sender | None = None
        self._status.seen.clear()
        self._connected_at_s = None
        try:
            await connection.open()
            if not guesses.established():
                raise _Again("the usual last will is tried again")
            limits = limits.within(connection.announced)
            connection.window.limit = limits.window
            self._resume_answers(mqtt5=mqtt5)  # before the first request of this connection
            refused = await connection.subscribe((*self._filters, self.topics.birth))
            _raise_if_cancelled()  # aiomqtt uses asyncio.wait_for, which may lose it (CPython 3.11)
            if unreadable := [one for one in refused if one != self.topics.birth]:  # which is optional
                self._log.subscription_refused(unreadable)
            self._said.connected(echoes=not mqtt5)
            self._connection, self._connected_at_s = connection, self._clock()
            if versions.established():
                self._log.only_311(broker)
            self._log.limited(broker, limits)
            self._outbox.connected()
            self._wake.set()
            composer = Composer(limits, self._settings.payload, mqtt5)
            sender = Sender(
                connection,
                composer,
                self._outbox,
                self._announced,
                self._said,
                guesses,
                self._wake,
                self._clock,
                self._log.too_large,
            )
            async with asyncio.TaskGroup() as group:
                group.create_task(self._announced.run(self._wake.set), name="mqtt announced")
                group.create_task(sender.run(self._sent), name="mqtt send")
                group.create_task(self._check_status(), name="mqtt self-check")
                group.create_task(self._republish_on_birth(), name="mqtt birth")
                group.create_task(self._look_after(connection, retains=limits.retain), name="mqtt look")
                if not limits.retain:
                    group.create_task(self._republish_at_intervals(), name="mqtt without retain")
                if refused:
                    again = subscribe_again(connection, refused, self._log.subscription_granted)
                    group.create_task(again, name="mqtt subscribe again")
                await connection.wait_lost()
        except* aiomqtt.MqttError as errors:
            lost = _first(errors)
        finally:
            try:
                if sender is not None and lost is None:
                    await self._publish_offline(sender)
            finally:
                if self._connection is not None:
                    self._online.clear()
                    self._take_end(connection, known, lost, was_alone=alone)
                    self._connection = None
                await connection.close()
        # If a loss and a cancellation coincide, the group raises the loss alone (CPython 3.11). The count
        # of cancellations is right if an exception of the group's body ended the group, as here.
        _raise_if_cancelled()
        return lost or aiomqtt.MqttError("closed")

    @property
    def _filters(self) -> tuple[str, ...]:
        return (*self.topics.subscriptions(), self.topics.status)

    def _take_end(
        self, connection: Connection, known: KnownBroker, error: aiomqtt.MqttError | None, *, was_alone: bool
    ) -> None:
        """Queue again what was not confirmed, and learn from the end of the connection."""
        sent = connection.window.unconfirmed
        self._outbox.disconnected([one.publication for one in sent])
        if error is not None and self._connected_at_s is not None:
            held_s = self._clock() - self._connected_at_s
            self._log.lost(known.broker, error, held_s, is_idle=not sent)
            known.lost(error, sent, connection.window.largest_confirmed, was_alone=was_alone)

    def _resume_answers(self, *, mqtt5: bool) -> None:
        """Decide what becomes of answers that were made, or not confirmed, before this connection."""
        answers, now_s = self._outbox.answers, self._clock()
        self._log.answers_dropped(answers.drop_old(now_s))
        if not mqtt5:  # it does not report that nobody is subscribed
            answers.put_off_all(now_s + SETTLED_S)

    def _sent(self, publication: Publication) -> None:
        connection = self._connection
        if publication.topic == self.topics.status and connection is not None and not self._online.is_set():
            self._online.set()
            self._log.connected(connection.broker, mqtt5=connection.mqtt5)

    def _received(self, message: Message) -> None:
        connection = self._connection
        if message.topic == self.topics.status:
            if not message.retain or (connection is not None and connection.mqtt5):
                self._status.received(message.payload)  # on 3.1.1 a retained one is the value before
        elif message.topic == self.topics.birth:
            if message.payload == b"online" and not message.retain:
                self._birth.set()
        elif self.topics.is_retained(message.topic):
            if not message.retain or (connection is not None and connection.mqtt5):
                self._correct(message.topic, message.payload)
        else:
            self._reader.put(message)

    def _correct(self, topic: str, payload: bytes) -> None:
        """Publish again what somebody else changed, and clear what is nobody's."""
        if self._outbox.has_value(topic):
            if self._said.heard(topic, payload):
                self._log.corrected(topic)
                self._outbox.say_again(topic)
        elif payload and topic not in self._outbox.topics and self._said.is_news(topic):
            self._log.corrected(topic)
            self._outbox.clear(topic)

    def _publish_status(self) -> None:
        self._outbox.retain(self.topics.status, lambda: "online")

    async def _check_status(self) -> None:
        await self._online.wait()
        await self._status.check(self._is_status_unconfirmed)

    def _is_status_unconfirmed(self) -> bool:
        connection = self._connection
        return connection is not None and any(
            sent.publication.topic == self.topics.status for sent in connection.window.unconfirmed
        )

    async def _republish_on_birth(self) -> None:
        while True:
            await self._birth.wait()
            await asyncio.sleep(random.uniform(*BIRTH_WAIT_S))  # all agents receive it at once
            self._birth.clear()
            self._outbox.republish()

    async def _look_after(self, connection: Connection, *, retains: bool) -> None:
        """Publish what was not published for a heartbeat, and correct what somebody else changed."""
        heartbeat_s = self._settings.heartbeat_s
        if retains:  # where this is refused, the heartbeat heals
            await connection.subscribe(self.topics.retained(), qos=0, own=False)
        while True:
            await asyncio.sleep(min(LOOK_S, heartbeat_s / 4))
            connection.check()
            if retains:
                for topic in self._said.due(heartbeat_s):
                    self._outbox.repeat(topic)

    async def _republish_at_intervals(self) -> None:
        """Publish everything again and again where the broker retains nothing for late subscribers."""
        while True:
            await asyncio.sleep(WITHOUT_RETAIN_S)
            self._outbox.republish()

    async def _publish_offline(self, sender: Sender) -> None:
        """Answer pending requests, publish ``offline``, and wait a bounded time for its PUBACK."""
        self._reader.stop()
        offline = Publication(self.topics.status, lambda: "offline", retain=True)
        with suppress(aiomqtt.MqttError):  # the connection was lost: the will publishes it
            await sender.send_last(offline, answers_within_s=_ANSWERS_TIMEOUT_S, within_s=OFFLINE_TIMEOUT_S)

    def _confirmed(self, publication: Publication, code: int) -> None:
        answer = publication.answer
        if code >= REFUSED:
            if answer is not None and publication.topic == answer.topic != answer.own_topic:
                self._outbox.answer(replace(answer, topic=answer.own_topic))
            elif answer is None or publication.topic.startswith(f"{self.topics.root}/"):
                self._log.publish_refused(publication.topic, code)
        elif answer is not None:
            if code == NO_MATCHING_SUBSCRIBERS and answer.asked_at_s < (self._connected_at_s or 0.0):
                if not self._outbox.answers.unheard(answer, self._clock()):
                    self._log.answers_dropped(1)
                self._wake.set()
        elif self._outbox.confirmed(publication):
            self._announced.discard(publication.topic)
            self._said.forget(publication.topic)
        elif publication.topic == self.topics.status and self._connection is not None:
            self._known[self._connection.broker].guesses.steady()


def _raise_if_cancelled() -> None:
    if (task := asyncio.current_task()) is not None and task.cancelling():
        raise asyncio.CancelledError


class _Again(aiomqtt.MqttError):
    """The connection is to be opened again at once."""


def _first(errors: BaseExceptionGroup[aiomqtt.MqttError]) -> aiomqtt.MqttError:
    error = errors.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error
