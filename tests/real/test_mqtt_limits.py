"""Brokers that take less than usual: small packets, QoS 0, no retained messages, few unconfirmed messages."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from imitated_broker import ImitatedBroker
from mqtt_listener import WAIT_S, Listener, listening, property_of, running, settings_for

from qmpballoon import log as log_module
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt import bridge as bridge_module
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.protocol.requests import Request

ROOT = "qmpballoon/edge-7"
GET = f"{ROOT}/vm/web1/request/get"
LIST = f"{ROOT}/request/list"
GOT = GET.replace("request", "response")
PROTOCOLS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])
ROWS = [
    {"vm": f"vm{number}", "name": f"vm{number}", "socket": "x.qmp", "health": "ok"} for number in range(60)
]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    monkeypatch.setattr(log_module, "_REPEATS", 1000)
    caplog.set_level(logging.INFO, "qmpballoon")


async def handle(request: Request) -> object:
    return ROWS if request.verb == "list" else {"actual": 5}


def a_bridge(broker: LabBroker | int, protocol: str, handler: Any = handle) -> Bridge:
    """A bridge of 30 VMs, with a list of VMs and a host object that are larger than 2048 bytes."""
    bridge = Bridge(settings_for(broker, protocol=protocol), handler, vm_exists=lambda vm: vm == "web1")
    for number in range(30):
        bridge.retain(f"{ROOT}/vm/vm{number}/state", lambda: {"guest": {"free": 1}, "pad": "x" * 700})
    bridge.retain(bridge.topics.vms, lambda: ROWS)
    bridge.retain(bridge.topics.host_object, lambda: {"seq": 1, "unidentified": ROWS, "holds": [{"size": 1}]})
    return bridge


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(f"{word} ")]


async def until(condition: Any, what: str) -> None:
    async def probe() -> object:
        return condition()

    await eventually(probe, bool, timeout_s=WAIT_S, what=what)


@asynccontextmanager
async def calm(broker: LabBroker, bridge: Bridge) -> AsyncIterator[Listener]:
    """A client and the bridge, once the bridge's connection has come to stay."""
    async with listening(broker.port) as listener, running(bridge):
        await until(lambda: is_calm(bridge), "all is published")
        yield listener


def is_calm(bridge: Bridge) -> bool:
    connection = bridge.connection
    return bridge._status.seen.is_set() and connection is not None and not connection.window.unconfirmed


async def retained(broker: LabBroker) -> dict[str, bytes]:
    async with listening(broker.port) as late:
        await late.wait_for_pending()
        return {one.topic.value: one.payload for one in late.messages if one.retain}


