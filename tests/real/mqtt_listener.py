"""A second MQTT client, which receives what the broker has, and a bridge that runs for a block."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiomqtt
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.mqtt.bridge import Bridge, BridgeSettings
from qmpballoon.mqtt.connection import Broker
from qmpballoon.quick_ack import acknowledge_quickly

WAIT_S = 60.0  # for steps that take milliseconds on an idle machine


class Listener:
    """Collects every message that arrives, in order; ``client`` may publish."""

    _markers = itertools.count(1)

    def __init__(self, client: aiomqtt.Client) -> None:
        self.client = client
        self.messages: list[aiomqtt.Message] = []
        self.disconnected = asyncio.Event()  # the broker ended the connection
        self._arrived = asyncio.Condition()

    async def collect(self) -> None:
        try:
            async for message in self.client.messages:
                async with self._arrived:
                    self.messages.append(message)
                    self._arrived.notify_all()
        except aiomqtt.MqttError:
            self.disconnected.set()
            raise

    async def until(self, wanted: Callable[[aiomqtt.Message], bool], start: int = 0) -> aiomqtt.Message:
        """Return the first message from ``start`` on for which ``wanted`` is true."""

        def found() -> aiomqtt.Message | None:
            return next((message for message in self.messages[start:] if wanted(message)), None)

        async with asyncio.timeout(WAIT_S), self._arrived:
            await self._arrived.wait_for(lambda: found() is not None)
        message = found()
        assert message is not None
        return message

    async def on(self, topic: str, payload: bytes | None = None, start: int = 0) -> aiomqtt.Message:
        """Return the first message on ``topic``, of that payload if one is given."""
        return await self.until(
            lambda message: message.topic.value == topic and payload in (None, message.payload), start
        )

    async def wait_for_pending(self) -> int:
        """Wait for all messages that the broker has for us now, retained ones too; return their number.

        A broker keeps the order: our own message that comes back is the last.
        """
        marker = f"marker/{next(self._markers)}"
        await self.send(marker, b"here")
        await self.on(marker)
        return len(self.messages)

    async def ask(self, topic: str, payload: object, *, answered: str = "", **properties: Any) -> Any:
        """Send a request; return the next answer on the response topic, decoded from JSON."""
        start = len(self.messages)
        await self.send(topic, payload, **properties)
        return json.loads(
            (await self.on(answered or topic.replace("/request/", "/response/"), start=start)).payload
        )

    async def send(self, topic: str, payload: object, *, retain: bool = False, **properties: Any) -> None:
        """Publish bytes or text as they are, anything else as JSON, with MQTT 5 properties by name."""
        content = payload if isinstance(payload, bytes | str) else json.dumps(payload)
        with_properties = None
        if properties:
            with_properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            for name, value in properties.items():
                setattr(with_properties, name, value)
        await self.client.publish(topic, content, qos=1, retain=retain, properties=with_properties)


@contextlib.asynccontextmanager
async def listening(
    port: int, *filters: str, username: str | None = None, password: str | None = None
) -> AsyncIterator[Listener]:
    """Listen with MQTT 5, retained messages first and marked as such."""
    async with aiomqtt.Client(
        HOST,
        port,
        protocol=aiomqtt.ProtocolVersion.V5,
        username=username,
        password=password,
        socket_options=[(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)],
    ) as client:
        acknowledge_quickly(client)
        listener = Listener(client)
        collecting = asyncio.create_task(listener.collect(), name="listener")
        try:
            for one in filters or ("#",):
                await client.subscribe(one, options=SubscribeOptions(qos=1, retainAsPublished=True))
            yield listener
        finally:
            collecting.cancel()
            await asyncio.wait({collecting})
            if not collecting.cancelled():
                collecting.exception()


@contextlib.asynccontextmanager
async def running(bridge: Bridge, *, until_connected: bool = True) -> AsyncIterator[asyncio.Task[None]]:
    """Run a bridge for the length of the block."""
    task = asyncio.create_task(bridge.run(), name="bridge")
    try:
        if until_connected:
            assert await bridge.wait_connected(WAIT_S)
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            raise error


def settings_for(*brokers: LabBroker | int, **changed: Any) -> BridgeSettings:
    """Return settings of a host ``edge-7`` for brokers, or for ports where another server listens."""
    ports = [broker if isinstance(broker, int) else broker.port for broker in brokers]
    return BridgeSettings(
        **{
            "brokers": tuple(Broker("mqtt", HOST, port) for port in ports),
            "client_id": "qmpballoon-edge-7",
            "host": "edge-7",
            **changed,
        }
    )


def property_of(message: aiomqtt.Message, name: str) -> object:
    """Return one of a message's MQTT 5 properties, None if it has none of that name."""
    return getattr(message.properties, name, None)
