"""An agent under many requests, repeated and mixed up ones, garbage, hostile topics, and beside a flood."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mqtt_listener import Listener, listening
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from stress import OUTSTANDING, PATIENCE_S, ROOT, VMS, agent_under_stress, beside_a_flood, steady

from qmpballoon.lab.broker import LabBroker
from qmpballoon.protocol.verbs import VERBS
from qmpballoon.units import MIB

GARBAGE = 10_000
COPIES = 3


@dataclass
class Stressed:
    """A broker with an agent over simulated QEMUs; ``directory`` has the agent's log."""

    broker: LabBroker
    directory: Path

    def logged(self, word: str) -> int:
        return sum(word in line for line in (self.directory / "agent.log").read_text().splitlines())


@pytest.fixture
async def stressed(sockets_dir: Path) -> AsyncIterator[Stressed]:
    async with agent_under_stress(sockets_dir) as broker:
        yield Stressed(broker, sockets_dir)


async def test_requests_at_a_steady_rate_get_one_answer_each(stressed: Stressed) -> None:
    one = await steady(stressed.broker, requests=600, rate_per_s=200)
    assert one.outstanding == 0
    assert set(one.answers.values()) == {1}
    assert one.sent == 601
    assert {"ok", "malformed", "out-of-range", "unknown-vm"} <= set(one.codes)


async def test_others_pass_a_flood_of_one_vm(stressed: Stressed) -> None:
    flood, passed = await beside_a_flood(stressed.broker, requests=40)
    assert len(passed) == 40
    assert flood.outstanding == 0
    assert set(flood.answers.values()) == {1}
    waiting, answered = sum(each.waiting for each in passed), sum(each.answered for each in passed)
    assert waiting >= 40 * OUTSTANDING // 2
    assert answered < waiting / 2  # else they would have waited for all that came before


async def test_repeated_and_mixed_up_requests_have_one_effect_and_the_same_answer(stressed: Stressed) -> None:
    rng = random.Random(7)
    async with listening(stressed.broker.port, "answers", "marker/#", f"{ROOT}/vm/+/event") as listener:
        count = 0
        for batch in range(10):
            requests = [
                (vm, {"transaction": f"{batch}-{vm}-{number}", "target": rng.randrange(130, 250) * MIB})
                for vm in VMS
                for number in range(5)
            ]
            copies = requests * COPIES
            rng.shuffle(copies)
            for vm, request in copies:
                await listener.send(f"{ROOT}/vm/{vm}/request/set-target", request, ResponseTopic="answers")
            count += len(copies)
            await until(listener, lambda count=count: len(on(listener, "answers")) >= count)
        await listener.wait_for_pending()
        answers: dict[str, list[Any]] = defaultdict(list)
        for payload in on(listener, "answers"):
            answers[payload["transaction"]].append(payload)
        assert {len(each) for each in answers.values()} == {COPIES}
        assert all(each == copies[0] for copies in answers.values() for each in copies)
        assert {copies[0]["status"] for copies in answers.values()} == {"ok"}
        targets = Counter((copies[0]["vm"], copies[0]["result"]["target"]) for copies in answers.values())
        decisions = Counter(
            (payload["vm"], payload["data"]["to"])
            for vm in VMS
            for payload in on(listener, f"{ROOT}/vm/{vm}/event")
            if payload["event"] == "decision"
        )
        assert decisions == targets


async def test_ten_thousand_payloads_of_garbage_get_one_answer_each(stressed: Stressed) -> None:
    rng = random.Random(11)
    async with listening(stressed.broker.port, "answers", "marker/#") as listener:
        for number in range(GARBAGE):
            place, verb = draw_place(rng)
            properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
            properties.ResponseTopic, properties.CorrelationData = "answers", str(number).encode()
            if rng.random() < 0.2:
                properties.ContentType = rng.choice(["application/msgpack", "text/plain", "x" * 300, "é/💥"])
            topic = f"{ROOT}/{place}request/{verb}"
            listener.client._client.publish(topic, draw_payload(rng), 1, properties=properties)
            if number % 100 == 99:  # mosquitto drops what waits for a client beyond 1000 messages
                await until(listener, lambda number=number: len(listener.messages) > number - 500)
        await until(listener, lambda: len(listener.messages) >= GARBAGE)
        await listener.wait_for_pending()
        answers = [one for one in listener.messages if one.topic.value == "answers"]
        numbers = Counter(int(getattr(one.properties, "CorrelationData", b"-1")) for one in answers)
        assert numbers == Counter(range(GARBAGE))
        listed = await listener.ask(f"{ROOT}/request/list", {}, ResponseTopic="answers", answered="answers")
        assert [row["health"] for row in listed["result"]] == ["ok"] * len(VMS)
    assert stressed.logged("broker-connected") == 1


