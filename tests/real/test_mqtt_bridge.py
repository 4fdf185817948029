"""The bridge against a real mosquitto: connects, losses, reconnects, and what the broker then retains."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiomqtt
import msgpack  # type: ignore[import-untyped]
import pytest
from certificates import certify, tls_options
from imitated_broker import ImitatedBroker
from mqtt_listener import WAIT_S, listening, property_of, running, settings_for
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from serving import relayed, serving

from qmpballoon import log as log_module
from qmpballoon import quick_ack
from qmpballoon.client import Client
from qmpballoon.errors import RequestRefused
from qmpballoon.lab.broker import HOST, LabBroker
from qmpballoon.lab.demo.testbed import observing
from qmpballoon.lab.waiting import eventually
from qmpballoon.model.names import VmId
from qmpballoon.model.records import VmStatus
from qmpballoon.mqtt import announced as announced_module
from qmpballoon.mqtt import bridge as bridge_module
from qmpballoon.mqtt import connection as connection_module
from qmpballoon.mqtt import link as link_module
from qmpballoon.mqtt import own_status, subscribing
from qmpballoon.mqtt import window as window_module
from qmpballoon.mqtt.announced import Report
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.connection import Broker, Connection, Login
from qmpballoon.mqtt.known_broker import KnownBroker
from qmpballoon.mqtt.limits import WINDOW
from qmpballoon.mqtt.outbox import Publication
from qmpballoon.mqtt.packets import Packet
from qmpballoon.mqtt.publisher import Publisher
from qmpballoon.mqtt.window import Sent
from qmpballoon.protocol.objects import Agent
from qmpballoon.protocol.requests import Request

ROOT = "qmpballoon/edge-7"
STATE = f"{ROOT}/vm/web1/state"


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(log_module, "_repeats", log_module._Repeats())
    monkeypatch.setattr(log_module, "_REPEATS", 1000)  # hours of outages take seconds here
    caplog.set_level(logging.INFO, "qmpballoon")


async def echo(request: Request) -> object:
    return {"verb": request.verb}


def a_bridge(
    *brokers: LabBroker | int, announced: Any = (), on_announced: Any = None, **changed: Any
) -> Bridge:
    return Bridge(
        settings_for(*brokers, **changed),
        echo,
        vm_exists=lambda vm: vm == "web1",
        announced_before=announced,
        on_announced=on_announced,
    )


def kept(announced_sets: list[frozenset[str]]) -> Report:
    """Return what keeps the announced topics in a list; they are kept only when it returns."""

    async def keep(topics: frozenset[str]) -> None:
        for _ in range(5):  # turns of the loop in which a message could be sent too early
            await asyncio.sleep(0)
        announced_sets.append(topics)

    return keep


def logged(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.getMessage().startswith(word)]


def cut(bridge: Bridge) -> None:
    """Break the connection without a DISCONNECT."""
    assert bridge.connection is not None
    sock = bridge.connection._paho.socket()
    getattr(sock, "_socket", sock).shutdown(socket.SHUT_RDWR)  # type: ignore[union-attr]


async def until(condition: Any, what: str) -> None:
    async def probe() -> object:
        return condition()

    await eventually(probe, bool, timeout_s=WAIT_S, what=what)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_all_is_published_on_connect_with_online_last_and_offline_at_the_end(
    mosquitto: LabBroker, protocol: str
) -> None:
    bridge = a_bridge(mosquitto, protocol=protocol)
    bridge.retain(STATE, lambda: {"actual": 1})
    bridge.retain(f"{ROOT}/host", lambda: {"seq": 1})
    async with listening(mosquitto.port) as listener:
        async with running(bridge):
            await listener.on(bridge.topics.status, b"online")
            assert [one.topic.value for one in listener.messages] == [STATE, f"{ROOT}/host", f"{ROOT}/status"]
            assert all(one.retain and one.qos == 1 for one in listener.messages)
        await listener.on(bridge.topics.status, b"offline")
    async with listening(mosquitto.port) as late:
        await late.on(bridge.topics.status, b"offline")
        assert (await late.on(STATE)).payload == b'{"actual":1}'


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_broken_connection_publishes_the_will_and_the_bridge_reconnects(
    mosquitto: LabBroker, protocol: str
) -> None:
    bridge = a_bridge(mosquitto, protocol=protocol)
    async with listening(mosquitto.port, bridge.topics.status) as listener, running(bridge):
        await listener.on(bridge.topics.status, b"online")
        before = len(listener.messages)
        cut(bridge)
        await listener.on(bridge.topics.status, b"offline", start=before)
        await listener.on(bridge.topics.status, b"online", start=before)


@pytest.mark.parametrize("scheme", ["mqtt", "ws"])
async def test_nagle_is_off_on_the_real_socket(sockets_dir: Path, scheme: str) -> None:
    # mosquitto 2.0.11 ends where its only listener speaks websockets, hence a second one.
    options = [f"listener 0 {sockets_dir}/mqtt.socket"]
    async with LabBroker(sockets_dir, websockets=scheme == "ws", options=options) as broker:
        bridge = a_bridge(brokers=(Broker(scheme, HOST, broker.port),))
        async with running(bridge):
            assert bridge.connection is not None
            assert bridge.connection.no_delay


@pytest.mark.parametrize("scheme", ["mqtt", "ws"])
async def test_received_data_is_acknowledged_at_once(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    acknowledged: list[socket.socket | None] = []
    monkeypatch.setattr(quick_ack, "set_quick_ack", acknowledged.append)
    options = [f"listener 0 {sockets_dir}/mqtt.socket"]
    async with LabBroker(sockets_dir, websockets=scheme == "ws", options=options) as broker:
        bridge = a_bridge(brokers=(Broker(scheme, HOST, broker.port),))
        async with running(bridge):
            await until(bridge._status.seen.is_set, "our own status comes back")
            assert bridge.connection is not None
            before = acknowledged.count(sock := bridge.connection._raw)
            bridge.event(f"{ROOT}/event", {"number": 1})
            await until(lambda: acknowledged.count(sock) > before, "the PUBACK is read")
        assert set(acknowledged) == {sock}


async def test_clients_of_the_lab_acknowledge_at_once(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    acknowledged: list[socket.socket] = []
    monkeypatch.setattr(quick_ack, "set_quick_ack", acknowledged.append)
    async with observing(mosquitto.port):
        assert len(acknowledged) == 1  # after the SUBACK


async def test_tls_needs_the_named_ca_and_reports_its_absence(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    certificate, key = certify(sockets_dir, "broker")
    async with LabBroker(sockets_dir, options=tls_options(certificate, key)) as broker:
        place = (Broker("mqtts", HOST, broker.port),)
        bridge = a_bridge(brokers=place, ca_file=str(certificate))
        async with running(bridge):
            assert bridge.connection is not None
            assert bridge.connection.no_delay
            assert isinstance(bridge.connection._paho.socket(), ssl.SSLSocket)
        async with running(a_bridge(brokers=place), until_connected=False):
            await until(lambda: logged(caplog, "broker-unreachable"), "the refusal of the certificate")
    assert (
        "its certificate is not from an authority that this system trusts"
        in logged(caplog, "broker-unreachable")[0]
    )


async def test_after_an_outage_the_current_state_is_published(
    mosquitto: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = a_bridge(mosquitto)
    actual = 1

    def state() -> object:
        return {"actual": actual}

    bridge.retain(STATE, state)
    bridge.retain(f"{ROOT}/vm/old/state", dict)
    async with running(bridge):
        await mosquitto.kill()
        await until(lambda: not bridge.connected, "the loss is noticed")
        for number in range(20_000):
            actual = number
            bridge.retain(STATE, state)
            bridge.event(f"{ROOT}/event", {"number": number})
            bridge.sample(f"{ROOT}/samples", dict)
        bridge.clear(f"{ROOT}/vm/old/state")
        outbox = bridge._outbox
        assert (len(outbox._events), len(outbox._slots), len(outbox._samples)) == (0, 3, 0)
        await mosquitto.start()
        assert await bridge.wait_connected(WAIT_S)
        await until(bridge._status.seen.is_set, "the broker has received everything")
        async with listening(mosquitto.port) as listener:
            assert (await listener.on(STATE)).payload == b'{"actual":19999}'
            await listener.send("marker", b"x")
            await listener.on("marker")
            assert {one.topic.value for one in listener.messages} == {STATE, f"{ROOT}/status", "marker"}
            bridge.event(f"{ROOT}/event", {"number": "new"})
            assert (await listener.on(f"{ROOT}/event")).payload == b'{"number":"new"}'
    assert len(logged(caplog, "broker-lost")) == 1
    assert not logged(caplog, "broker-unreachable")
    assert len(logged(caplog, "broker-connected")) == 2


async def test_a_long_broker_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        bridge = a_bridge(closed.getsockname()[1])
        attempts = 0
        session = bridge._session

        async def counted(known: KnownBroker) -> Any:
            nonlocal attempts
            attempts += 1
            return await session(known)

        bridge._session = counted  # type: ignore[method-assign]
        async with running(bridge, until_connected=False):
            await until(lambda: attempts > 5, "several attempts")
    assert len(logged(caplog, "broker-unreachable")) == 1


async def test_brokers_are_tried_in_turn(mosquitto: LabBroker, caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as closed:
        closed.bind((HOST, 0))
        async with running(a_bridge(closed.getsockname()[1], mosquitto)):
            assert len(logged(caplog, "broker-unreachable")) == 1
            assert str(mosquitto.port) in logged(caplog, "broker-connected")[0]


@contextlib.asynccontextmanager
async def only_311(broker: LabBroker) -> AsyncIterator[tuple[int, list[int]]]:
    """A proxy that refuses MQTT 5 with a CONNACK of 3.1.1; yields its port and the requested versions."""
    versions: list[int] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connect = await reader.read(65536)
        versions.append(connect[connect.index(b"MQTT") + 4])
        if versions[-1] == 5:
            writer.write(b"\x20\x02\x00\x01")
            return
        inner = await asyncio.open_connection(HOST, broker.port)
        inner[1].write(connect)
        await relayed(reader, writer, inner)

    async with serving(serve, (HOST, 0)) as server:
        yield server.sockets[0].getsockname()[1], versions


async def test_auto_falls_back_to_3_1_1_where_5_is_refused_and_keeps_it(mosquitto: LabBroker) -> None:
    async with only_311(mosquitto) as (port, versions):
        bridge = a_bridge(port)
        async with running(bridge):
            assert bridge.connection is not None
            assert not bridge.connection.mqtt5
            bridge._online.clear()
            cut(bridge)
            assert await bridge.wait_connected(WAIT_S)
    assert versions == [5, 4, 4]


async def test_protocol_5_alone_never_falls_back(
    mosquitto: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        only_311(mosquitto) as (port, versions),
        running(a_bridge(port, protocol="5"), until_connected=False),
    ):
        await until(lambda: len(versions) > 2, "several attempts")
    assert set(versions) == {5}
    assert len(logged(caplog, "broker-refused")) == 1


async def test_msgpack_payloads_have_their_content_type_and_status_stays_text(mosquitto: LabBroker) -> None:
    bridge = a_bridge(mosquitto, payload="msgpack")
    bridge.retain(STATE, lambda: {"actual": 5})
    async with listening(mosquitto.port) as listener, running(bridge):
        state = await listener.on(STATE)
        assert msgpack.unpackb(state.payload) == {"actual": 5}
        assert property_of(state, "ContentType") == "application/msgpack"
        await listener.on(bridge.topics.status, b"online")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_an_acl_that_blocks_our_status_is_logged_once(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(own_status, "ECHO_TIMEOUT_S", 0.2)
    acl = ["user agent", "topic read qmpballoon/#", "topic write qmpballoon/edge-7/vm/#"]
    async with LabBroker(sockets_dir, passwords={"agent": "secret"}, acl=acl) as broker:
        bridge = a_bridge(broker, protocol=protocol, username="agent", password="secret")
        async with running(bridge):
            await until(lambda: logged(caplog, "broker-acl"), "the error that names the ACL")
            assert bridge._status.seen.is_set() is False
    (line,) = logged(caplog, "broker-acl")
    assert "ACL" in line
    assert "user agent" in line
    assert f"{ROOT}/status" in line


async def test_with_all_rights_the_self_check_logs_nothing(
    mosquitto: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    bridge = a_bridge(mosquitto)
    async with running(bridge):
        await until(bridge._status.seen.is_set, "our own status comes back")
    assert not logged(caplog, "broker-acl")


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
async def test_a_refused_subscription_is_asked_for_again_until_it_is_granted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, protocol: str
) -> None:
    monkeypatch.setattr(subscribing, "AGAIN_S", 0.02)
    broker = ImitatedBroker(lambda message: True, grants=lambda number: number > 3)
    async with broker.running(), running(a_bridge(broker.port, protocol=protocol)):
        await until(lambda: len(logged(caplog, "broker-acl")) == 2, "it is granted")
        assert broker.subscribes == 4
    refused, granted = logged(caplog, "broker-acl")
    assert "the broker refused the subscription" in refused
    assert "the broker granted the subscription" in granted


async def test_a_client_of_3_1_1_asks_again_for_what_was_refused_without_a_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(subscribing, "AGAIN_S", 0.02)
    monkeypatch.setattr(link_module, "MQTT_5_FIRST", (False,))
    broker = ImitatedBroker(lambda message: True, grants=lambda number: number > 3)
    async with broker.running(), Client(f"mqtt://{HOST}:{broker.port}", timeout_s=WAIT_S):
        assert broker.subscribes == 4
    never = ImitatedBroker(lambda message: True, grants=lambda number: False)
    async with never.running():
        with pytest.raises(RequestRefused, match="refuses an anonymous client to read"):
            async with Client(f"mqtt://{HOST}:{never.port}", timeout_s=0.2):
                pass
        assert never.subscribes > 1


async def test_a_broker_that_stopped_is_not_taken_for_one_whose_acl_forbids(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_status, "ECHO_TIMEOUT_S", 0.1)
    broker = ImitatedBroker(lambda message: True, stops_at=lambda message: message.topic.endswith("/status"))
    async with broker.running():
        bridge = a_bridge(broker.port)
        looks: list[bool] = []
        look = bridge._is_status_unconfirmed

        def noted() -> bool:
            looks.append(look())
            return looks[-1]

        monkeypatch.setattr(bridge, "_is_status_unconfirmed", noted)
        async with running(bridge, until_connected=False):
            await until(lambda: len(looks) > 1, "two looks at what the broker has confirmed")
    assert all(looks)
    assert not logged(caplog, "broker-acl")


async def test_a_bad_password_is_logged_once_and_retried_slowly(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "REFUSED_PAUSE_S", 0.03)
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 3600.0)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 3600.0)
    async with LabBroker(sockets_dir, passwords={"agent": "secret"}) as broker:
        bridge = a_bridge(broker, username="agent", password="wrong")
        async with running(bridge, until_connected=False):
            await until(lambda: broker.log.read_text().count("not authorised") > 2, "several attempts")
            assert not bridge.connected
        assert "wrong" not in repr(bridge._settings) + repr(bridge._login)
    (line,) = logged(caplog, "broker-refused")
    assert "user agent" in line
    assert "wrong" not in line


async def test_a_second_agent_with_the_same_client_id_is_reported(
    mosquitto: LabBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(a_bridge(mosquitto)), running(a_bridge(mosquitto), until_connected=False):
        await until(lambda: logged(caplog, "client-id-taken"), "the second agent is reported")
        lost = len(logged(caplog, "broker-lost"))
        await until(
            lambda: len(logged(caplog, "broker-lost")) > lost + 2, "they keep disconnecting each other"
        )
        assert len(set(logged(caplog, "client-id-taken"))) == 1
    assert "client_id=qmpballoon-edge-7" in logged(caplog, "client-id-taken")[0]
    assert "[agent] host" in logged(caplog, "client-id-taken")[0]


async def test_an_offline_that_arrives_late_is_corrected(mosquitto: LabBroker) -> None:
    bridge = a_bridge(mosquitto)
    async with listening(mosquitto.port) as listener, running(bridge):
        await until(bridge._status.seen.is_set, "our own status comes back")
        await listener.on(bridge.topics.status, b"online")
        start = len(listener.messages)
        await listener.send(bridge.topics.status, b"offline", retain=True)
        for _ in range(2):  # the bridge reads in order, and sends a response before its status
            await listener.ask(f"{ROOT}/vm/web1/request/get", {})
        status = [one.payload for one in listener.messages[start:] if one.topic.value == f"{ROOT}/status"]
        assert status == [b"offline", b"online"]


async def test_home_assistants_birth_message_republishes_everything(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "BIRTH_WAIT_S", (0.0, 0.01))
    bridge = a_bridge(mosquitto)
    bridge.retain(STATE, lambda: {"actual": 5})
    async with running(bridge), listening(mosquitto.port) as listener:
        await until(bridge._status.seen.is_set, "the broker has received everything")
        start = await listener.wait_for_pending()
        await listener.send("homeassistant/status", b"offline")
        await listener.send("homeassistant/status", b"online")
        await listener.on(bridge.topics.status, b"online", start=start)
        again = [one.topic.value for one in listener.messages[start:]]
        assert again == ["homeassistant/status", "homeassistant/status", STATE, bridge.topics.status]


async def test_leftovers_of_an_earlier_run_are_cleared_and_new_topics_are_announced_first(
    mosquitto: LabBroker,
) -> None:
    gone = f"{ROOT}/vm/gone/state"
    announced_sets: list[frozenset[str]] = []
    async with listening(mosquitto.port) as listener:
        for topic in (gone, STATE):
            await listener.send(topic, b"{}", retain=True)
            await listener.on(topic)
        bridge = a_bridge(mosquitto, announced={gone, STATE}, on_announced=kept(announced_sets))
        bridge.retain(STATE, lambda: {"actual": 1})
        bridge.clear_leftovers()
        assert announced_sets == []
        async with running(bridge):
            await listener.on(gone, b"")
            await until(
                lambda: announced_sets and gone not in announced_sets[-1],
                "the leftover is no longer announced",
            )
    assert announced_sets[0] == {gone, STATE, bridge.topics.status}
    assert announced_sets[-1] == {STATE, bridge.topics.status}
    async with listening(mosquitto.port) as late:
        await late.wait_for_pending()
        assert gone not in {one.topic.value for one in late.messages}


async def test_many_new_topics_are_announced_together_each_before_its_first_message(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    announced_sets: list[frozenset[str]] = []
    sent_topics: list[str] = []
    bridge = a_bridge(mosquitto, on_announced=kept(announced_sets))
    loop = asyncio.get_running_loop()
    async with running(bridge):
        connection = bridge.connection
        assert connection is not None
        send = connection.send

        def recorded(packet: Packet) -> None:
            assert packet.publication.topic in announced_sets[-1]
            sent_topics.append(packet.publication.topic)
            send(packet)

        monkeypatch.setattr(connection, "send", recorded)
        began_s, before = loop.time(), len(announced_sets)
        topics = [f"{ROOT}/vm/vm{number}/state" for number in range(500)]
        for topic in topics:
            bridge.retain(topic, dict)
            await asyncio.sleep(0)
        await until(lambda: len(sent_topics) == len(topics), "all are sent")
        intervals = (loop.time() - began_s) / announced_module.INTERVAL_S
        assert len(announced_sets) - before <= intervals + 2
        assert sent_topics == topics
        for topic in topics:
            bridge.clear(topic)
        await until(lambda: announced_sets[-1] == {bridge.topics.status}, "none is left")
        intervals = (loop.time() - began_s) / announced_module.INTERVAL_S
        assert len(announced_sets) - before <= intervals + 4


@pytest.mark.parametrize("confirms", [True, False])
async def test_a_delay_of_our_own_loop_is_no_time_out_of_the_broker(
    monkeypatch: pytest.MonkeyPatch, confirms: bool
) -> None:
    monkeypatch.setattr(window_module, "CONFIRM_TIMEOUT_S", 0.8)
    connection = Connection(
        Broker("mqtt", HOST, 1),
        Login("test"),
        mqtt5=True,
        will=aiomqtt.Will("x"),
        received=lambda _: None,
        confirmed=lambda *_: None,
    )
    for number in range(WINDOW):
        connection.window.add(number, Sent(Publication("x", dict), 10))
    waiting = asyncio.create_task(connection.window.wait_room(), name="window")
    await asyncio.sleep(0)
    time.sleep(0.9)  # longer than the time-out, in which the loop reads nothing
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    if confirms:
        connection._on_publish(None, None, 0, ReasonCode(PacketTypes.PUBACK), None)
        await asyncio.wait_for(waiting, WAIT_S)
    else:
        with pytest.raises(aiomqtt.MqttError, match="confirmed nothing"):
            await asyncio.wait_for(waiting, WAIT_S)


async def test_a_hanging_broker_delays_the_stop_by_a_bounded_time(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bridge_module, "OFFLINE_TIMEOUT_S", 0.2)
    bridge = a_bridge(mosquitto)
    try:
        async with asyncio.timeout(WAIT_S):
            async with running(bridge):
                mosquitto.stop()
                for number in range(2000):
                    bridge.event(f"{ROOT}/event", {"number": number})
                    bridge.retain(f"{ROOT}/vm/web1/state", dict)
                assert len(bridge._outbox._events) <= 1000
        assert bridge.connection is None
    finally:
        mosquitto.cont()


@pytest.mark.parametrize("how", ["times out", "is cancelled"])
async def test_a_failed_connect_leaves_no_socket(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    monkeypatch.setattr(connection_module, "CONNECT_TIMEOUT_S", 0.2 if how == "times out" else 10.0)
    ended, asked = asyncio.Event(), asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(4096):
            asked.set()
        ended.set()

    async with serving(silent, (HOST, 0)) as server, asyncio.timeout(WAIT_S):
        bridge = a_bridge(server.sockets[0].getsockname()[1])
        async with running(bridge, until_connected=False):
            await asked.wait()
            if how == "times out":
                await ended.wait()
        await ended.wait()
    assert ended.is_set()


async def test_many_connections_leave_no_descriptors_and_no_tasks(mosquitto: LabBroker) -> None:
    bridge = a_bridge(mosquitto)
    async with running(bridge):
        tasks, descriptors = len(asyncio.all_tasks()), len(os.listdir("/proc/self/fd"))
        for _ in range(15):
            bridge._online.clear()
            cut(bridge)
            assert await bridge.wait_connected(WAIT_S)
        await until(lambda: len(asyncio.all_tasks()) <= tasks, "the tasks of lost connections end")
        await until(lambda: len(os.listdir("/proc/self/fd")) <= descriptors, "their descriptors are closed")


async def test_a_socket_that_breaks_during_a_write_is_no_error(mosquitto: LabBroker) -> None:
    errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
    bridge = a_bridge(mosquitto)
    async with running(bridge):
        connection = bridge.connection
        assert connection is not None
        cut(bridge)
        connection.send(Packet(Publication("x", dict), b"x", None, 10))
        connection._paho.loop_read()  # reads the end of file, and closes the socket before the write
        bridge._online.clear()
        assert await bridge.wait_connected(WAIT_S)
        assert bridge.connection is not connection
    assert errors == []


@pytest.mark.parametrize("turns", range(12))
async def test_a_connection_lost_during_a_stop_does_not_prevent_the_stop(
    mosquitto: LabBroker, turns: int
) -> None:
    bridge = a_bridge(mosquitto)
    task = asyncio.create_task(bridge.run(), name="bridge")
    assert await bridge.wait_connected(WAIT_S)
    assert bridge.connection is not None
    bridge.connection._ended.set_exception(aiomqtt.MqttError("broken"))
    for _ in range(turns):  # one iteration of the loop more per case
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait({task}, timeout=WAIT_S)
    assert task.cancelled()


async def test_the_broker_retains_what_the_publisher_publishes(mosquitto: LabBroker) -> None:
    bridge = a_bridge(mosquitto)
    publisher = Publisher(bridge, Agent("edge-7", "edge-7", "0.1.0", "f00", 60.0), min_interval_s=0.05)
    record = VmStatus(VmId("web1"), "web1", "/run/web1.qmp", "ok", size=512, actual=512)
    publisher.vm_changed(record)
    async with running(bridge), listening(mosquitto.port) as listener:
        timer = asyncio.create_task(publisher.run(), name="publisher")
        try:
            await listener.on(bridge.topics.availability("web1"), b"online")
            assert json.loads((await listener.on(STATE)).payload)["actual"] == 512
            for actual in (400, 300, 200):
                publisher.vm_changed(dataclasses.replace(record, actual=actual))
            await listener.until(lambda one: one.topic.value == STATE and b'"actual":200' in one.payload)
            assert not any(b'"actual":300' in one.payload for one in listener.messages)
            publisher.vm_gone(record.id)
            await listener.on(STATE, b"")
            await listener.on(bridge.topics.vms, b"[]")
        finally:
            timer.cancel()
            await asyncio.wait({timer})


async def test_a_socket_that_the_loop_gave_up_ends_the_connection(
    mosquitto: LabBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """uvloop closes its handle of a socket that broke, calls no reader, and refuses a writer."""
    bridge = a_bridge(mosquitto)
    async with running(bridge):
        connection = bridge.connection
        assert connection is not None

        def refused(*_: object) -> None:
            raise RuntimeError("the handler is closed")

        with monkeypatch.context() as broken:
            broken.setattr(asyncio.get_running_loop(), "add_writer", refused, raising=False)
            bridge.event(f"{ROOT}/event", {"number": 1})
            await until(lambda: bridge.connection is not connection, "the loss is noticed")
        assert await bridge.wait_connected(WAIT_S)
    assert logged(caplog, "broker-lost")


@pytest.mark.parametrize("scheme", ["mqtt", "mqtts", "ws"])
async def test_an_end_that_the_loop_does_not_report_is_noticed(
    sockets_dir: Path, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """uvloop may give up a socket that is reset without calling its reader."""
    monkeypatch.setattr(bridge_module, "LOOK_S", 0.05)
    options, changed = [f"listener 0 {sockets_dir}/mqtt.socket"], {}
    if scheme == "mqtts":
        certificate, key = certify(sockets_dir, "broker")
        options, changed = tls_options(certificate, key), {"ca_file": str(certificate)}
    async with LabBroker(sockets_dir, websockets=scheme == "ws", options=options) as broker:
        bridge = a_bridge(brokers=(Broker(scheme, HOST, broker.port),), **changed)
        async with running(bridge):
            await until(bridge._status.seen.is_set, "our own status comes back")
            connection = bridge.connection
            assert connection is not None
            assert connection._raw is not None
            asyncio.get_running_loop().remove_reader(connection._raw.fileno())
            await broker.restart()
            await until(lambda: bridge.connection not in (None, connection), "it is connected again")
