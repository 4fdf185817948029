"""Replies that are not QMP, end in the middle or never end: a lost connection, and no other effect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from scripted_peer import GREETING, NEGOTIATED, PATIENCE_S, Line, answering, ignored, peer, session_with

from qmpballoon.errors import ConnectionLost
from qmpballoon.qmp.asked import MOST_ABANDONED
from qmpballoon.qmp.client import MOST_UNASKED_PER_S, Session
from qmpballoon.qmp.monitor import OpenMonitor, open_monitor

pytestmark = pytest.mark.usefixtures("any_command")


@pytest.fixture(autouse=True)
async def nothing_is_left(sockets_dir: Path) -> AsyncIterator[None]:
    """Check that no task outlives a test, and that the loop's exception handler is not called."""
    reported: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    before = asyncio.all_tasks()
    yield
    assert asyncio.all_tasks() - before <= {asyncio.current_task()}
    assert reported == []


async def greet(path: Path, *, timeout_s: float = PATIENCE_S) -> Session:
    return await Session.greeted(
        open_monitor(path), ignored, greeting_timeout_s=timeout_s, request_timeout_s=timeout_s
    )


def nested(depth: int) -> bytes:
    return b'{"id": 1, "return": ' + b'{"a":' * depth + b"1" + b"}" * depth + b"}\r\n"


BAD_REPLIES = {
    "64 MiB": (b'{"id": 1, "return": "' + b"x" * 64 * 1024**2 + b'"}\r\n', "a message of more than"),
    "64 MiB without an end": (b"x" * 64 * 1024**2, "a message of more than"),
    "garbage": (b"\x00\xff\xfe\x81garbage\r\n", "this is not QMP"),
    "half a JSON": (b'{"id": 1, "return": \r\n', "this is not QMP"),
    "half a JSON and the end": (b'{"id": 1, "ret', "in the middle of a message"),
    "no object": (b'["id", 1]\r\n', "this is not QMP"),
    "a bare number": (b"1\r\n", "this is not QMP"),
    "null": (b"null\r\n", "this is not QMP"),
    "an empty line": (b"\r\n", "this is not QMP"),
    "too many digits": (b'{"id": 1, "return": ' + b"9" * 5000 + b"}\r\n", "this is not QMP"),
    "deeply nested": (nested(100_000), "this is not QMP"),
    "nested too deeply": (nested(400), "this is not QMP"),
    "a wide and deep list": (
        b'{"id": 1, "return": ' + b"[[]," * 300 + b"1" + b"]" * 300 + b"}\r\n",
        "not QMP",
    ),
    "a wrong id": (b'{"return": {}, "id": 99}\r\n', "an unexpected reply"),
    "an id that is text": (b'{"return": {}, "id": "1"}\r\n', "an unexpected reply"),
    "an id that is true": (b'{"return": {}, "id": true}\r\n', "an unexpected reply"),
    "an id that is a list": (b'{"return": {}, "id": [1]}\r\n', "an unexpected reply"),
    "no id": (b'{"return": {}}\r\n', "an unexpected reply"),
    "an error without an id": (b'{"error": {"class": "a", "desc": "b"}}\r\n', "an unexpected reply"),
    "neither return nor error": (b'{"id": 1}\r\n', "neither return nor error"),
    "an error that is no object": (b'{"id": 1, "error": "no"}\r\n', "neither return nor error"),
    "an event without a name": (b'{"event": null}\r\n', "this is no event"),
    "an event whose data are a list": (b'{"event": "STOP", "data": []}\r\n', "this is no event"),
    "an event flood": (b'{"event": "STOP"}\r\n' * (MOST_UNASKED_PER_S + 1), "events in a second"),
}


@pytest.mark.parametrize(("reply", "reason"), BAD_REPLIES.values(), ids=BAD_REPLIES.keys())
async def test_a_bad_reply_ends_this_session_and_no_other(
    reply: bytes, reason: str, sockets_dir: Path
) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.request()
        await line.send(reply)
        if reply.endswith(b"\n"):
            await line.until_the_client_leaves()

    bad, good = sockets_dir / "a.qmp", sockets_dir / "b.qmp"
    async with (
        peer(bad, serve),
        peer(good, answering),
        session_with(bad) as session,
        session_with(good) as other,
    ):
        with pytest.raises(ConnectionLost, match=reason) as caught:
            await session.request("query-status")
        assert len(str(caught.value)) < 300
        assert not session.hung
        assert await other.request("query-status") == "query-status"


