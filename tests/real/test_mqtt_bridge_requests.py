"""Requests over a real mosquitto: one answer each, on every topic and in every format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from mqtt_listener import WAIT_S, Listener, listening, property_of, running, settings_for

from qmpballoon.errors import NoBalloon
from qmpballoon.lab.broker import LabBroker
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.commands import Message
from qmpballoon.mqtt.limits import WINDOW
from qmpballoon.mqtt.packets import Packet
from qmpballoon.protocol.requests import MOST_WAITING, Request

ROOT = "qmpballoon/edge-7"
GET = f"{ROOT}/vm/web1/request/get"


class Agent:
    """Handles the bridge's requests: waits until ``may_finish`` is set, counts the requests."""

    def __init__(self) -> None:
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.handled: list[Request] = []
        self.raises: Exception | None = None

    async def handle(self, request: Request) -> object:
        self.handled.append(request)
        await self.may_finish.wait()
        if self.raises is not None:
            raise self.raises
        return {"number": len(self.handled)}

    def bridge(self, broker: LabBroker, **changed: Any) -> Bridge:
        return Bridge(settings_for(broker, **changed), self.handle, vm_exists=lambda vm: vm == "web1")


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
async def listener(mosquitto: LabBroker, agent: Agent) -> AsyncIterator[Listener]:
    """A client while a bridge is connected."""
    async with listening(mosquitto.port) as listener, running(agent.bridge(mosquitto)):
        yield listener


def code(answer: dict[str, Any]) -> str:
    return str(answer["error"]["code"]) if answer["error"] else "ok"


@pytest.mark.parametrize(
    ("topic", "payload", "wanted"),
    [
        ("vm/web1/request/get", "{", "malformed"),
        ("vm/web1/request/get", "x" * 70_000, "malformed"),
        ("vm/web1/request/get", b"\xff", "malformed"),
        ("vm/web1/request/get", b"\x81\xa1", "malformed"),
        ("vm/web1/request/get", {"transaction": "x" * 300}, "malformed"),
        ("vm/web1/request/get", {"shiny": 1}, "malformed"),
        ("vm/web1/request/set-target", {}, "malformed"),
        ("vm/web1/request/set-target", "512M", "malformed"),
        ("vm/web1/request/set-target", {"target": 0}, "out-of-range"),
        ("vm/web1/request/set-target", {"target": 5, "wait_s": 601}, "out-of-range"),
        ("vm/web1/request/fly", {}, "unknown-verb"),
        ("request/fly", {}, "unknown-verb"),
        ("vm/nobody/request/get", {}, "unknown-vm"),
    ],
)
async def test_every_kind_of_bad_request_is_answered(
    listener: Listener, agent: Agent, topic: str, payload: object, wanted: str
) -> None:
    start = len(listener.messages)
    await listener.send(f"{ROOT}/{topic}", payload)
    answer = await listener.on(f"{ROOT}/{topic.replace('request', 'response')}", start=start)
    value = (
        msgpack.unpackb(answer.payload)
        if isinstance(payload, bytes) and payload[0] == 0x81
        else json.loads(answer.payload)
    )
    assert code(value) == wanted
    assert value["error"]["message"]
    assert not agent.handled


async def test_an_answer_has_the_requested_correlation_topic_and_format(listener: Listener) -> None:
    await listener.send(
        GET,
        msgpack.packb({"transaction": 5}),
        ResponseTopic="replies/me",
        CorrelationData=b"\0\x01",
        MessageExpiryInterval=30,
    )
    answer = await listener.on("replies/me")
    assert msgpack.unpackb(answer.payload)["transaction"] == 5
    assert property_of(answer, "CorrelationData") == b"\0\x01"
    assert property_of(answer, "ContentType") == "application/msgpack"
    assert not answer.retain


async def test_a_response_topic_below_the_base_is_not_used(listener: Listener, agent: Agent) -> None:
    answer = await listener.ask(GET, {}, ResponseTopic=f"{ROOT}/vm/web1/target/set")
    assert code(answer) == "ok"
    assert len(agent.handled) == 1


