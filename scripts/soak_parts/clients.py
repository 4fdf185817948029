"""The MQTT clients of a soak: some that send requests all the time, and one that observes."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import secrets
import socket
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

import aiomqtt
import msgpack  # type: ignore[import-untyped]
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.lab.broker import HOST
from qmpballoon.quick_ack import acknowledge_quickly
from soak_parts.journal import AGENT, Journal
from soak_parts.ledger import Ledger
from soak_parts.requests import Drawn

_MQTT_S: Final = 10.0
_PAUSE_S: Final = 0.3  # between two attempts to connect
_KEPT_DECISIONS: Final = 100  # of one VM
_RETAINED_S: Final = 10.0

Received = Callable[[aiomqtt.Message], None]


@asynccontextmanager
async def _connected(port: int, name: str) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(
        HOST,
        port,
        identifier=name,
        protocol=aiomqtt.ProtocolVersion.V5,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
        timeout=_MQTT_S,
        max_inflight_messages=1000,
    ) as client:
        acknowledge_quickly(client)
        yield client


class Client:
    """A client that connects again when its connection ends; its absence is recorded under its name."""

    def __init__(self, name: str, port: int, topic: str, journal: Journal, received: Received) -> None:
        self.name = name
        self.client: aiomqtt.Client | None = None  # while connected and subscribed
        self._port = port
        self._topic = topic
        self._journal = journal
        self._received = received

    def lost(self) -> None:
        """Take the end of a connection."""

    async def run(self) -> None:
        """Stay connected until cancelled."""
        while True:
            away_s = self._journal.absences.begin(self.name)
            is_away = True
            try:
                async with _connected(self._port, self.name) as client:
                    await client.subscribe(self._topic, qos=1)
                    self.client = client
                    self._journal.absences.end(self.name, away_s)
                    is_away = False
                    async for message in client.messages:
                        self._received(message)
            except aiomqtt.MqttError:
                self._journal.count("connections lost", number=not is_away)
            finally:
                self.client = None
                self.lost()
                if is_away:
                    self._journal.absences.end(self.name, away_s)
            with self._journal.absences.of(self.name):
                await asyncio.sleep(_PAUSE_S)


class Asker(Client):
    """A client that sends requests, one after the other, and records their answers."""

    _numbers = itertools.count(1)

    def __init__(self, name: str, port: int, root: str, journal: Journal, ledger: Ledger) -> None:
        super().__init__(name, port, f"soak/{name}/#", journal, self._answered)
        self._root = root
        self._ledger = ledger

    async def ask_all_the_time(self, drawn: Callable[[], Drawn], rng: random.Random) -> None:
        """Send requests at random intervals until cancelled."""
        while True:
            await asyncio.sleep(rng.uniform(0.01, 0.25))
            if self.client is not None:
                await self._send(self.client, drawn())

    async def _send(self, client: aiomqtt.Client, drawn: Drawn) -> None:
        correlation = f"{self.name}-{next(self._numbers)}".encode()
        properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        properties.ResponseTopic = f"soak/{self.name}/answers"
        properties.CorrelationData = correlation
        if drawn.expiry_s is not None:
            properties.MessageExpiryInterval = drawn.expiry_s
        if drawn.content_type is not None:
            properties.ContentType = drawn.content_type
        self._ledger.sent(
            correlation, self.name, f"{drawn.topic} {drawn.payload[:60]!r}", wait_s=drawn.wait_s
        )
        try:
            await client.publish(f"{self._root}/{drawn.topic}", drawn.payload, qos=1, properties=properties)
        except aiomqtt.MqttError:
            self._ledger.unsent(correlation)

    def _answered(self, message: aiomqtt.Message) -> None:
        correlation = getattr(message.properties, "CorrelationData", None)
        answer = decoded(message.payload)
        status = "without a meaning"
        if isinstance(answer, Mapping):
            error = answer.get("error")
            status = str(error.get("code") if isinstance(error, Mapping) else answer.get("status"))
        if status == "internal":
            self._journal.violation("no bug", f"answered {answer}")
        self._ledger.answered(correlation, status)


class Observer(Client):
    """Receives everything of the host; keeps its status, and the decisions and availability of each VM."""

    def __init__(self, port: int, root: str, journal: Journal) -> None:
        super().__init__("observer", port, f"{root}/#", journal, self._take)
        self.decisions: dict[str, deque[tuple[float, int]]] = defaultdict(
            lambda: deque(maxlen=_KEPT_DECISIONS)
        )
        self.status = b""  # since the client connected; the agent is away while it is not online
        self._not_online_s: float | None = journal.absences.begin(AGENT)
        self.availability: dict[str, str] = {}
        self._root = root

    def lost(self) -> None:
        """Note that nothing is known of the agent until its status is received again."""
        self._note_status(b"")

    def _note_status(self, status: bytes) -> None:
        self.status = status
        absences = self._journal.absences
        if status != b"online" and self._not_online_s is None:
            self._not_online_s = absences.begin(AGENT)
        elif status == b"online" and self._not_online_s is not None:
            absences.end(AGENT, self._not_online_s)
            self._not_online_s = None

    def _take(self, message: aiomqtt.Message) -> None:
        topic = message.topic.value.removeprefix(f"{self._root}/")
        if topic == "status":
            self._note_status(bytes(message.payload))
        self._journal.count("messages seen")
        match topic.split("/"):
            case ["vm", vm, "availability"]:
                self.availability[vm] = bytes(message.payload).decode(errors="replace")
            case ["vm", vm, "event"]:
                event = decoded(message.payload)
                if isinstance(event, dict) and event.get("event") == "decision":
                    self.decisions[vm].append((time.monotonic(), int(event["data"]["to"])))


async def retained(port: int, root: str) -> dict[str, Any]:
    """Return the retained messages below the root, by their topic below it.

    Raises:
        aiomqtt.MqttError: the broker does not answer.
    """
    found: dict[str, Any] = {}
    marker = f"soak/{secrets.token_hex(4)}"  # comes after what is retained
    async with _connected(port, "late-subscriber") as client:
        await client.subscribe([(f"{root}/#", 1), (marker, 1)])
        await client.publish(marker, qos=1)
        try:
            async with asyncio.timeout(_RETAINED_S):
                async for message in client.messages:
                    if message.topic.value == marker:
                        break
                    if message.retain:
                        found[message.topic.value.removeprefix(f"{root}/")] = decoded(message.payload)
        except TimeoutError:
            raise aiomqtt.MqttError(f"not all that is retained came within {_RETAINED_S:g} s") from None
    return found


def decoded(payload: object) -> Any:
    """Return an answer or an object; other text unchanged."""
    raw = bytes(payload) if isinstance(payload, bytes | bytearray) else b""
    try:
        if raw[:1] >= b"\x80":
            return msgpack.unpackb(raw)
        return json.loads(raw) if raw[:1] in (b"{", b"[") else raw.decode(errors="replace")
    except ValueError:
        return raw.decode(errors="replace")