async def test_a_reply_given_twice_ends_the_session(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        request = await line.request()
        await line.answer(request, "once")
        await line.answer(request, "twice")
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        assert await session.request("query-status") == "once"
        assert "an unexpected reply" in str(await session.ended())


BAD_GREETINGS = {
    "nothing": b"",
    "an empty line": b"\r\n",
    "of a web server": b"HTTP/1.1 400 Bad Request\r\n",
    "a list": b"[]\r\n",
    "another object": b'{"hello": 1}\r\n',
    "QMP is text": b'{"QMP": "7.2"}\r\n',
    "no version": b'{"QMP": {"capabilities": []}}\r\n',
    "no capabilities": b'{"QMP": {"version": {}}}\r\n',
    "an event that is none": b'{"event": 7}\r\n',
    "half of it": GREETING[:40],
    "64 MiB": b"x" * 64 * 1024**2,
    "deeply nested": b"[" * 100_000 + b"\r\n",
}


@pytest.mark.parametrize("greeting", BAD_GREETINGS.values(), ids=BAD_GREETINGS.keys())
async def test_a_bad_greeting_is_a_loss(greeting: bytes, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.send(greeting)
        if greeting.endswith(b"\n"):
            await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve):
        with pytest.raises(ConnectionLost, match=r"a\.qmp: "):
            await greet(sockets_dir / "a.qmp")


async def test_an_event_before_the_greeting_is_ignored(sockets_dir: Path) -> None:
    """The protocol has the greeting first; an event before it does not end the connection."""

    async def serve(line: Line) -> None:
        await line.send(b'{"event": "STOP", "data": {}}\r\n' + GREETING + NEGOTIATED)
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve):
        session = await greet(sockets_dir / "a.qmp")
        assert session.version == "7.2.22"
        await session.close()


async def test_a_greeting_with_odd_versions_is_accepted(sockets_dir: Path) -> None:
    shown = {
        b'{"QMP": {"version": {"qemu": [7, 2]}, "capabilities": []}}\r\n': "?",
        b'{"QMP": {"version": {"qemu": {"major": "'
        + b"9" * 999
        + b'"}}, "capabilities": []}}\r\n': "99999999.?.?",
    }
    for number, (greeting, version) in enumerate(shown.items()):

        async def serve(line: Line, greeting: bytes = greeting) -> None:
            await line.send(greeting + NEGOTIATED)
            await line.until_the_client_leaves()

        path = sockets_dir / f"{number}.qmp"
        async with peer(path, serve), session_with(path) as session:
            assert session.version == version


