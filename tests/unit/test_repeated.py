"""Repeated requests: which replies are the same as before, and what their sinks get."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import PATIENCE_S, Line, peer, session_with

from qmpballoon.errors import QmpError
from qmpballoon.qmp.commands import NeverSent
from qmpballoon.qmp.repeated import Outstanding, Repeated

STATS = {"path": "/machine/peripheral/balloon0", "property": "guest-stats"}


class Recorded:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self._came = asyncio.Event()

    def same(self, number: int | None) -> None:
        self._note("same", number)

    def changed(self, result: object) -> None:
        self._note("changed", result)

    def refused(self, error: QmpError) -> None:
        self._note("refused", error.error_class)

    def _note(self, word: str, value: object) -> None:
        self.calls.append((word, value))
        self._came.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls) < count:
                self._came.clear()
                await self._came.wait()


def line(reply: dict[str, Any]) -> bytes:
    return json.dumps({**reply, "id": "k"}).encode() + b"\r\n"


def stats(update: object, available: int) -> dict[str, Any]:
    return {"stats": {"stat-available-memory": available}, "last-update": update}


def took(replies: list[dict[str, Any]], *, volatile: str = "last-update") -> list[tuple[str, object]]:
    """Return what the sink gets for these replies, each to a request of its own."""
    sink, outstanding = Recorded(), Outstanding()
    request = Repeated("k", "qom-get", STATS, sink, volatile=volatile)
    for reply in replies:
        outstanding.add((request,), 0.0)
        raw = line(reply)
        if not outstanding.takes_same(raw):
            assert outstanding.takes(raw, json.loads(raw))
    assert outstanding.command is None
    return sink.calls


def test_the_volatile_number_alone_is_told_and_other_changes_are_decoded() -> None:
    replies = [stats(7, 5), stats(7, 5), stats(12, 5), stats(12, 6), stats(123456, 6)]
    assert took([{"return": reply} for reply in replies]) == [
        ("changed", replies[0]),
        ("same", 7),
        ("same", 12),
        ("changed", replies[3]),
        ("same", 123456),
    ]


@pytest.mark.parametrize("update", [-1, 1.5, "7", None, 10**17, [7]])
def test_what_is_no_usual_number_there_is_decoded(update: object) -> None:
    calls = took([{"return": stats(7, 5)}, {"return": stats(update, 5)}])
    assert calls[1] == ("changed", stats(update, 5))


def test_a_key_that_comes_twice_makes_the_whole_reply_count() -> None:
    twice = {**stats(7, 5), "more": {"last-update": 8}}
    other = {**stats(7, 5), "more": {"last-update": 9}}
    assert took([{"return": twice}, {"return": twice}, {"return": other}]) == [
        ("changed", twice),
        ("same", None),
        ("changed", other),
    ]


def test_a_reply_without_a_volatile_number_is_compared_as_a_whole() -> None:
    assert took([{"return": {"actual": 5}}] * 2 + [{"return": {"actual": 6}}], volatile="") == [
        ("changed", {"actual": 5}),
        ("same", None),
        ("changed", {"actual": 6}),
    ]


def test_a_refusal_is_told_once_and_what_follows_is_a_change() -> None:
    refusal = {"error": {"class": "DeviceNotFound", "desc": "gone"}}
    assert took([refusal, refusal, {"return": stats(7, 5)}, refusal]) == [
        ("refused", "DeviceNotFound"),
        ("same", None),
        ("changed", stats(7, 5)),
        ("refused", "DeviceNotFound"),
    ]


def test_a_reply_with_neither_return_nor_error_is_none() -> None:
    with pytest.raises(TypeError, match="neither return nor error"):
        took([{"odd": 1}])


# ── over a session ───────────────────────────────────────────────────────────────────────────────


async def test_replies_events_and_requests_of_a_session_do_not_get_mixed_up(sockets_dir: Path) -> None:
    events: list[str] = []

    async def talk(peer_line: Line) -> None:
        await peer_line.negotiate()
        for turn in range(3):
            asked = [await peer_line.request() for _ in range(3)]
            await peer_line.send(b'{"event": "STOP"}\r\n')
            await peer_line.answer(asked[0], stats(turn, 5))
            await peer_line.answer(asked[1], {"name": f"vm{turn}"})
            await peer_line.answer(asked[2], {"actual": 5})
        await peer_line.until_the_client_leaves()

    async with (
        peer(sockets_dir / "a.qmp", talk),
        session_with(sockets_dir / "a.qmp", lambda name, _: events.append(name)) as session,
    ):
        figures, actual = Recorded(), Recorded()
        requests = [
            session.repeated("qom-get", STATS, figures, volatile="last-update"),
            session.repeated("query-balloon", None, actual),
        ]
        for turn in range(3):
            session.repeat(requests[0])
            name = asyncio.create_task(session.vm_name())
            await asyncio.sleep(0)
            session.repeat(requests[1])
            assert session.awaits_replies
            assert await name == f"vm{turn}"
            await actual.until(turn + 1)
            assert not session.awaits_replies
        assert figures.calls == [("changed", stats(0, 5)), ("same", 1), ("same", 2)]
        assert actual.calls == [("changed", {"actual": 5}), ("same", None), ("same", None)]
    assert events == ["STOP"] * 3


async def test_a_reply_that_is_overdue_ends_the_session_as_hung(sockets_dir: Path) -> None:
    async def talk(peer_line: Line) -> None:
        await peer_line.negotiate()
        await peer_line.until_the_client_leaves()

    async with (
        peer(sockets_dir / "a.qmp", talk),
        session_with(sockets_dir / "a.qmp", request_timeout_s=0.05) as session,
    ):
        session.repeat(session.repeated("query-balloon", None, Recorded()))
        assert 0 < session.check_repeated() <= 0.05
        async with asyncio.timeout(PATIENCE_S):
            while not session.hung:
                await asyncio.sleep(max(0.001, session.check_repeated()))
        assert "did not answer query-balloon within 0.05 s" in str(await session.ended())
        assert not session.awaits_replies
        session.repeat(session.repeated("query-balloon", None, Recorded()))  # nothing is sent any more
        assert not session.awaits_replies


async def test_an_unexpected_reply_ends_the_session(sockets_dir: Path) -> None:
    async def talk(peer_line: Line) -> None:
        await peer_line.negotiate()
        asked = await peer_line.request()
        await peer_line.answer({**asked, "id": "another"}, {"actual": 5})
        await peer_line.until_the_client_leaves()

    async with (
        peer(sockets_dir / "a.qmp", talk),
        session_with(sockets_dir / "a.qmp") as session,
    ):
        sink = Recorded()
        session.repeat(session.repeated("query-balloon", None, sink))
        async with asyncio.timeout(PATIENCE_S):
            assert "an unexpected reply" in str(await session.ended())
        assert not sink.calls


async def test_what_the_table_does_not_name_is_not_repeated(sockets_dir: Path) -> None:
    async def talk(peer_line: Line) -> None:
        await peer_line.negotiate()
        await peer_line.until_the_client_leaves()

    async with (
        peer(sockets_dir / "a.qmp", talk),
        session_with(sockets_dir / "a.qmp") as session,
    ):
        with pytest.raises(NeverSent):
            session.repeated("quit", None, Recorded())
