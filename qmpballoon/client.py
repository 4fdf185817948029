"""The other side of MQTT, for programs: a client of a broker on which agents publish.

::

    async with Client("mqtt://localhost") as client:
        for vm in client.vms.values():
            print(vm.id, vm.online, vm.actual)
        await client.request("edge-7/web1", "set-target", target="256MiB", wait_s=10)
        async for event in client.events():
            print(event.host, event.vm, event.event, event.data)

A `Client` is for one connection: when it is lost, every call raises ConnectionLost, and a new client is
needed.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.config.values import BrokerUrl, broker_url
from qmpballoon.errors import (
    ConfigurationError,
    ConnectionLost,
    NoAnswer,
    NotReached,
    Problem,
    RequestRefused,
    answered_error,
)
from qmpballoon.fleet import Fleet, FleetEvent, FleetHost, FleetVm
from qmpballoon.model.names import safe_name
from qmpballoon.model.records import VmState
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.connection import Broker, Login
from qmpballoon.mqtt.limits import NOT_AUTHORIZED, REFUSED, packet_size
from qmpballoon.mqtt.link import Link
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Packet
from qmpballoon.mqtt.replies import Replies, Waiting
from qmpballoon.mqtt.topics import FleetTopics, Topics
from qmpballoon.protocol.objects import state_of
from qmpballoon.protocol.payloads import CONTENT_TYPES, encode
from qmpballoon.protocol.verbs import DEADLINE_S, HAS_DEADLINE, LONGEST_WAIT_S
from qmpballoon.readers import Wrong

_MOST_COLLECTED: Final = 100_000

QUIET_S: Final = 2.0  # without another retained message the broker has sent all that it has
FLEET_QUIET_S: Final = 0.5  # the same, where what comes later is taken as well


class Client:
    """A connection to the first of the brokers that can be reached; use it as an async context manager.

    ``broker_url`` is one URL (mqtt, mqtts, ws, wss) or several, tried in turn, with MQTT 5, and 3.1.1 where a
    broker refuses it. Files are paths of PEM files. ``timeout_s`` limits each connect, and each wait for the
    broker or an agent. Agents publish below ``base_topic``.

    On entering, it has read what the broker retains of the fleet, and takes what is new from then on. With
    ``fleet=False`` it does neither: ``hosts``, ``vms`` and ``events`` stay empty.

    Raises:
        ConfigurationError: not a URL, or no base of topics.
        Unreachable: on entering: no broker can be reached, or all refuse the connection.
        RequestRefused: on entering: ``not-allowed``: the broker refuses a subscription.
    """

    def __init__(
        self,
        broker_url: str | BrokerUrl | Sequence[str | BrokerUrl],
        *,
        username: str | None = None,
        password: str | None = None,
        ca_file: str | None = None,
        cert_file: str | None = None,
        key_file: str | None = None,
        timeout_s: float = 10.0,
        base_topic: str = "qmpballoon",
        fleet: bool = True,
    ) -> None:
        given = [broker_url] if isinstance(broker_url, str | BrokerUrl) else broker_url
        self._brokers = [_broker(url) for url in given]
        self._topics = _topics(base_topic)
        client_id = f"qmpballoon-{secrets.token_hex(4)}"  # 23 characters at most: MQTT 3.1.1 section 3.1.3
        self._login = Login(client_id, username, password, ca_file, cert_file, key_file)
        self._timeout_s = timeout_s
        self._follows = fleet
        self._fleet = Fleet(self._topics)
        self._link = Link()
        self._collected: dict[str, bytes] | None = None  # by `retained`
        self._refusals: dict[str, str] = {}  # by topic
        self._replies = Replies(client_id)
        self._answers_on: set[str] = set()  # filters that are subscribed to
        self._probed = False  # whether it is known if our own topic of answers works
        self._asks_first = asyncio.Lock()  # held while a subscription is made

    async def __aenter__(self) -> Self:
        """Connect, and read the fleet."""
        await self._link.open(
            self._brokers, self._login, self._timeout_s, received=self._take, confirmed=self._note_confirmed
        )
        if self._follows:
            await self._follow()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disconnect."""
        await self._link.close()

    # ── the fleet ────────────────────────────────────────────────────────────────────────────────

    @property
    def base_topic(self) -> str:
        """The start of all topics."""
        return self._topics.base

    @property
    def hosts(self) -> Mapping[str, FleetHost]:
        """The hosts by their names in topics: a live view, of frozen records."""
        return self._fleet.hosts

    @property
    def vms(self) -> Mapping[str, FleetVm]:
        """The VMs by host and name in topics, such as ``edge-7/web1``: a live view, of frozen records."""
        return self._fleet.vms

    async def changed(self, timeout_s: float) -> bool:
        """Wait until a message about the fleet comes; return False if none comes in time.

        Raises:
            ConnectionLost: the connection ended.
        """
        return await self._link.wait(self._link.news, timeout_s)

    def events(self) -> AsyncIterator[FleetEvent]:
        """Iterate over the events of all hosts and VMs since this call; ends with ConnectionLost.

        10,000 events wait for a reader; one that is slower gets one event ``lagged`` instead of those missed.
        """
        return self._events(self._fleet.events.count)

    async def _events(self, read: int) -> AsyncIterator[FleetEvent]:
        while True:
            news = self._link.news
            while (found := self._fleet.events.since(read)) is not None:
                read, event = found
                yield event
            await self._link.wait(news, None)

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    async def request(
        self, target: str, verb: str, /, *, timeout_s: float | None = None, **arguments: object
    ) -> object:
        """Ask a VM (``host/vm``) or a host (``host``), and return the ``result`` of its agent's answer.

        ``arguments`` are those of the verb, as JSON values. ``timeout_s`` is by default that of the client,
        and what the verb may take by its own arguments (``wait_s``, ``deadline_s``). An agent that receives
        the request later than that does not carry it out, over MQTT 5.

        Raises:
            NoAnswer: none came in time, or the broker knows that no agent receives it.
            ConnectionLost: the connection to the broker ended.
            QmpBalloonError: what the agent answered, its word in ``code``: Unreachable, NoBalloon,
                OutOfRange, NotReady, NotReached, or RequestRefused for the other words. RequestRefused also
                says that the broker does not take the request (``not-allowed``), or that the target is no
                name.
        """
        allowed_s = self._timeout_s if timeout_s is None else timeout_s
        takes_s = _takes_s(verb, arguments) if timeout_s is None else 0.0
        response = await self._response(target, verb, arguments, allowed_s, takes_s)
        if response.get("status") == "ok":
            return response.get("result")
        error = response.get("error")
        error = error if isinstance(error, Mapping) else {}
        word, message = str(error.get("code")), str(error.get("message"))
        if word == "not-reached" and (state := await self._state(target)) is not None:
            raise NotReached(state.target, state, takes_s, message)
        raise answered_error(word, message)

    async def _response(
        self, target: str, verb: str, arguments: Mapping[str, object], allowed_s: float, takes_s: float
    ) -> Mapping[str, object]:
        """Send a request and return its response object."""
        host, vm = _host_and_vm(target)
        topics = Topics(self._topics.base, host)
        waits_s = allowed_s + takes_s
        await self._listen_for_answers(topics.host, vm, verb)
        waiting = self._replies.expect(topics.request(vm, verb))
        try:
            await self._send(waiting, arguments, expiry_s=math.ceil(allowed_s))
            is_done = await self._link.wait(waiting.answer, waits_s)
        finally:
            self._replies.forget(waiting)
        if waiting.refused:
            reason = f"the broker does not let {self._user} write to {waiting.publication.topic}"
            raise RequestRefused("not-allowed", f"{reason} ({waiting.refused}): check its ACL")
        if not is_done:
            raise NoAnswer(f"{target}: no answer to {verb} within {waits_s:g} s")
        if (response := waiting.answer.result()) is None:
            raise NoAnswer(f"{target}: no agent of the host {topics.host} is connected to the broker")
        return response

    async def _state(self, target: str) -> VmState | None:
        """Return the state of a VM, None if its agent does not tell."""
        try:
            response = await self._response(target, "get", {}, self._timeout_s, 0.0)
        except NoAnswer:
            return None
        document = response.get("result")
        return state_of(document) if isinstance(document, Mapping) else None

    async def _send(self, waiting: Waiting, arguments: Mapping[str, object], *, expiry_s: int) -> None:
        payload = encode({"transaction": waiting.transaction, **arguments}, "json")
        topic, properties = waiting.publication.topic, None
        if self._link.connection.mqtt5:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.ContentType = CONTENT_TYPES["json"]
            properties.CorrelationData = waiting.transaction.encode()
            properties.MessageExpiryInterval = max(1, expiry_s)
            if self._reply_topic in self._answers_on:
                properties.ResponseTopic = self._reply_topic
        await self._link.send(Packet(waiting.publication, payload, properties, packet_size(topic, payload)))

    async def _listen_for_answers(self, host: str, vm: str | None, verb: str) -> None:
        """Subscribe to where the agent answers: our own topic over MQTT 5, and the verb's.

        An agent of MQTT 3.1.1 knows no response topic, and the broker may not let it write to ours.
        """
        answers = self._topics.responses(host, vm, verb)
        if answers in self._answers_on:
            return
        async with self._asks_first:
            if self._link.connection.mqtt5 and not self._probed:
                await self._synchronise(())
            if answers not in self._answers_on:
                await self._subscribe((answers,))
                self._answers_on.add(answers)

    @property
    def _reply_topic(self) -> str:
        return self._topics.replies(self._login.client_id)

    # ── what is retained ─────────────────────────────────────────────────────────────────────────

    async def _follow(self) -> None:
        try:
            await self._synchronise(self._topics.filters)
            # mosquitto drops what waits for a client beyond 1000 messages: read the rest host by host.
            deadline_s = time.monotonic() + self._timeout_s
            for host in self._fleet.incomplete():
                if time.monotonic() < deadline_s:
                    await self._synchronise(self._topics.of_vms(host))
        except BaseException:
            await self._link.close()
            raise

    async def _synchronise(self, filters: tuple[str, ...]) -> None:
        """Subscribe, and wait until what the broker retains has come: until a message of our own follows it.

        If that does not come back, because the broker does not let us write or read there, wait until it is
        quiet for FLEET_QUIET_S, and use no topic of our own.
        """
        reply, self._probed = self._reply_topic, True
        await self._subscribe((*filters, reply), optional=(reply,))
        probe = self._replies.expect(reply)
        deadline_s = time.monotonic() + self._timeout_s
        try:
            await self._send(probe, {"status": "probe"}, expiry_s=1)
            while (left_s := deadline_s - time.monotonic()) > 0:
                if probe.answer.done() and (probe.answer.result() is not None or not filters):
                    break
                if not await self._link.wait(self._link.news, min(FLEET_QUIET_S, left_s)):
                    break
        finally:
            self._replies.forget(probe)
        if probe.answer.done() and probe.answer.result() is not None:
            self._answers_on.add(reply)

    async def _subscribe(self, filters: tuple[str, ...], *, optional: tuple[str, ...] = ()) -> None:
        refused = await self._link.subscribe(filters, self._timeout_s)
        if unreadable := [one for one in refused if one not in optional]:
            raise RequestRefused(
                "not-allowed",
                f"the broker refuses {self._user} to read {', '.join(unreadable)}: check its ACL",
            )

    async def retained(
        self, *filters: str, enough: Callable[[Mapping[str, bytes]], bool] = lambda found: False
    ) -> dict[str, bytes]:
        """Return the retained messages that match the filters, by topic.

        All have come when the broker is quiet for QUIET_S, or earlier when what has come is ``enough``.

        Raises:
            RequestRefused: ``not-allowed``: the broker refuses a subscription.
            ConnectionLost: the connection ended.
        """
        found: dict[str, bytes] = {}
        self._collected = found
        await self._subscribe(filters)
        known, quiet_at_s = len(found), time.monotonic() + QUIET_S
        while (left_s := quiet_at_s - time.monotonic()) > 0 and not enough(found):
            if not await self._link.wait(self._link.news, left_s):
                break
            if len(found) > known:
                known, quiet_at_s = len(found), time.monotonic() + QUIET_S
        self._collected = None
        return found

    async def clear(self, topics: Iterable[str]) -> dict[str, str]:
        """Remove the retained messages of topics; return those that the broker refused, with its reason.

        Brokers of MQTT 3.1.1 refuse silently: only `retained` tells.

        Raises:
            ConnectionLost: the connection ended, or the broker confirms nothing.
        """
        self._refusals.clear()
        for topic in topics:
            await self._link.send(_clearing(topic))
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        is_confirmed = await self._link.connection.window.wait_fewer(1, deadline_s)
        self._link.check()
        if not is_confirmed:
            raise ConnectionLost(f"the broker confirmed nothing for {self._timeout_s:g} s")
        return dict(self._refusals)

    # ── the connection ───────────────────────────────────────────────────────────────────────────

    @property
    def _user(self) -> str:
        return f"user {self._login.username}" if self._login.username else "an anonymous client"

    def _take(self, message: Message) -> None:
        topic, payload, found = message.topic, message.payload, self._collected
        if topic == self._reply_topic or "/response/" in topic.removeprefix(self._topics.base):
            self._replies.take(message)
        elif self._follows:
            self._fleet.take(topic, payload, retained=message.retain, content_type=message.content_type)
        if found is not None and message.retain and payload and len(found) < _MOST_COLLECTED:
            found[topic] = payload
        self._link.note_news()

    def _note_confirmed(self, publication: Publication, code: int) -> None:
        self._replies.confirmed(publication, code)
        if code >= REFUSED:
            self._refusals[publication.topic] = (
                "not authorized" if code == NOT_AUTHORIZED else f"reason code {code:#04x}"
            )
        self._link.note_news()


