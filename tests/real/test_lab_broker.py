"""The lab's brokers behave as the other tests assume."""

from __future__ import annotations

import aiomqtt
import pytest

from qmpballoon.lab.broker import HOST, LabBroker, PortTaken
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError


def _client(broker: LabBroker, **options: str) -> aiomqtt.Client:
    return aiomqtt.Client(HOST, broker.port, timeout=10, **options)  # type: ignore[arg-type]


async def _retained(broker: LabBroker) -> bytes | None:
    """Return what is retained under ``lab/kept``; a marker that follows shows that there is nothing."""
    async with _client(broker) as client:
        await client.subscribe([("lab/kept", 1), ("lab/marker", 1)])
        await client.publish("lab/marker", b"", qos=1)
        async for message in client.messages:
            return bytes(message.payload) if message.topic.matches("lab/kept") else None
    raise AssertionError("the broker closed the connection")


async def _retain(broker: LabBroker) -> None:
    async with _client(broker) as client:
        await client.publish("lab/kept", b"yes", qos=1, retain=True)


async def test_a_restarted_broker_has_its_port_and_no_retained_messages(broker: LabBroker) -> None:
    await _retain(broker)
    assert await _retained(broker) == b"yes"
    port = broker.port
    await broker.restart()
    assert broker.port == port
    assert await _retained(broker) is None


async def test_a_broker_with_persistence_keeps_retained_messages_over_a_kill(lab: Lab) -> None:
    broker = await lab.broker(persistence=True)
    await _retain(broker)
    await broker.terminate()
    await broker.start()
    assert await _retained(broker) == b"yes"


async def test_clients_of_a_killed_broker_lose_their_connections(broker: LabBroker) -> None:
    async with _client(broker) as client:
        await client.subscribe("lab/#")
        await broker.kill()
        with pytest.raises(aiomqtt.MqttError):
            await anext(client.messages)
    with pytest.raises(aiomqtt.MqttError):
        await _retain(broker)


async def test_a_broker_checks_passwords_and_acl(lab: Lab) -> None:
    broker = await lab.broker(
        passwords={"anna": "open", "ben": "sesame"},
        acl=["user anna", "topic readwrite lab/#", "user ben", "topic read lab/#"],
    )
    with pytest.raises(aiomqtt.MqttError):
        await _retain(broker)
    async with _client(broker, username="ben", password="sesame") as ben:
        await ben.subscribe("lab/#", qos=1)
        await ben.publish("lab/kept", b"from ben", qos=1)
        async with _client(broker, username="anna", password="open") as anna:
            await anna.publish("lab/kept", b"from anna", qos=1)
        assert (await anext(ben.messages)).payload == b"from anna"


async def test_a_taken_port_and_a_bad_configuration_are_different_errors(lab: Lab) -> None:
    broker = await lab.broker()
    with pytest.raises(PortTaken):
        await lab.broker(port=broker.port)
    with pytest.raises(LabError, match="no_such_option"):
        await lab.broker(options=["no_such_option 1"])
