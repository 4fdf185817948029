"""What a QEMU may send: over its share it waits, and then its session ends."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from scripted_peer import Line, answering, ignored, peer, session_with

from qmpballoon.errors import ConnectionLost
from qmpballoon.qmp import client as client_module
from qmpballoon.qmp import intake as intake_module
from qmpballoon.qmp.intake import (
    BYTES_PER_S,
    MOST_BYTES,
    MOST_TIME_S,
    PATIENCE_S,
    PER_READ,
    TIME_PER_S,
    Intake,
    Share,
)
from qmpballoon.qmp.wire import LONGEST_EVENT, LONGEST_GREETING, LONGEST_MESSAGE, Splitter


class Clock:
    """Monotonic seconds that the test sets."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def use(share: Share, *, size: int = 0, spent_s: float = 0.0) -> float:
    share.size += size
    share.spent_s += spent_s
    return share.deduct()


def test_a_burst_is_within_the_share_and_more_has_to_wait() -> None:
    share = Share(Clock())
    assert use(share, size=MOST_BYTES, spent_s=MOST_TIME_S) == 0
    assert share.over_for_s == 0
    assert use(share, size=BYTES_PER_S) == pytest.approx(1)
    assert use(share, spent_s=TIME_PER_S * 3) == pytest.approx(3)


def test_a_share_that_is_refilled_is_within_again() -> None:
    clock = Clock()
    share = Share(clock)
    assert use(share, size=MOST_BYTES + BYTES_PER_S) == pytest.approx(1)
    clock.now_s = 1.5
    assert use(share) == 0
    assert share.over_for_s == 1.5  # not forgiven before half of it is there
    clock.now_s = 1 + MOST_BYTES
    use(share)
    assert share.over_for_s == 0


def test_what_is_asked_for_does_not_count() -> None:
    share = Share(Clock())
    for _ in range(10_000):
        share.asked()
        assert use(share, size=4096, spent_s=0.0001) == 0
    assert share.over_for_s == 0


def test_a_sample_five_times_a_second_is_far_within_the_share() -> None:
    clock = Clock()
    share = Share(clock)
    for _ in range(1000):
        clock.now_s += 0.2
        assert use(share, size=6 * (2048 + PER_READ), spent_s=0.002) == 0


def test_messages_over_the_share_are_held_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake_module, "_TIME_AT_A_TIME_S", 0.0)
    clock = Clock()
    taken: list[bytes] = []
    intake = Intake("a.qmp", taken.append)
    intake.greeted(taken.append)
    intake.share = Share(clock)
    intake.share.spent_s = MOST_TIME_S + TIME_PER_S
    sent = [b"%d\n" % number for number in range(100)]
    assert intake.received(b"".join(sent)) == pytest.approx(1)
    assert not taken
    clock.now_s = 1.1
    assert intake.take_held() == 0
    assert taken == sent


def test_a_session_that_stays_over_its_share_ends() -> None:
    clock = Clock()
    intake = Intake("a.qmp", lambda _: None)
    intake.greeted(lambda _: None)
    intake.share = Share(clock)
    pauses = []

    def flood() -> None:
        while True:
            pauses.append(intake.received(b"x" * 2**18 + b"\n"))
            clock.now_s += pauses[-1]

    with pytest.raises(ConnectionLost, match=r"a\.qmp: this QEMU sends more than its share"):
        flood()
    assert intake.exceeded
    assert PATIENCE_S <= clock.now_s < 2 * PATIENCE_S
    assert sum(pauses) == pytest.approx(clock.now_s)


def test_the_size_of_a_message_over_many_lines_is_counted_without_summing_it_up() -> None:
    splitter = Splitter()
    splitter.feed(b"{\n" + b"\n" * 100_000)
    assert splitter.rest == 100_002
    assert splitter.feed(b"}\n") == [b"{\n" + b"\n" * 100_000 + b"}\n"]
    assert splitter.rest == 0


# ── sessions ─────────────────────────────────────────────────────────────────────────────────────


def event(size: int) -> bytes:
    return json.dumps({"event": "STOP", "data": {"ones": [1] * (size // 3)}}).encode() + b"\n"


async def test_large_events_end_the_session_and_no_other(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake_module, "PATIENCE_S", 0.2)
    monkeypatch.setattr(intake_module, "MOST_TIME_S", 0.02)
    monkeypatch.setattr(client_module, "MOST_UNASKED_PER_S", 10**9)

    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.answer(await line.request(), {})
        while True:
            await line.send(event(LONGEST_EVENT - 100))

    seen = []
    async with (
        peer(sockets_dir / "a.qmp", serve),
        peer(sockets_dir / "b.qmp", answering),
        session_with(sockets_dir / "a.qmp", lambda name, _: seen.append(name)) as session,
        session_with(sockets_dir / "b.qmp") as other,
    ):
        await session.request("query-status")
        ended = asyncio.create_task(session.ended())
        while not ended.done():
            assert await other.request("query-status") == "query-status"
        assert "more than its share" in str(ended.result())
        assert session.exceeded
        assert not session.hung
        assert seen
        assert not other.exceeded


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (event(2 * LONGEST_EVENT), "a message of more than"),
        (b'{"event": "STOP", "data": {}}' + b" " * LONGEST_MESSAGE, "a message of more than"),
        (b"{\n" + b"\n" * 2 * LONGEST_MESSAGE, "a message of more than"),
    ],
    ids=["a large event", "without an end", "many empty lines"],
)
async def test_what_is_too_large_ends_the_session(sent: bytes, reason: str, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.answer(await line.request(), {})
        await line.send(sent)
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        await session.request("query-status")
        assert reason in str(await session.ended())
        assert session.exceeded


@pytest.mark.usefixtures("any_command")
async def test_a_large_event_while_a_reply_is_to_come_ends_the_session(sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.request()
        await line.send(event(2 * LONGEST_EVENT))
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost, match="an event of more than"):
            await session.request("query-status")


@pytest.mark.parametrize("sent", [b"x" * LONGEST_GREETING * 2, b'{"event": "STOP"}\n' * LONGEST_GREETING])
async def test_before_the_greeting_some_kilobytes_are_kept_and_nothing_more_is_read(
    sent: bytes, sockets_dir: Path
) -> None:
    async def serve(line: Line) -> None:
        while True:
            await line.send(sent)

    async with peer(sockets_dir / "a.qmp", serve):
        with pytest.raises(ConnectionLost, match="more than 8192 bytes"):
            async with session_with(sockets_dir / "a.qmp", ignored):
                pass