@PROTOCOLS
async def test_state_that_is_too_large_is_cut_or_cleared_and_all_else_goes_on(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async with LabBroker(sockets_dir, options=["max_packet_size 2048"]) as broker:
        bridge = a_bridge(broker, protocol)
        async with calm(broker, bridge) as listener:
            connection = bridge.connection
            kept = await retained(broker)
            assert sum(topic.endswith("/state") for topic in kept) == 30
            assert bridge.topics.vms not in kept
            host = json.loads(kept[bridge.topics.host_object])
            assert host == {"seq": 1, "unidentified": [], "holds": [{"size": 1}], "cut": ["unidentified"]}
            assert kept[bridge.topics.status] == b"online"
            answer = await listener.ask(GET, {"transaction": 1})
            assert answer["result"] == {"actual": 5}
            answer = await listener.ask(LIST, {"transaction": 2})
            assert (answer["error"]["code"], answer["transaction"]) == ("too-large", 2)
            assert bridge.connection is connection
    assert len(logged(caplog, "too-large")) == 3
    assert not logged(caplog, "client-id-taken")
    assert len(logged(caplog, "broker-limits")) >= 1
    if protocol == "5":
        assert not logged(caplog, "broker-lost")


@PROTOCOLS
async def test_an_answer_that_is_too_large_does_not_end_the_connection_again_and_again(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async def large(request: Request) -> object:
        return "x" * 30_000 if request.verb == "get" else []

    async with LabBroker(sockets_dir, options=["max_packet_size 20000"]) as broker:
        bridge = a_bridge(broker, protocol, large)
        async with calm(broker, bridge) as listener:
            answer = await listener.ask(GET, {"transaction": 1})
            assert (answer["error"]["code"], answer["transaction"]) == ("too-large", 1)
            await until(lambda: is_calm(bridge), "it is connected")
            connection = bridge.connection
            assert (await listener.ask(LIST, {"transaction": 2}))["result"] == []
            assert (await listener.ask(GET, {"transaction": 3}))["error"]["code"] == "too-large"
            assert bridge.connection is connection
            responses = [one for one in listener.messages if one.topic.value == GOT]
            assert len(responses) == 2  # one for each request
    assert not logged(caplog, "client-id-taken")
    if protocol == "5":
        assert not logged(caplog, "broker-lost")


async def test_long_correlation_data_is_refused_and_not_repeated(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with LabBroker(sockets_dir, options=["max_packet_size 20000"]) as broker:
        bridge = a_bridge(broker, "5")
        async with calm(broker, bridge) as listener:
            answer = await listener.ask(GET, {"transaction": 1}, CorrelationData=b"x" * 19_500)
            assert answer["error"]["code"] == "malformed"
            assert "correlation data" in answer["error"]["message"]
            answer = await listener.ask(GET, {"transaction": 2}, ResponseTopic="a/" + "x" * 2000)
            assert answer["error"]["code"] == "malformed"
            assert "response topic" in answer["error"]["message"]
            await listener.ask(GET, {}, CorrelationData=b"x" * 1000)
            last = listener.messages[-1]
            assert property_of(last, "CorrelationData") == b"x" * 1000
    assert not logged(caplog, "broker-lost")


@PROTOCOLS
async def test_a_broker_of_qos_0_is_used_at_qos_0(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    async with LabBroker(sockets_dir, options=["max_qos 0"]) as broker:
        bridge = a_bridge(broker, protocol)
        async with listening(broker.port) as listener:
            async with running(bridge):
                await listener.on(bridge.topics.vms)
                await listener.on(bridge.topics.status, b"online")
                await listener.client.publish(GET, "{}", qos=0)
                assert json.loads((await listener.on(GOT)).payload)["status"] == "ok"
                bridge.clear(bridge.topics.vms)
                await listener.on(bridge.topics.vms, b"")
                await until(lambda: bridge.topics.vms not in bridge._outbox.topics, "it is forgotten")
            await listener.on(bridge.topics.status, b"offline")
            assert {one.qos for one in listener.messages} == {0}
    (line,) = logged(caplog, "broker-limits")
    assert "qos=0" in line
    assert not logged(caplog, "broker-lost")
    assert not logged(caplog, "broker-refused")


@PROTOCOLS
async def test_where_nothing_is_retained_all_is_published_again_and_again(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(bridge_module, "WITHOUT_RETAIN_S", 0.1)
    async with LabBroker(sockets_dir, options=["retain_available false"]) as broker:
        bridge = a_bridge(broker, protocol)
        async with calm(broker, bridge) as listener:
            for _ in range(2):
                start = await listener.wait_for_pending()
                await listener.on(bridge.topics.vms, start=start)
                await listener.on(bridge.topics.status, b"online", start=start)
            assert not await retained(broker)
            start = await listener.wait_for_pending()
            assert bridge.connection is not None
            bridge.connection._paho.socket().shutdown(2)  # type: ignore[union-attr]
            await listener.on(bridge.topics.status, b"offline", start=start)  # the will
    (line,) = logged(caplog, "broker-limits")
    assert "retain=no" in line


async def test_unconfirmed_messages_stay_below_the_receive_maximum(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with LabBroker(sockets_dir, options=["max_inflight_messages 5"]) as broker:
        bridge = a_bridge(broker, "5")
        async with calm(broker, bridge):
            assert bridge.connection is not None
            assert bridge.connection.window.limit == 5
    assert not logged(caplog, "broker-lost")


@PROTOCOLS
async def test_a_broker_that_only_ends_the_connection_is_understood_packet_by_packet(
    caplog: pytest.LogCaptureFixture, protocol: str
) -> None:
    broker = ImitatedBroker(lambda one: one.size <= 1500)
    async with broker.running():
        bridge = a_bridge(broker.port, protocol)
        async with running(bridge):
            await until(lambda: is_calm(bridge), "all is published")
            connection, connects = bridge.connection, len(broker.connects)
            assert {one.topic for one in broker.published} == set(bridge._outbox.topics)
            for _ in range(3):
                bridge.retain(bridge.topics.vms, lambda: ROWS)
                bridge.event(f"{ROOT}/event", {"number": 1})
                await until(lambda: is_calm(bridge) and not bridge._outbox._events, "it is sent")
            assert bridge.connection is connection
            assert len(broker.connects) == connects <= 8
    assert not logged(caplog, "client-id-taken")


async def test_a_broker_that_takes_no_retained_messages_without_a_word_is_understood(
    caplog: pytest.LogCaptureFixture,
) -> None:
    broker = ImitatedBroker(lambda one: not one.retain)
    async with broker.running():
        bridge = a_bridge(broker.port, "3.1.1")
        async with running(bridge):
            await until(lambda: is_calm(bridge), "all is published")
    assert any("retain=no" in line for line in logged(caplog, "broker-limits"))


async def test_a_will_that_the_broker_does_not_take_is_changed(caplog: pytest.LogCaptureFixture) -> None:
    broker = ImitatedBroker(
        lambda one: not one.retain and one.qos == 0, takes_will=lambda qos, retain: not retain and qos == 0
    )
    async with broker.running():
        bridge = a_bridge(broker.port, "3.1.1")
        async with running(bridge):
            await until(lambda: is_calm(bridge), "all is published")
    (line,) = logged(caplog, "broker-limits")
    assert "qos=0 retain=no" in line
    assert not logged(caplog, "broker-lost")


@pytest.mark.parametrize(
    ("reason", "wanted"), [(0x93, "reason=0x93"), (0x95, "reason=0x95"), (0x97, "reason=0x97")]
)
async def test_the_reason_of_a_disconnect_is_logged_and_no_second_agent_is_blamed(
    caplog: pytest.LogCaptureFixture, reason: int, wanted: str
) -> None:
    refusals = iter([False] * 4)
    broker = ImitatedBroker(lambda one: not one.topic.endswith("/vms") or next(refusals, True), reason=reason)
    async with broker.running():
        bridge = a_bridge(broker.port, "5")
        async with running(bridge):
            await until(lambda: is_calm(bridge), "all is published")
    assert all(wanted in line for line in logged(caplog, "broker-lost"))
    assert logged(caplog, "broker-lost")
    assert not logged(caplog, "client-id-taken")
