"""Requests: one answer each, no second effect, nobody waits for another."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from qmpballoon.errors import NoBalloon, RequestRefused
from qmpballoon.protocol.requests import (
    MOST_REMEMBERED,
    MOST_WAITING,
    REMEMBERED_S,
    Arrival,
    Request,
    Requests,
)


class Room:
    """A desk whose handler waits until ``may_go`` is set."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.answers: list[tuple[Any, str]] = []  # response objects, each with who asked
        self.done: list[Request] = []
        self.may_go = asyncio.Event()
        self.may_go.set()
        self.raises: Exception | None = None
        self.desk = Requests(
            self.handle,
            lambda vm: vm in ("web1", "web2"),
            lambda: self.now_s,
        )

    async def handle(self, request: Request) -> object:
        self.done.append(request)
        await self.may_go.wait()
        if self.raises is not None:
            raise self.raises
        return {"number": len(self.done)}

    def ask(
        self, payload: object, *, vm: str | None = "web1", verb: str = "get", asker: str = "me", **more: Any
    ) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()

        def reply(response: object) -> None:
            self.answers.append((response, asker))

        self.desk.receive(Arrival(more.pop("channel", f"{vm} {verb}"), vm, verb, content, reply, **more))

    async def asked(self, payload: object, **more: Any) -> Any:
        """Ask in a group of its own, return the value of the last answer."""
        async with asyncio.TaskGroup() as group:
            self.desk.open(group)
            self.ask(payload, **more)
        return self.answers[-1][0]

    @property
    def codes(self) -> list[str]:
        return [(response["error"] or {"code": "ok"})["code"] for response, _ in self.answers]


async def test_a_request_is_answered_to_its_sender() -> None:
    room = Room()
    value = await room.asked({"transaction": [1]}, asker="she")
    assert (value["status"], value["result"], value["transaction"]) == ("ok", {"number": 1}, [1])
    assert (value["vm"], value["verb"]) == ("web1", "get")
    assert room.answers == [(value, "she")]


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
async def test_a_bad_request_gets_its_word_and_has_no_effect(
    payload: object, more: dict[str, Any], code: str
) -> None:
    room = Room()
    value = await room.asked(payload, **more)
    assert value["error"]["code"] == code
    assert len(room.answers) == 1
    assert not room.done


async def test_a_bad_request_is_answered_with_its_transaction() -> None:
    room = Room()
    assert (await room.asked({"transaction": "t", "a": 1}))["transaction"] == "t"


async def test_an_empty_payload_is_ignored() -> None:
    room = Room()
    room.ask(b"", refused=RequestRefused("retained", "not so"))
    assert not room.answers


async def test_the_same_transaction_has_one_effect_and_the_same_answer() -> None:
    room = Room()
    first = await room.asked({"transaction": 1})
    room.now_s = REMEMBERED_S
    assert await room.asked({"transaction": 1}, asker="again") == first
    assert room.answers[-1][1] == "again"
    assert len(room.done) == 1


async def test_the_same_transaction_joins_the_request_that_still_runs() -> None:
    room = Room()
    room.may_go.clear()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        room.ask({"transaction": 1})
        room.ask({"transaction": 1}, asker="another")
        room.may_go.set()
    assert [asker for _, asker in room.answers] == ["me", "another"]
    assert len(room.done) == 1


async def test_another_channel_or_transaction_or_a_later_minute_is_another_request() -> None:
    room = Room()
    for more in ({"vm": "web1"}, {"vm": "web2"}, {"vm": None, "verb": "list"}):
        await room.asked({"transaction": 1}, **more)
    await room.asked({"transaction": 1}, channel="another")
    await room.asked({"transaction": 2})
    await room.asked({})
    await room.asked({})
    assert len(room.done) == 7
    room.now_s = REMEMBERED_S + 0.1
    await room.asked({"transaction": 1})
    assert len(room.done) == 8


async def test_what_is_remembered_is_bounded() -> None:
    room = Room()
    for number in range(MOST_REMEMBERED + 1):
        await room.asked({"transaction": number})
    await room.asked({"transaction": 1})
    assert len(room.done) == MOST_REMEMBERED + 1
    await room.asked({"transaction": 0})
    assert len(room.done) == MOST_REMEMBERED + 2


async def test_the_seventeenth_waiting_request_of_a_vm_is_busy_and_other_vms_are_not() -> None:
    room = Room()
    room.may_go.clear()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        for number in range(MOST_WAITING + 1):
            room.ask({"transaction": number})
        assert room.codes == ["busy"]
        room.ask({}, vm="web2")
        room.ask({}, vm=None, verb="list")
        assert room.codes == ["busy"]
        room.may_go.set()
    assert room.codes == ["busy"] + ["ok"] * (MOST_WAITING + 2)
    assert (await room.asked({"transaction": MOST_WAITING}))["status"] == "ok"


async def test_joining_a_running_request_is_bounded_too() -> None:
    room = Room()
    room.may_go.clear()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        for _ in range(MOST_WAITING + 1):
            room.ask({"transaction": 1})
        assert room.codes == ["busy"]
        room.may_go.set()
    assert len(room.done) == 1


async def test_a_slow_request_does_not_delay_others() -> None:
    room = Room()
    room.may_go.clear()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        room.ask({"transaction": "slow"})
        room.ask({"bad": 1})
        assert room.codes == ["malformed"]
        room.may_go.set()


async def test_a_request_that_expired_before_its_start_is_not_executed() -> None:
    room = Room()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        room.ask({}, expiry_s=5)
        room.now_s = 5.1
    assert room.codes == ["expired"]
    assert not room.done


async def test_a_package_error_is_answered_with_its_code() -> None:
    room = Room()
    room.raises = NoBalloon("no virtio balloon: add -device virtio-balloon-pci")
    value = await room.asked({})
    assert value["error"] == {
        "code": "no-balloon",
        "message": "no virtio balloon: add -device virtio-balloon-pci",
    }


async def test_another_exception_is_answered_internal_and_raised() -> None:
    room = Room()
    room.raises = ZeroDivisionError("oops")
    with pytest.raises(ExceptionGroup) as raised:
        await room.asked({})
    assert raised.group_contains(ZeroDivisionError)
    assert room.codes == ["internal"]


async def test_pending_requests_are_answered_when_the_agent_stops_and_none_starts_after() -> None:
    room = Room()
    room.may_go.clear()
    async with asyncio.TaskGroup() as group:
        room.desk.open(group)
        room.ask({"transaction": 1})
        room.ask({"transaction": 1})
        room.ask({}, vm="web2")
        room.desk.stop()
        assert room.codes == ["offline"] * 3
        room.ask({})
    assert room.codes == ["offline"] * 4
    assert not room.done