@pytest.mark.parametrize(
    "answer",
    [b'{"error": {"class": "CommandNotFound", "desc": "no"}, "id": 0}\r\n', b'{"id": 0}\r\n', b"[]\r\n", b""],
)
async def test_a_refused_negotiation_is_a_loss(answer: bytes, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.send(GREETING)
        await line.request()
        await line.send(answer)

    async with peer(sockets_dir / "a.qmp", serve):
        with pytest.raises(ConnectionLost, match=r"a\.qmp: "):
            await greet(sockets_dir / "a.qmp")


async def test_a_negotiation_that_is_not_answered_is_a_loss(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.send(GREETING)
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve):
        with pytest.raises(ConnectionLost, match=r"did not answer within 0\.05 s"):
            await Session.greeted(
                open_monitor(sockets_dir / "a.qmp"), ignored, greeting_timeout_s=1, request_timeout_s=0.05
            )


async def test_an_event_flood_instead_of_the_negotiation_is_a_loss(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.send(GREETING)
        await line.request()
        while True:
            await line.send(b'{"event": "STOP"}\r\n' * 100)

    async with peer(sockets_dir / "a.qmp", serve):
        with pytest.raises(ConnectionLost, match="before the session runs"):
            await greet(sockets_dir / "a.qmp")


async def test_a_close_at_any_byte_is_a_loss(sockets_dir: Path) -> None:
    reply = b'{"return": {"status": "running"}, "id": 1}\r\n'
    parts = (GREETING, NEGOTIATED, reply)
    cut = 0

    async def serve(line: Line) -> None:
        left = cut
        for part in parts:
            await line.send(part[:left])
            if left < len(part):
                return
            left -= len(part)
            await line.request()
        raise AssertionError("the cut is after the last message")

    lost_after_greeting = 0
    async with peer(sockets_dir / "a.qmp", serve):
        for length in range(sum(len(part) for part in parts)):
            cut = length
            monitor = open_monitor(sockets_dir / "a.qmp")

            async def converse(monitor: OpenMonitor = monitor) -> None:
                nonlocal lost_after_greeting
                session = await Session.greeted(
                    monitor, ignored, greeting_timeout_s=PATIENCE_S, request_timeout_s=PATIENCE_S
                )
                lost_after_greeting += 1
                try:
                    await session.request("query-status")
                finally:
                    await session.close()

            with pytest.raises(ConnectionLost, match=r"a\.qmp: "):
                await converse()
            assert monitor.connection.fileno() == -1
    assert lost_after_greeting == len(reply)


async def test_abandoned_replies_are_bounded(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        waiting = [asyncio.create_task(session.request("never")) for _ in range(MOST_ABANDONED + 1)]
        await asyncio.sleep(0)  # all are under way
        assert len(session._waiting) == MOST_ABANDONED + 1
        for request in waiting:
            request.cancel()
        await asyncio.wait(waiting)
        assert all(request.cancelled() for request in waiting)
        assert "replies are missing" in str(await session.ended())


async def test_a_timeout_of_the_greeting_closes_the_connection(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve):
        monitor = open_monitor(sockets_dir / "a.qmp")
        waiting = asyncio.create_task(
            Session.greeted(monitor, ignored, greeting_timeout_s=None, request_timeout_s=1)
        )
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert monitor.connection.fileno() == -1


def spread(message: object) -> bytes:
    return json.dumps(message, indent=4).replace("\n", "\r\n").encode() + b"\r\n"


async def negotiate_spread(line: Line) -> None:
    """Greet and negotiate as a monitor with pretty=on does; its texts hold brackets and quotes."""
    greeting = json.loads(GREETING)
    greeting["QMP"]["version"]["package"] = 'a "quoted" [bracket { in text'
    await line.send(spread(greeting))
    request = await line.request()
    await line.send(spread({"return": {}, "id": request["id"]}))


async def test_a_monitor_with_pretty_on_spreads_each_message_over_many_lines(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await negotiate_spread(line)
        request = await line.request()
        await line.send(spread({"event": "STOP", "data": {}, "timestamp": {"seconds": 1, "microseconds": 2}}))
        await line.send(spread({"return": {"rows": [1, {"text": '}"]{'}]}, "id": request["id"]}))
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        assert await session.request("query-status") == {"rows": [1, {"text": '}"]{'}]}


LONG_LINE = b'"' + b"x" * 100 + b'",\r\n'
BAD_SPREAD = {
    "too long": (b"{\r\n" + LONG_LINE * 50_000, "a message of more than"),
    "too long without a line end": (b"{\r\n" + b"x" * 5 * 1024**2, "a message of more than"),
    "opened on the line of its first key": (b'{"a":\r\n' * 100, "this is not QMP"),
    "garbage inside": (b"{\r\n\x00\xff\r\n}\r\n", "this is not QMP"),
    "too deep": (b"{\r\n" + b'    "a": {\r\n' * 400 + b"    }\r\n" * 400 + b"}\r\n", "this is not QMP"),
    "no JSON though all is closed": (b'{\r\n    "id": 1,\r\n}\r\n', "this is not QMP"),
    "more behind the end": (b'{\r\n    "id": 1\r\n} {\r\n', "this is not QMP"),
}


@pytest.mark.parametrize(("reply", "reason"), BAD_SPREAD.values(), ids=BAD_SPREAD.keys())
async def test_a_bad_message_over_many_lines_is_a_loss(reply: bytes, reason: str, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await negotiate_spread(line)
        await line.request()
        await line.send(reply)
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost, match=reason):
            await session.request("query-status")


async def test_a_message_over_many_lines_that_ends_in_the_middle_is_a_loss(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await negotiate_spread(line)
        await line.request()
        await line.send(b'{\r\n    "id": 1,\r\n')

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost, match="in the middle of a message"):
            await session.request("query-status")
