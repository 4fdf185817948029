"""Messages on command topics: their requests, and where and in which format these are answered."""

from __future__ import annotations

import asyncio
from typing import Any

from qmpballoon.mqtt.answers import Answer
from qmpballoon.mqtt.commands import Message, arrival_of
from qmpballoon.mqtt.topics import Topics
from qmpballoon.protocol.requests import Request, Requests
from qmpballoon.protocol.verbs import SetMode

TOPICS = Topics("qmpballoon", "edge-7")
GET = f"{TOPICS.root}/vm/web1/request/get"
TARGET_SET = f"{TOPICS.root}/vm/web1/target/set"


class Agent:
    """Answers each request with its number; records requests and answers."""

    def __init__(self) -> None:
        self.done: list[Request] = []
        self.answers: list[Answer] = []

    async def handle(self, request: Request) -> object:
        self.done.append(request)
        return {"number": len(self.done)}

    async def take(self, *messages: Message) -> None:
        requests = Requests(self.handle, lambda vm: vm == "web1", lambda: 7.0)
        async with asyncio.TaskGroup() as group:
            requests.open(group)
            for message in messages:
                arrival = arrival_of(message, TOPICS, self.answers.append, lambda: 7.0)
                assert arrival is not None
                requests.receive(arrival)

    @property
    def codes(self) -> list[str]:
        values: list[Any] = [answer.value for answer in self.answers]
        return [(value["error"] or {"code": "ok"})["code"] for value in values]


async def test_a_request_is_answered_on_its_topic_in_its_format() -> None:
    agent = Agent()
    asked = Message(GET, b'{"transaction": [1]}', correlation=b"c", response_topic="mine")
    await agent.take(asked, Message(GET, b"\x80"))
    first, second = agent.answers
    assert (first.topic, first.correlation, first.payload_format) == ("mine", b"c", "json")
    assert first.made_at_s == 7.0
    assert isinstance(first.value, dict)
    assert (first.value["result"], first.value["transaction"]) == ({"number": 1}, [1])
    assert second.payload_format == "msgpack"
    assert second.topic == "qmpballoon/edge-7/vm/web1/response/get"


async def test_the_topic_target_set_takes_a_size_or_auto() -> None:
    agent = Agent()
    await agent.take(*(Message(TARGET_SET, payload) for payload in (b"256MiB", b"auto", b"nonsense")))
    assert [request.verb for request in agent.done] == ["set-target", "set-mode"]
    assert agent.done[1].asked == SetMode("auto")
    verbs = [answer.topic.rpartition("/")[2] for answer in agent.answers]
    assert sorted(zip(verbs, agent.codes, strict=True)) == [
        ("set-mode", "ok"),
        ("set-target", "malformed"),
        ("set-target", "ok"),
    ]


async def test_a_retained_request_is_refused_and_so_is_its_clearing() -> None:
    agent = Agent()
    await agent.take(Message(GET, b"{}", retain=True), Message(GET, b"", retain=True))
    assert agent.codes == ["retained", "retained"]
    assert not agent.done


async def test_an_empty_request_gets_one_answer_in_its_format() -> None:
    agent = Agent()
    host = f"{TOPICS.root}/request/list"
    await agent.take(
        Message(GET, b""), Message(host, b""), Message(GET, b"", content_type="application/msgpack")
    )
    assert agent.codes == ["ok", "ok", "ok"]
    assert [answer.payload_format for answer in agent.answers] == ["json", "json", "msgpack"]
    assert agent.answers[1].topic == f"{TOPICS.root}/response/list"


def test_an_empty_payload_on_target_set_is_the_clearing_of_a_retained_one() -> None:
    for retain in (False, True):
        message = Message(TARGET_SET, b"", retain=retain)
        assert arrival_of(message, TOPICS, Agent().answers.append, lambda: 0.0) is None


async def test_the_same_transaction_on_another_topic_is_another_request() -> None:
    agent = Agent()
    payload = b'{"transaction": 1, "target": "256MiB"}'
    again = Message(f"{TOPICS.root}/vm/web1/request/set-target", payload)
    await agent.take(*(Message(TARGET_SET, payload), again, again))
    assert len(agent.answers) == 3
    assert len(agent.done) == 2


def test_a_message_on_another_topic_is_not_a_request() -> None:
    elsewhere = Message(f"{TOPICS.root}/status", b"online")
    assert arrival_of(elsewhere, TOPICS, Agent().answers.append, lambda: 0.0) is None