async def test_a_response_topic_that_would_disconnect_us_is_not_used(
    mosquitto: LabBroker, agent: Agent
) -> None:
    # mosquitto 2.0.11 delivers such requests; 2.0.21 disconnects their sender.
    bridge = agent.bridge(mosquitto)
    async with listening(mosquitto.port) as listener, running(bridge):
        connection = bridge.connection
        for asked in ("a/" * 300, "replies/#"):
            start = len(listener.messages)
            handled = len(agent.handled)
            if await is_delivered(mosquitto, asked):
                answer = await listener.on(GET.replace("request", "response"), start=start)
                assert code(json.loads(answer.payload)) == "ok"
                handled += 1
            assert code(await listener.ask(GET, {})) == "ok"
            assert len(agent.handled) == handled + 1
            assert bridge.connection is connection


async def is_delivered(mosquitto: LabBroker, response_topic: str) -> bool:
    """Send a request from another client; return whether the broker took it without disconnecting it."""
    async with listening(mosquitto.port, "nothing") as requester:
        sent = asyncio.create_task(requester.send(GET, {}, ResponseTopic=response_topic), name="request")
        disconnected = asyncio.create_task(requester.disconnected.wait(), name="disconnected")
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait({sent, disconnected}, return_when=asyncio.FIRST_COMPLETED)
            assert sent.done() or disconnected.done()
            return sent.done() and sent.exception() is None
        finally:
            for task in (sent, disconnected):
                task.cancel()
            await asyncio.gather(sent, disconnected, return_exceptions=True)


async def test_the_same_transaction_twice_has_one_effect(listener: Listener, agent: Agent) -> None:
    first = await listener.ask(GET, {"transaction": "t"})
    assert await listener.ask(GET, {"transaction": "t"}) == first
    assert len(agent.handled) == 1


async def test_the_seventeenth_request_is_busy_and_all_are_answered(listener: Listener, agent: Agent) -> None:
    agent.may_finish.clear()
    for number in range(MOST_WAITING):
        await listener.send(GET, {"transaction": number})
    assert code(await listener.ask(GET, {"transaction": "one too many"})) == "busy"
    assert code(await listener.ask(f"{ROOT}/vm/nobody/request/get", {})) == "unknown-vm"
    start = len(listener.messages)
    agent.may_finish.set()
    answered = GET.replace("request", "response")
    for number in range(MOST_WAITING):
        await listener.until(
            lambda one, number=number: (  # type: ignore[misc]
                one.topic.value == answered and json.loads(one.payload)["transaction"] == number
            ),
            start,
        )
    assert len(agent.handled) == MOST_WAITING


async def test_the_topic_target_set_is_answered_under_its_verb(listener: Listener, agent: Agent) -> None:
    topic = f"{ROOT}/vm/web1/target/set"
    await listener.ask(topic, "256MiB", answered=f"{ROOT}/vm/web1/response/set-target")
    await listener.ask(topic, "auto", answered=f"{ROOT}/vm/web1/response/set-mode")
    assert [request.verb for request in agent.handled] == ["set-target", "set-mode"]


async def test_a_retained_command_is_refused_and_so_is_its_clearing(listener: Listener, agent: Agent) -> None:
    payloads: tuple[object, ...] = ({}, b"")
    for payload in payloads:
        start = len(listener.messages)
        await listener.send(GET, payload, retain=True)
        answer = await listener.on(GET.replace("request", "response"), start=start)
        assert code(json.loads(answer.payload)) == "retained"
    assert not agent.handled


async def test_an_empty_request_has_one_answer(listener: Listener, agent: Agent) -> None:
    for topic in (GET, f"{ROOT}/request/list"):
        assert code(await listener.ask(topic, b"")) == "ok"
    set_target = f"{ROOT}/vm/web1/request/set-target"
    assert code(await listener.ask(set_target, b"")) == "malformed"
    await listener.send(f"{ROOT}/vm/web1/target/set", b"")  # clears a retained one, and is not a request
    await listener.send(GET, b"", ContentType="application/msgpack", ResponseTopic="replies/me")
    answer = await listener.on("replies/me")
    assert msgpack.unpackb(answer.payload)["status"] == "ok"
    await listener.wait_for_pending()
    answers = [one for one in listener.messages if "/response/" in one.topic.value]
    assert (len(answers), len(agent.handled)) == (3, 3)


