"""Repeated requests: which replies are the same as before, and what their sinks get."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted_peer import PATIENCE_S, Line, peer, session_with

from qmpballoon.errors import QmpError
from qmpballoon.qmp.asked import body_of
from qmpballoon.qmp.commands import NeverSent
from qmpballoon.qmp.repeated import Numbers, Outstanding, Repeated

STATS = {"path": "/machine/peripheral/balloon0", "property": "guest-stats"}


class Recorded:
    """A sink that records its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, object]] = []
        self._came = asyncio.Event()

    def same(self, numbers: Numbers) -> None:
        self._note("same", numbers)

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


def took(
    replies: list[dict[str, Any]], *, volatile: Sequence[str] = ("last-update",)
) -> list[tuple[str, object]]:
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
        ("same", (7,)),
        ("same", (12,)),
        ("changed", replies[3]),
        ("same", (123456,)),
    ]


@pytest.mark.parametrize("update", [-1, 1.5, "7", None, 10**15, [7]])
def test_what_is_no_usual_number_there_is_decoded(update: object) -> None:
    calls = took([{"return": stats(7, 5)}, {"return": stats(update, 5)}])
    assert calls[1] == ("changed", stats(update, 5))


def test_a_key_that_comes_twice_makes_the_whole_reply_count() -> None:
    twice = {**stats(7, 5), "more": {"last-update": 8}}
    other = {**stats(7, 5), "more": {"last-update": 9}}
    assert took([{"return": twice}, {"return": twice}, {"return": other}]) == [
        ("changed", twice),
        ("same", (None,)),
        ("changed", other),
    ]


@pytest.mark.parametrize("order", [("last-update", "faults"), ("faults", "last-update")])
def test_two_volatile_numbers_are_told_in_the_order_of_their_keys(order: tuple[str, str]) -> None:
    def counted(update: object, faults: object, available: int = 5) -> dict[str, Any]:
        figures = {"last-update": update, "faults": faults}
        return {order[0]: figures[order[0]], "available": available, order[1]: figures[order[1]]}

    replies = [counted(7, 40), counted(8, 40), counted(8, 1000), counted(9, -1), counted(9, 3, available=6)]
    calls = took([{"return": reply} for reply in replies], volatile=("last-update", "faults"))
    assert calls == [
        ("changed", replies[0]),
        ("same", (8, 40)),
        ("same", (8, 1000)),
        ("changed", replies[3]),
        ("changed", replies[4]),
    ]


def test_a_volatile_number_that_the_reply_lacks_is_none() -> None:
    replies = [{"return": stats(7, 5)}, {"return": stats(8, 5)}]
    assert took(replies, volatile=("faults", "last-update"))[1] == ("same", (None, 8))


FIGURES: st.SearchStrategy[object] = (
    st.integers(-1, 12) | st.integers(10**14, 10**16) | st.sampled_from([None, 1.5, "7", [], 2**64 - 1])
)
REPLIES = st.fixed_dictionaries(
    {"faults": FIGURES, "available": st.integers(5, 6)},
    optional={"last-update": FIGURES, "more": st.just({"faults": 3})},
)


@given(st.lists(REPLIES, min_size=1))
def test_what_a_sink_is_told_is_what_decoding_every_reply_tells(replies: list[dict[str, Any]]) -> None:
    calls = took([{"return": reply} for reply in replies], volatile=("last-update", "faults"))
    known: dict[str, Any] = {}
    for reply, (word, value) in zip(replies, calls, strict=True):
        if word == "changed":
            assert isinstance(value, dict)
            known = dict(value)
        else:
            assert isinstance(value, tuple)
            told = zip(("last-update", "faults"), value, strict=True)
            known |= {key: number for key, number in told if number is not None}
        assert known == reply


def test_a_reply_without_a_volatile_number_is_compared_as_a_whole() -> None:
    assert took([{"return": {"actual": 5}}] * 2 + [{"return": {"actual": 6}}], volatile=()) == [
        ("changed", {"actual": 5}),
        ("same", ()),
        ("changed", {"actual": 6}),
    ]


def test_a_refusal_is_told_once_and_what_follows_is_a_change() -> None:
    refusal = {"error": {"class": "DeviceNotFound", "desc": "gone"}}
    assert took([refusal, refusal, {"return": stats(7, 5)}, refusal]) == [
        ("refused", "DeviceNotFound"),
        ("same", (None,)),
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
            session.repeated("qom-get", STATS, figures, volatile=("last-update",)),
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
        assert figures.calls == [("changed", stats(0, 5)), ("same", (1,)), ("same", (2,))]
        assert actual.calls == [("changed", {"actual": 5}), ("same", ()), ("same", ())]
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


@given(st.lists(st.dictionaries(st.text(), st.integers() | st.text() | st.booleans()), max_size=4))
def test_a_request_says_what_it_was_given_whatever_was_said_before(
    arguments: list[dict[str, object]],
) -> None:
    alike: list[dict[str, object]] = [{"value": 1}, {"value": True}, {"value": "1"}, {}]
    for given_now in arguments + alike:
        said = json.loads(f"{{{body_of('qom-set', given_now)}}}")
        assert said == {"execute": "qom-set", "arguments": given_now}
        assert str(said["arguments"]) == str(given_now)  # 1 is not True
    assert body_of("query-name", None) == '"execute": "query-name"'