def _clearing(topic: str) -> Packet:
    return Packet(Publication(topic, None, qos=1, retain=True), b"", None, packet_size(topic, b""))


def _host_and_vm(target: str) -> tuple[str, str | None]:
    """Return the names in topics of a host, and of its VM if one is named."""
    host, slash, vm = target.partition("/")
    if not host or (slash and not vm) or "/" in vm:
        raise RequestRefused("malformed", f"{target!r} is neither HOST nor HOST/VM")
    return safe_name(host), safe_name(vm) if slash else None


def _takes_s(verb: str, arguments: Mapping[str, object]) -> float:
    """Return how long an agent may take by the request itself."""
    given = [arguments.get(key) for key in ("wait_s", "deadline_s")]
    takes_s = [max(0.0, min(LONGEST_WAIT_S, each)) for each in given if isinstance(each, int | float)]
    return max(takes_s, default=DEADLINE_S if verb in HAS_DEADLINE else 0.0)


def _topics(base: str) -> FleetTopics:
    try:
        return FleetTopics(base)
    except ValueError as error:
        raise ConfigurationError("base topic", [Problem(None, "", str(error))]) from None


def _broker(url: str | BrokerUrl) -> Broker:
    try:
        read: BrokerUrl = url if isinstance(url, BrokerUrl) else broker_url(url)
    except Wrong as wrong:
        raise ConfigurationError("broker", [Problem(None, "", wrong.reason)]) from None
    return Broker(read.scheme, read.host, read.port, read.path)