@pytest.mark.parametrize(("protocol", "answers"), [("5", []), ("3.1.1", ["retained"])])
async def test_a_command_retained_before_the_connect_is_never_executed(
    mosquitto: LabBroker, agent: Agent, protocol: str, answers: list[str]
) -> None:
    answered = GET.replace("request", "response")
    async with listening(mosquitto.port) as listener:
        await listener.send(GET, {"transaction": "old"}, retain=True)
        async with running(agent.bridge(mosquitto, protocol=protocol)):
            await listener.send(GET, {"transaction": "new"})
            await listener.until(
                lambda one: one.topic.value == answered and json.loads(one.payload)["transaction"] == "new"
            )
        seen = [json.loads(one.payload) for one in listener.messages if one.topic.value == answered]
    assert [code(one) for one in seen if one["transaction"] == "old"] == answers
    assert [request.transaction for request in agent.handled] == ["new"]


async def test_errors_of_the_tree_are_answered_with_their_word(listener: Listener, agent: Agent) -> None:
    agent.raises = NoBalloon("no virtio balloon")
    assert (await listener.ask(GET, {}))["error"] == {"code": "no-balloon", "message": "no virtio balloon"}


async def test_pending_requests_are_answered_before_offline_at_a_stop(
    mosquitto: LabBroker, agent: Agent
) -> None:
    agent.may_finish.clear()
    async with listening(mosquitto.port) as listener:
        async with running(agent.bridge(mosquitto)):
            await listener.send(GET, {"transaction": 1})
            assert code(await listener.ask(f"{ROOT}/request/fly", {})) == "unknown-verb"
            start = len(listener.messages)
        await listener.on(f"{ROOT}/status", b"offline", start=start)
        (answer, _) = listener.messages[start:]
        assert code(json.loads(answer.payload)) == "offline"
    assert len(agent.handled) == 1


async def test_a_burst_of_a_thousand_states_delays_no_answer(
    mosquitto: LabBroker, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridge = agent.bridge(mosquitto)
    sent: list[str] = []
    async with listening(mosquitto.port, GET.replace("request", "response")) as listener, running(bridge):
        connection = bridge.connection
        assert connection is not None
        send = connection.send

        def recorded(packet: Packet) -> None:
            sent.append(packet.publication.topic)
            send(packet)
            if len(sent) == 100:
                connection._received(Message(GET, b'{"transaction": 1}'))

        monkeypatch.setattr(connection, "send", recorded)
        for number in range(1000):
            bridge.retain(f"{ROOT}/vm/vm{number}/state", dict)
        await listener.on(GET.replace("request", "response"))
        assert sent.index(GET.replace("request", "response")) <= 100 + 2 * WINDOW


async def test_an_internal_error_is_answered_and_ends_the_bridge(mosquitto: LabBroker, agent: Agent) -> None:
    agent.raises = ZeroDivisionError("oops")
    async with listening(mosquitto.port) as listener:
        bridge = agent.bridge(mosquitto)
        task = asyncio.create_task(bridge.run(), name="bridge")
        assert await bridge.wait_connected(WAIT_S)
        assert code(await listener.ask(GET, {})) == "internal"
        await listener.on(f"{ROOT}/status", b"offline")
        with pytest.raises(ExceptionGroup) as raised:
            await asyncio.wait_for(task, WAIT_S)
    assert raised.group_contains(ZeroDivisionError)


async def test_an_answer_survives_a_lost_connection(mosquitto: LabBroker, agent: Agent) -> None:
    agent.may_finish.clear()
    bridge = agent.bridge(mosquitto)
    async with listening(mosquitto.port) as listener, running(bridge):
        await listener.send(GET, {"transaction": "slow"})
        assert code(await listener.ask(f"{ROOT}/request/fly", {})) == "unknown-verb"
        assert bridge.connection is not None
        bridge._online.clear()
        bridge.connection._paho.socket().shutdown(2)  # type: ignore[union-attr]
        assert await bridge.wait_connected(WAIT_S)
        start = len(listener.messages)
        agent.may_finish.set()
        answer = await listener.on(GET.replace("request", "response"), start=start)
        assert json.loads(answer.payload)["transaction"] == "slow"
