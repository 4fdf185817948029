"""Requests over a real mosquitto: one answer each, in every form."""

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
from qmpballoon.protocol.requests import MOST_WAITING, Request

ROOT = "qmpballoon/edge-7"
GET = f"{ROOT}/vm/web1/request/get"


class Agent:
    """The handler behind the bridge: waits while ``may_go`` is not set, records the requests."""

    def __init__(self) -> None:
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.done: list[Request] = []
        self.raises: Exception | None = None

    async def handle(self, request: Request) -> object:
        self.done.append(request)
        await self.may_go.wait()
        if self.raises is not None:
            raise self.raises
        return {"number": len(self.done)}

    def bridge(self, broker: LabBroker, **changed: Any) -> Bridge:
        return Bridge(settings_for(broker, **changed), self.handle, knows_vm=lambda vm: vm == "web1")


@pytest.fixture
async def mosquitto(sockets_dir: Path) -> AsyncIterator[LabBroker]:
    async with LabBroker(sockets_dir) as broker:
        yield broker


@pytest.fixture
def agent() -> Agent:
    return Agent()


@pytest.fixture
async def listener(mosquitto: LabBroker, agent: Agent) -> AsyncIterator[Listener]:
    """A client beside a bridge that is connected."""
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
    assert not agent.done


async def test_correlation_response_topic_and_format_are_those_of_the_request(listener: Listener) -> None:
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


async def test_a_response_topic_below_the_base_is_not_honoured(listener: Listener, agent: Agent) -> None:
    answer = await listener.ask(GET, {}, ResponseTopic=f"{ROOT}/vm/web1/target/set")
    assert code(answer) == "ok"
    assert len(agent.done) == 1


async def test_a_response_topic_for_which_the_broker_disconnects_is_not_honoured(
    mosquitto: LabBroker, agent: Agent
) -> None:
    # mosquitto 2.0.11 forwards such requests; 2.0.21 disconnects the client that sends them.
    bridge = agent.bridge(mosquitto)
    async with listening(mosquitto.port) as listener, running(bridge):
        connection = bridge.connection
        for asked in ("a/" * 300, "replies/#"):
            start = len(listener.messages)
            done = len(agent.done)
            if await was_forwarded(mosquitto, asked):
                answer = await listener.on(GET.replace("request", "response"), start=start)
                assert code(json.loads(answer.payload)) == "ok"
                done += 1
            assert code(await listener.ask(GET, {})) == "ok"
            assert len(agent.done) == done + 1
            assert bridge.connection is connection


async def was_forwarded(mosquitto: LabBroker, response_topic: str) -> bool:
    """Send a request by another client; return whether the broker accepted it, without a disconnect."""
    async with listening(mosquitto.port, "nothing") as client:
        sent = asyncio.create_task(client.send(GET, {}, ResponseTopic=response_topic), name="request")
        cut_off = asyncio.create_task(client.cut_off.wait(), name="cut off")
        try:
            async with asyncio.timeout(WAIT_S):
                await asyncio.wait({sent, cut_off}, return_when=asyncio.FIRST_COMPLETED)
            assert sent.done() or cut_off.done()
            return sent.done() and sent.exception() is None
        finally:
            for task in (sent, cut_off):
                task.cancel()
            await asyncio.gather(sent, cut_off, return_exceptions=True)


async def test_the_same_transaction_twice_has_one_effect(listener: Listener, agent: Agent) -> None:
    first = await listener.ask(GET, {"transaction": "t"})
    assert await listener.ask(GET, {"transaction": "t"}) == first
    assert len(agent.done) == 1


async def test_the_seventeenth_request_is_busy_and_all_are_answered(listener: Listener, agent: Agent) -> None:
    agent.may_go.clear()
    for number in range(MOST_WAITING):
        await listener.send(GET, {"transaction": number})
    assert code(await listener.ask(GET, {"transaction": "one too many"})) == "busy"
    assert code(await listener.ask(f"{ROOT}/vm/nobody/request/get", {})) == "unknown-vm"
    start = len(listener.messages)
    agent.may_go.set()
    answered = GET.replace("request", "response")
    for number in range(MOST_WAITING):
        await listener.until(
            lambda one, number=number: (  # type: ignore[misc]
                one.topic.value == answered and json.loads(one.payload)["transaction"] == number
            ),
            start,
        )
    assert len(agent.done) == MOST_WAITING


async def test_the_topic_target_set_is_answered_under_its_verb(listener: Listener, agent: Agent) -> None:
    topic = f"{ROOT}/vm/web1/target/set"
    await listener.ask(topic, "256MiB", answered=f"{ROOT}/vm/web1/response/set-target")
    await listener.ask(topic, "auto", answered=f"{ROOT}/vm/web1/response/set-mode")
    assert [request.verb for request in agent.done] == ["set-target", "set-mode"]


async def test_a_retained_command_is_refused_and_its_clearing_ignored(
    listener: Listener, agent: Agent
) -> None:
    start = len(listener.messages)
    await listener.send(GET, {}, retain=True)
    answer = await listener.on(GET.replace("request", "response"), start=start)
    assert code(json.loads(answer.payload)) == "retained"
    await listener.send(GET, b"", retain=True)
    assert code(await listener.ask(GET, {"transaction": "after"})) == "ok"
    assert len(agent.done) == 1


@pytest.mark.parametrize(("protocol", "answers"), [("5", []), ("3.1.1", ["retained"])])
async def test_a_command_that_was_retained_before_the_start_is_never_executed(
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
    assert [request.transaction for request in agent.done] == ["new"]


async def test_errors_of_the_tree_are_answered_with_their_word(listener: Listener, agent: Agent) -> None:
    agent.raises = NoBalloon("no virtio balloon")
    assert (await listener.ask(GET, {}))["error"] == {"code": "no-balloon", "message": "no virtio balloon"}


async def test_pending_requests_are_answered_before_offline_at_a_stop(
    mosquitto: LabBroker, agent: Agent
) -> None:
    agent.may_go.clear()
    async with listening(mosquitto.port) as listener:
        async with running(agent.bridge(mosquitto)):
            await listener.send(GET, {"transaction": 1})
            assert code(await listener.ask(f"{ROOT}/request/fly", {})) == "unknown-verb"
            start = len(listener.messages)
        await listener.on(f"{ROOT}/status", b"offline", start=start)
        (answer, _) = listener.messages[start:]
        assert code(json.loads(answer.payload)) == "offline"
    assert len(agent.done) == 1


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
    agent.may_go.clear()
    bridge = agent.bridge(mosquitto)
    async with listening(mosquitto.port) as listener, running(bridge):
        await listener.send(GET, {"transaction": "slow"})
        assert code(await listener.ask(f"{ROOT}/request/fly", {})) == "unknown-verb"
        assert bridge.connection is not None
        bridge._online.clear()
        bridge.connection._paho.socket().shutdown(2)  # type: ignore[union-attr]
        assert await bridge.wait_connected(WAIT_S)
        start = len(listener.messages)
        agent.may_go.set()
        answer = await listener.on(GET.replace("request", "response"), start=start)
        assert json.loads(answer.payload)["transaction"] == "slow"
