"""Requests: one answer each, no second effect, no request waits for another."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import pytest

from qmpballoon.errors import NoBalloon, RequestRefused
from qmpballoon.protocol.requests import (
    MOST_REMEMBERED,
    MOST_REMEMBERED_BYTES,
    MOST_WAITING,
    REMEMBERED_S,
    Arrival,
    Request,
    Requests,
)


class Setup:
    """Requests whose handler waits until ``may_finish`` is set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.answers: list[tuple[Any, str]] = []  # response objects, each with its sender
        self.handled: list[Request] = []
        self.may_finish = asyncio.Event()
        self.may_finish.set()
        self.raises: Exception | None = None
        self.requests = Requests(
            self.handle,
            lambda vm: vm in ("web1", "web2"),
            lambda: self.now_s,
        )

    async def handle(self, request: Request) -> object:
        self.handled.append(request)
        await self.may_finish.wait()
        if self.raises is not None:
            raise self.raises
        return {"number": len(self.handled)}

    def ask(
        self, payload: object, *, vm: str | None = "web1", verb: str = "get", sender: str = "me", **more: Any
    ) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()

        def reply(response: object) -> None:
            self.answers.append((response, sender))

        self.requests.receive(Arrival(more.pop("channel", f"{vm} {verb}"), vm, verb, content, reply, **more))

    async def asked(self, payload: object, **more: Any) -> Any:
        """Send a request in its own task group; return the value of the last answer."""
        async with asyncio.TaskGroup() as group:
            self.requests.open(group)
            self.ask(payload, **more)
        return self.answers[-1][0]

    @property
    def codes(self) -> list[str]:
        return [(response["error"] or {"code": "ok"})["code"] for response, _ in self.answers]


async def test_a_request_is_answered_to_its_sender() -> None:
    setup = Setup()
    value = await setup.asked({"transaction": [1]}, sender="another")
    assert (value["status"], value["result"], value["transaction"]) == ("ok", {"number": 1}, [1])
    assert (value["vm"], value["verb"]) == ("web1", "get")
    assert setup.answers == [(value, "another")]


@pytest.mark.parametrize(
    ("payload", "more", "code"),
    [
        (b"{", {}, "malformed"),
        (b"x" * 70_000, {}, "malformed"),
        ({"a": 1}, {}, "malformed"),
        ({}, {"verb": "fly"}, "unknown-verb"),
        ({}, {"vm": "nobody"}, "unknown-vm"),
        ({}, {"refused": RequestRefused("retained", "not so")}, "retained"),
        ({"target": -1}, {"verb": "set-target"}, "out-of-range"),
        ({}, {"verb": "list"}, "unknown-verb"),
    ],
)
async def test_a_bad_request_gets_its_error_word_and_has_no_effect(
    payload: object, more: dict[str, Any], code: str
) -> None:
    setup = Setup()
    value = await setup.asked(payload, **more)
    assert value["error"]["code"] == code
    assert len(setup.answers) == 1
    assert not setup.handled


async def test_a_bad_request_is_answered_with_its_transaction() -> None:
    setup = Setup()
    assert (await setup.asked({"transaction": "t", "a": 1}))["transaction"] == "t"


@pytest.mark.parametrize("content_type", [None, "application/json", "application/msgpack"])
async def test_an_empty_payload_is_a_request_without_arguments(content_type: str | None) -> None:
    setup = Setup()
    assert (await setup.asked(b"", content_type=content_type))["result"] == {"number": 1}
    assert (await setup.asked(b"", content_type=content_type, vm=None, verb="list"))["status"] == "ok"
    needs = await setup.asked(b"", content_type=content_type, verb="set-target")
    assert needs["error"] == {"code": "malformed", "message": "set-target needs target"}
    assert (len(setup.answers), len(setup.handled)) == (3, 2)


async def test_the_same_transaction_has_one_effect_and_the_same_answer() -> None:
    setup = Setup()
    first = await setup.asked({"transaction": 1})
    setup.now_s = REMEMBERED_S
    assert await setup.asked({"transaction": 1}, sender="again") == first
    assert setup.answers[-1][1] == "again"
    assert len(setup.handled) == 1


async def test_the_same_transaction_joins_the_request_that_still_runs() -> None:
    setup = Setup()
    setup.may_finish.clear()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        setup.ask({"transaction": 1})
        setup.ask({"transaction": 1}, sender="another")
        setup.may_finish.set()
    assert [sender for _, sender in setup.answers] == ["me", "another"]
    assert len(setup.handled) == 1


