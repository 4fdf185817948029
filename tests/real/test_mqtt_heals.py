"""Retained topics that somebody clears, overwrites or brings back old are as the agent said again."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from mqtt_listener import WAIT_S, Listener, listening, running, settings_for

from qmpballoon import log as log_module
from qmpballoon.lab.broker import HOST, LabBroker, free_port
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Request

ROOT = "qmpballoon/edge-7"
DEVICE = "homeassistant/device/qmpballoon_edge-7/config"
AVAILABILITY = f"{ROOT}/vm/web1/availability"
VALUES: dict[str, Any] = {
    f"{ROOT}/status": "online",
    f"{ROOT}/host": {"seq": 1},
    f"{ROOT}/vms": [],
    AVAILABILITY: "online",
    f"{ROOT}/vm/web1/state": {"actual": 5},
}
TEXTS = {
    f"{ROOT}/status": b"online",
    f"{ROOT}/host": b'{"seq":1}',
    f"{ROOT}/vms": b"[]",
    AVAILABILITY: b"online",
    f"{ROOT}/vm/web1/state": b'{"actual":5}',
}
PROTOCOLS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])


@pytest.fixture(autouse=True)
def _log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    caplog.set_level(logging.INFO, "qmpballoon")


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


async def handle(request: Request) -> object:
    return {"verb": request.verb}


def a_bridge(broker: LabBroker, **changed: Any) -> Bridge:
    """A bridge that repeats nothing by itself, unless ``heartbeat_s`` says so."""
    bridge = Bridge(
        settings_for(broker, **{"heartbeat_s": 3600.0, **changed}), handle, vm_exists=lambda vm: vm == "web1"
    )
    for topic, value in VALUES.items():
        if topic != bridge.topics.status:
            bridge.retain(topic, lambda value=value: value)  # type: ignore[misc]
    return bridge


@asynccontextmanager
async def calm(bridge: Bridge, broker: LabBroker) -> AsyncIterator[Listener]:
    """A client and the bridge, whose messages are all confirmed."""
    async with listening(broker.port) as listener, running(bridge):

        async def is_calm() -> bool:
            return bridge.connection is not None and not bridge.connection.window.unconfirmed

        await eventually(is_calm, bool, timeout_s=WAIT_S, what="all is published")
        await listener.on(bridge.topics.status, b"online")
        yield listener


async def retained(broker: LabBroker) -> dict[str, bytes]:
    async with listening(broker.port) as late:
        await late.wait_for_pending()
        return {one.topic.value: one.payload for one in late.messages if one.retain}


@PROTOCOLS
@pytest.mark.parametrize("foreign", [b"", b"offline", b'{"actual":4}', b"online "])
async def test_what_somebody_changes_is_corrected_at_once(
    mosquitto: LabBroker, protocol: str, foreign: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with calm(a_bridge(mosquitto, protocol=protocol), mosquitto) as listener:
        for topic, text in TEXTS.items():
            start = await listener.wait_for_pending()
            await listener.send(topic, foreign, retain=True)
            await listener.on(topic, foreign, start=start)
            await listener.on(topic, text, start=start)
        assert await retained(mosquitto) == TEXTS
        await listener.wait_for_pending()
        for topic in TEXTS:  # as before, changed by somebody, and corrected
            heard = [one.payload for one in listener.messages if one.topic.value == topic]
            assert heard[-2:] == [foreign, TEXTS[topic]]
    assert "retained-changed" in caplog.text


@PROTOCOLS
async def test_an_old_value_of_our_own_is_corrected(mosquitto: LabBroker, protocol: str) -> None:
    bridge = a_bridge(mosquitto, protocol=protocol)
    async with calm(bridge, mosquitto) as listener:
        for word in ("offline", "online", "offline"):
            start = await listener.wait_for_pending()
            bridge.retain(AVAILABILITY, lambda word=word: word)  # type: ignore[misc]
            await listener.on(AVAILABILITY, word.encode(), start=start)
        start = await listener.wait_for_pending()
        await listener.send(AVAILABILITY, b"online", retain=True)
        await listener.on(AVAILABILITY, b"online", start=start)
        await listener.on(AVAILABILITY, b"offline", start=start)


@PROTOCOLS
async def test_many_changes_of_our_own_are_no_others(
    mosquitto: LabBroker, protocol: str, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = a_bridge(mosquitto, protocol=protocol)
    topic = bridge.topics.state("web1")
    async with calm(bridge, mosquitto) as listener:
        for number in range(10, 210):
            bridge.retain(topic, lambda number=number: {"actual": number})  # type: ignore[misc]
            await listener.on(topic, b'{"actual":%d}' % number)
        bridge.clear(topic)
        await listener.on(topic, b"")
        await listener.wait_for_pending()
        assert len([one for one in listener.messages if one.topic.value == topic]) == 202
    assert "retained-changed" not in caplog.text


@PROTOCOLS
async def test_a_vm_that_is_gone_is_cleared_when_a_bridge_brings_it_back(
    mosquitto: LabBroker, protocol: str
) -> None:
    async with calm(a_bridge(mosquitto, protocol=protocol), mosquitto) as listener:
        for kind in ("availability", "state"):
            topic = f"{ROOT}/vm/gone/{kind}"
            await listener.send(topic, b"online", retain=True)
            await listener.on(topic, b"")
        assert await retained(mosquitto) == TEXTS


@PROTOCOLS
async def test_all_that_is_retained_is_said_again_with_the_heartbeat(
    mosquitto: LabBroker, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device of Home Assistant is not read, so nothing but the heartbeat can heal it."""
    bridge = a_bridge(mosquitto, protocol=protocol, heartbeat_s=0.2)
    bridge.retain(DEVICE, lambda: {"device": 1})
    async with calm(bridge, mosquitto) as listener:
        await listener.on(DEVICE)
        await listener.send(DEVICE, b"", retain=True)
        for _ in range(2):
            start = await listener.wait_for_pending()
            for topic in (*TEXTS, DEVICE):
                await listener.on(topic, start=start)
        assert await retained(mosquitto) == {**TEXTS, DEVICE: b'{"device":1}'}


@PROTOCOLS
async def test_what_a_two_way_bridge_brings_back_is_corrected_on_both_sides_and_comes_to_rest(
    sockets_dir: Path, protocol: str
) -> None:
    other = LabBroker(sockets_dir, name="other", persistence=True, port=free_port())
    link = ["connection other", f"address {HOST}:{other.port}", "topic # both 1", "restart_timeout 1"]
    async with other, listening(other.port) as client:  # what it had when the link broke
        for topic in TEXTS:
            await client.send(topic, b"old", retain=True)
        await client.send(f"{ROOT}/vm/gone/availability", b"old", retain=True)
        await client.wait_for_pending()
    async with LabBroker(sockets_dir, options=link) as own:
        bridge = a_bridge(own, protocol=protocol)
        async with calm(bridge, own) as listener:
            start = await listener.wait_for_pending()
            async with other, listening(other.port) as client:

                async def both() -> bool:
                    found = [await retained(one) for one in (own, other)]
                    return all(
                        {topic: text for topic, text in one.items() if topic.startswith(ROOT)} == TEXTS
                        for one in found
                    )

                await eventually(both, bool, timeout_s=WAIT_S, what="both brokers have what the agent said")
                for one, far in ((client, listener), (listener, client)):
                    await one.send("marker/far", b"here")
                    await far.on("marker/far")
                for topic in TEXTS:
                    heard = [one for one in listener.messages[start:] if one.topic.value == topic]
                    assert len(heard) <= 4