HOSTILE = ["..", "a b", "%s%n", "{}", "é", "💥", "$SYS", "'; --", "a" * 30_000, "\u202e", "-", "null"]
REPLY_TO = [
    "$SYS/broker/uptime",
    "$share/x/y",
    f"{ROOT}/vm/web0/target/set",
    f"{ROOT}/status",
    "qmpballoon",
    "qmpballoon/other/request/reload",
    "homeassistant/status",
    "homeassistant/device/x/config",
    "x" * 2000,
]


async def test_hostile_topics_and_response_topics_get_one_answer_below_the_base(stressed: Stressed) -> None:
    async with listening(stressed.broker.port, "#") as listener:
        await listener.wait_for_pending()
        start = len(listener.messages)
        expected: list[str] = []
        for number, (place, verb) in enumerate(hostile_places()):
            expected.append(f"topic-{number}")
            await listener.send(f"{ROOT}/{place}request/{verb}", {"transaction": expected[-1]})
        for number, reply_to in enumerate(REPLY_TO):
            expected.append(f"reply-{number}")
            request = {"transaction": expected[-1]}
            await listener.send(f"{ROOT}/vm/web0/request/get", request, ResponseTopic=reply_to)
        for number, correlation in enumerate([b"", b"\0" * 1024, b"\xff" * 1025, b"x" * 60_000]):
            expected.append(f"correlation-{number}")
            request = {"transaction": expected[-1]}
            await listener.send(f"{ROOT}/vm/web0/request/get", request, CorrelationData=correlation)
        await until(listener, lambda: len(answered(listener, start)) >= len(expected))
        await listener.wait_for_pending()
        assert Counter(answered(listener, start)) == Counter(expected)
        states = [one for one in listener.messages[start:] if one.topic.value == f"{ROOT}/status"]
        assert states == []
    assert stressed.logged("broker-connected") == 1


def hostile_places() -> Iterator[tuple[str, str]]:
    for name in HOSTILE:
        yield f"vm/{name}/", "get"
        yield "vm/web0/", name
        yield "", name


def answered(listener: Listener, start: int) -> list[str]:
    """Return the transactions of all answers below the root."""
    return [
        json.loads(one.payload)["transaction"]
        for one in listener.messages[start:]
        if one.topic.value.startswith(f"{ROOT}/") and "/response/" in one.topic.value
    ]


def on(listener: Listener, topic: str) -> list[Any]:
    return [json.loads(one.payload) for one in listener.messages if one.topic.value == topic]


async def until(listener: Listener, condition: Any) -> None:
    """Wait for messages that meet the condition."""
    async with asyncio.timeout(PATIENCE_S), listener._arrived:
        await listener._arrived.wait_for(condition)


def draw_place(rng: random.Random) -> tuple[str, str]:
    verbs = list(itertools.chain.from_iterable(VERBS.values()))
    place = rng.choice(["", *(f"vm/{vm}/" for vm in VMS), "vm/nobody/"])
    verb = rng.choice(verbs) if rng.random() < 0.9 else f"x{rng.randrange(1000)}"
    return place, "list" if verb in ("doctor", "reload") else verb


def draw_payload(rng: random.Random) -> bytes:
    """Return bytes that are no valid request, but for a few that are so by chance."""
    whole = b'{"transaction": {"a": [1, 2.5e3, null]}, "target": "50%", "wait_s": 3, "mode": "auto"}'
    match rng.randrange(10):
        case 0:
            return rng.randbytes(rng.randrange(1, 200))
        case 1:
            return whole[: rng.randrange(1, len(whole))]
        case 2:
            at = rng.randrange(len(whole))
            return whole[:at] + rng.randbytes(1) + whole[at + 1 :]
        case 3:
            return b"[" * rng.randrange(1, 3000)
        case 4:
            return b'{"a":' * rng.randrange(1, 500)
        case 5:
            return b'{"target": ' + b"9" * rng.randrange(1, 5000) + b"}"
        case 6:
            return rng.choice(
                [b"NaN", b"-Infinity", b"null", b"true", b'""', b"[]", b'"\\ud800"', b"\xff\xfe{}"]
            )
        case 7:
            return bytes([rng.choice([0x80, 0x8F, 0xDE, 0xDF])]) + rng.randbytes(rng.randrange(40))
        case 8:
            return b'{"target": 1, "target": 2}'
        case _:
            return b"x" * rng.choice([1, 300, 70_000]) if rng.random() < 0.2 else b'{"no-such": 1}'