async def test_another_channel_or_transaction_or_a_minute_later_is_another_request() -> None:
    setup = Setup()
    for more in ({"vm": "web1"}, {"vm": "web2"}, {"vm": None, "verb": "list"}):
        await setup.asked({"transaction": 1}, **more)
    await setup.asked({"transaction": 1}, channel="another")
    await setup.asked({"transaction": 2})
    await setup.asked({})
    await setup.asked({})
    assert len(setup.handled) == 7
    setup.now_s = REMEMBERED_S + 0.1
    await setup.asked({"transaction": 1})
    assert len(setup.handled) == 8


async def test_stored_answers_are_bounded() -> None:
    setup = Setup()
    for number in range(MOST_REMEMBERED + 1):
        await setup.asked({"transaction": number})
    await setup.asked({"transaction": 1})
    assert len(setup.handled) == MOST_REMEMBERED + 1
    await setup.asked({"transaction": 0})
    assert len(setup.handled) == MOST_REMEMBERED + 2


async def test_one_request_to_each_of_1000_vms_leaves_earlier_answers_stored() -> None:
    setup = Setup()
    first = await setup.asked({"transaction": "first"})
    for number in range(1000):
        await setup.asked({"transaction": number}, channel=f"vm{number} get")
    assert await setup.asked({"transaction": "first"}) == first
    assert len(setup.handled) == 1001


async def test_the_bytes_of_stored_answers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup()
    chance = random.Random(1)

    async def many_rows(request: Request) -> object:
        setup.handled.append(request)
        return [chance.getrandbits(63) for _ in range(20_000)]

    monkeypatch.setattr(setup.requests, "handle", many_rows)
    first = await setup.asked({"transaction": 0}, vm=None, verb="list")
    assert await setup.asked({"transaction": 0}, vm=None, verb="list") == first
    assert len(setup.handled) == 1
    for number in range(40):
        await setup.asked({"transaction": number}, vm=None, verb="list")
        held = [len(packed) for _, packed in setup.requests._remembered.values()]
        assert sum(held) == setup.requests._remembered_bytes <= MOST_REMEMBERED_BYTES
    assert 1 < len(held) < 40


async def test_the_seventeenth_waiting_request_of_a_vm_is_busy_and_other_vms_are_not() -> None:
    setup = Setup()
    setup.may_finish.clear()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        for number in range(MOST_WAITING + 1):
            setup.ask({"transaction": number})
        assert setup.codes == ["busy"]
        setup.ask({}, vm="web2")
        setup.ask({}, vm=None, verb="list")
        assert setup.codes == ["busy"]
        setup.may_finish.set()
    assert setup.codes == ["busy"] + ["ok"] * (MOST_WAITING + 2)
    assert (await setup.asked({"transaction": MOST_WAITING}))["status"] == "ok"


async def test_joining_a_running_request_is_bounded() -> None:
    setup = Setup()
    setup.may_finish.clear()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        for _ in range(MOST_WAITING + 1):
            setup.ask({"transaction": 1})
        assert setup.codes == ["busy"]
        setup.may_finish.set()
    assert len(setup.handled) == 1


async def test_a_slow_request_does_not_delay_others() -> None:
    setup = Setup()
    setup.may_finish.clear()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        setup.ask({"transaction": "slow"})
        setup.ask({"bad": 1})
        assert setup.codes == ["malformed"]
        setup.may_finish.set()


async def test_a_request_that_expired_before_its_start_is_not_executed() -> None:
    setup = Setup()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        setup.ask({}, expiry_s=5)
        setup.now_s = 5.1
    assert setup.codes == ["expired"]
    assert not setup.handled


async def test_a_package_error_is_answered_with_its_code() -> None:
    setup = Setup()
    setup.raises = NoBalloon("no virtio balloon: add -device virtio-balloon-pci")
    value = await setup.asked({})
    assert value["error"] == {
        "code": "no-balloon",
        "message": "no virtio balloon: add -device virtio-balloon-pci",
    }


async def test_another_exception_is_answered_internal_and_raised() -> None:
    setup = Setup()
    setup.raises = ZeroDivisionError("oops")
    with pytest.raises(ExceptionGroup) as raised:
        await setup.asked({})
    assert raised.group_contains(ZeroDivisionError)
    assert setup.codes == ["internal"]


async def test_pending_requests_are_answered_when_the_agent_stops_and_none_starts_after() -> None:
    setup = Setup()
    setup.may_finish.clear()
    async with asyncio.TaskGroup() as group:
        setup.requests.open(group)
        setup.ask({"transaction": 1})
        setup.ask({"transaction": 1})
        setup.ask({}, vm="web2")
        setup.requests.stop()
        assert setup.codes == ["offline"] * 3
        setup.ask({})
    assert setup.codes == ["offline"] * 4
    assert not setup.handled
