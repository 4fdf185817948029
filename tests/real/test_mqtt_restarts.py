"""Requests around the loss of a connection: what the agent received is answered, once."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from mqtt_listener import WAIT_S, Listener, listening, running, settings_for

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.waiting import eventually
from qmpballoon.mqtt import bridge as bridge_module
from qmpballoon.mqtt.bridge import Bridge
from qmpballoon.mqtt.commands import Message
from qmpballoon.protocol.requests import Request

ROOT = "qmpballoon/edge-7"
GET = f"{ROOT}/vm/web1/request/get"
GOT = f"{ROOT}/vm/web1/response/get"
PROTOCOLS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])
ROUNDS = 4
A_ROUND = 30


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bridge_module, "SHORTEST_PAUSE_S", 0.02)
    monkeypatch.setattr(bridge_module, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(bridge_module, "SETTLED_S", 0.2)


class Agent:
    """Counts the requests that it got; answers while ``may_finish`` is set."""

    def __init__(self) -> None:
        self.got: list[object] = []
        self.may_finish = asyncio.Event()
        self.may_finish.set()

    async def handle(self, request: Request) -> object:
        self.got.append(request.transaction)
        await self.may_finish.wait()
        return {}

    def bridge(self, broker: LabBroker, protocol: str) -> Bridge:
        return Bridge(
            settings_for(broker, protocol=protocol), self.handle, vm_exists=lambda vm: vm.startswith("web")
        )


def request(number: int) -> Message:
    return Message(GET, json.dumps({"transaction": number}).encode())


def cut(bridge: Bridge) -> None:
    assert bridge.connection is not None
    bridge._online.clear()
    bridge.connection._paho.socket().shutdown(2)  # type: ignore[union-attr]


def transactions(listener: Listener) -> list[object]:
    return [json.loads(one.payload)["transaction"] for one in listener.messages if one.topic.value == GOT]


async def until_answered(listener: Listener, numbers: list[object]) -> None:
    async def answered() -> list[object]:
        return transactions(listener)

    await eventually(
        answered, lambda seen: set(numbers) <= set(seen), timeout_s=WAIT_S, what="all are answered"
    )


@PROTOCOLS
async def test_requests_that_were_not_read_when_the_connection_broke_are_answered(
    sockets_dir: Path, protocol: str
) -> None:
    agent = Agent()
    async with LabBroker(sockets_dir) as broker:
        bridge = agent.bridge(broker, protocol)
        async with listening(broker.port) as listener, running(bridge):
            assert bridge.connection is not None
            for number in range(A_ROUND):
                bridge.connection._received(request(number))
            cut(bridge)
            assert not agent.got
            await until_answered(listener, list(range(A_ROUND)))
            assert sorted(map(str, agent.got)) == sorted(map(str, range(A_ROUND)))


async def test_an_answer_waits_for_a_requester_that_reconnects_later(sockets_dir: Path) -> None:
    agent = Agent()
    agent.may_finish.clear()
    async with LabBroker(sockets_dir) as broker:
        bridge = agent.bridge(broker, "5")
        async with running(bridge):
            assert bridge.connection is not None
            bridge.connection._received(request(1))
            cut(bridge)
            assert await bridge.wait_connected(WAIT_S)
            agent.may_finish.set()  # nobody is subscribed

            async def put_off() -> object:
                return bridge._outbox.answers.next_later_s

            await eventually(put_off, bool, timeout_s=WAIT_S, what="nobody received the answer")
            async with listening(broker.port, GOT, "marker/#") as listener:
                await until_answered(listener, [1])
                await listener.wait_for_pending()
                assert transactions(listener) == [1]
                assert bridge._outbox.answers.next_later_s is None


@PROTOCOLS
async def test_requests_while_the_broker_is_killed_and_restarted(
    sockets_dir: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What reached the agent is answered, and the requester that reconnects gets each answer once."""
    if protocol == "3.1.1":  # then an answer is sent once, and the requester has to be there
        monkeypatch.setattr(bridge_module, "SETTLED_S", 4.0)
    agent = Agent()
    numbers = iter(range(10_000))
    async with LabBroker(sockets_dir) as broker:
        bridge = agent.bridge(broker, protocol)
        async with running(bridge):
            for _ in range(ROUNDS):
                agent.may_finish.clear()
                before = len(agent.got)
                connection = bridge.connection
                assert connection is not None
                for _ in range(10):
                    connection._received(request(next(numbers)))

                async def handled(before: int = before) -> int:
                    return len(agent.got) - before

                await eventually(handled, lambda one: one == 10, timeout_s=WAIT_S, what="requests run")
                await broker.kill()
                bridge._online.clear()
                agent.may_finish.set()  # they are answered into the dying connection
                await broker.start()
                async with listening(broker.port, GOT, "marker/#") as listener:
                    assert await bridge.wait_connected(WAIT_S)
                    await until_answered(listener, agent.got[before:])
                    await listener.wait_for_pending()
                    assert sorted(map(str, transactions(listener))) == sorted(map(str, agent.got[before:]))
