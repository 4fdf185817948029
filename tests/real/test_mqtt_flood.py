"""Floods of requests: each is answered once, and the others' requests are not delayed by them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from mqtt_listener import WAIT_S, listening, running, settings_for
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.commands import Message
from qmpballoon.protocol.requests import MOST_WAITING, MOST_WAITING_IN_ALL, Request

ROOT = "qmpballoon/edge-7"
REQUESTS = 3000
AMONG_THE_FIRST = 40


async def handle(request: Request) -> object:
    return {"verb": request.verb}


def a_bridge(broker: LabBroker) -> Bridge:
    return Bridge(settings_for(broker), handle, vm_exists=lambda vm: vm.startswith("web"))


async def test_three_thousand_requests_at_once_get_one_answer_each(sockets_dir: Path) -> None:
    async with LabBroker(sockets_dir, options=["max_queued_messages 0"]) as broker:
        bridge = a_bridge(broker)
        async with running(bridge), listening(broker.port, "flood/#") as listener:
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.ResponseTopic, properties.CorrelationData = "flood/answers", b"c"
            for number in range(REQUESTS):
                payload = json.dumps({"transaction": number})
                listener.client._client.publish(
                    f"{ROOT}/vm/web1/request/get", payload, 0, properties=properties
                )

            async def answers() -> int:
                return len(listener.messages)

            await eventually(answers, lambda n: n >= REQUESTS, timeout_s=WAIT_S, what="all are answered")
            values = [json.loads(one.payload) for one in listener.messages]
            numbers = Counter(value["transaction"] for value in values)
            assert numbers == Counter(range(REQUESTS))
            codes = {
                (json.loads(one.payload)["error"] or {"code": "ok"})["code"] for one in listener.messages
            }
            assert codes <= {"ok", "busy"}


@pytest.mark.parametrize("flooded", ["vm/web1", "vm/nobody{}", ""])
async def test_a_request_of_another_vm_passes_a_flood(sockets_dir: Path, flooded: str) -> None:
    async with LabBroker(sockets_dir) as broker:
        bridge = a_bridge(broker)
        async with listening(broker.port, f"{ROOT}/#", "victim") as listener, running(bridge):
            await listener.on(bridge.topics.status, b"online")
            start = len(listener.messages)
            connection = bridge.connection
            assert connection is not None
            for number in range(REQUESTS):  # all arrive before any is read
                place = f"{ROOT}/{flooded.format(number)}".rstrip("/")
                connection._received(Message(f"{place}/request/get", b'{"transaction": 1}'))
            connection._received(Message(f"{ROOT}/vm/web2/request/get", b"{}", response_topic="victim"))
            await listener.on("victim", start=start)
            topics = [one.topic.value for one in listener.messages[start:]]
            assert topics.index("victim") < AMONG_THE_FIRST


async def test_a_requester_of_the_same_vm_finds_a_place_among_those_of_another(sockets_dir: Path) -> None:
    may_finish = asyncio.Event()

    async def waits(request: Request) -> object:
        await may_finish.wait()
        return {}

    async with LabBroker(sockets_dir) as broker:
        bridge = Bridge(settings_for(broker), waits, vm_exists=lambda vm: vm == "web1")
        async with running(bridge), listening(broker.port, "answers/#") as listener:
            connection = bridge.connection
            assert connection is not None
            for number in range(2 * MOST_WAITING_IN_ALL):
                for asker in ("flood", "victim") if number == MOST_WAITING_IN_ALL else ("flood",):
                    topic = f"answers/{asker}"
                    connection._received(Message(f"{ROOT}/vm/web1/request/get", b"{}", response_topic=topic))

            async def busy() -> int:
                return sum(b'"busy"' in one.payload for one in listener.messages)

            refused = 2 * MOST_WAITING_IN_ALL - MOST_WAITING
            await eventually(busy, lambda one: one == refused, timeout_s=WAIT_S, what="the flood is busy")
            may_finish.set()
            victim = await listener.on("answers/victim")
            assert json.loads(victim.payload)["status"] == "ok"


async def test_requests_beyond_the_bound_are_dropped_and_logged(
    sockets_dir: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qmpballoon.mqtt.inbox.MOST_MESSAGES", 100)
    caplog.set_level(logging.INFO, "qmpballoon")
    async with LabBroker(sockets_dir) as broker:
        bridge = a_bridge(broker)
        async with running(bridge), listening(broker.port, "answers/#") as listener:
            connection = bridge.connection
            assert connection is not None
            for number in range(150):
                connection._received(
                    Message(
                        f"{ROOT}/vm/web1/request/get",
                        json.dumps({"transaction": number}).encode(),
                        response_topic="answers/flood",
                    )
                )

            async def answers() -> int:
                return len(listener.messages)

            await eventually(answers, lambda one: one >= 100, timeout_s=WAIT_S, what="100 are answered")
            assert {json.loads(one.payload)["transaction"] for one in listener.messages} == set(range(100))
    assert any("requests-dropped" in record.getMessage() for record in caplog.records)
