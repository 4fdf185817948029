"""Sessions without faults, on asyncio's own loop and on uvloop."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from scripted_peer import GREETING, NEGOTIATED, PATIENCE_S, Line, answering, ignored, peer, session_with

from qmpballoon.errors import ConnectionLost, MonitorBusy, QmpError
from qmpballoon.qmp import client as client_module
from qmpballoon.qmp.asked import Asked, returned
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.monitor import open_monitor
from qmpballoon.qmp.repeated import Numbers
from qmpballoon.sim.qemu.server import SimulatedQemu

pytestmark = pytest.mark.usefixtures("any_command")

Run = Callable[[Coroutine[Any, Any, None]], None]


class Ignoring:
    """A sink for replies that do not matter."""

    def same(self, numbers: Numbers) -> None: ...

    def changed(self, result: object) -> None: ...

    def refused(self, error: QmpError) -> None: ...


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on a loop of each kind."""

    def run(scene: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(debug=True, loop_factory=request.param) as runner:
            runner.run(asyncio.wait_for(scene, PATIENCE_S))

    return run


def test_a_session_executes_requests_and_has_version_and_pid(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu, session_with(qemu.path) as session:
            assert session.version == "7.2.22"
            assert session.peer_pid is not None
            assert await session.request("query-balloon") == {"actual": qemu.guest.size}
            with pytest.raises(QmpError) as caught:
                await session.request("no-such-thing", {"a": 1})
            assert caught.value.command == "no-such-thing"
            assert caught.value.error_class == "CommandNotFound"
            assert "no-such-thing" in caught.value.description
            assert caught.value.code == "qmp-error"
            await session.request("query-status")

    run(scene())


def test_many_requests_at_once_each_get_their_own_reply(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        async with peer(sockets_dir / "a.qmp", answering), session_with(sockets_dir / "a.qmp") as session:
            names = [f"command-{number}" for number in range(300)]
            assert await asyncio.gather(*(session.request(name) for name in names)) == names

    run(scene())


def test_out_of_band_execution_is_not_requested(run: Run, sockets_dir: Path) -> None:
    asked: list[object] = []

    async def serve(line: Line) -> None:
        asked.append(await line.negotiate())
        await line.until_the_client_leaves()

    async def scene() -> None:
        async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp"):
            pass

    run(scene())
    assert asked == [{"execute": "qmp_capabilities", "id": 0}]


def test_events_around_the_negotiation_are_not_missed(run: Run, sockets_dir: Path) -> None:
    events: list[tuple[str, object]] = []
    all_came = asyncio.Event()

    def on_event(name: str, details: object) -> None:
        events.append((name, details))
        if len(events) == 3:
            all_came.set()

    async def serve(line: Line) -> None:
        await line.send(GREETING)
        await line.request()
        before = b'{"event": "STOP", "timestamp": {}}\r\n'
        after = b'{"event": "BALLOON_CHANGE", "data": {"actual": 1}}\r\n{"event": "RESUME"}\r\n'
        await line.send(before + NEGOTIATED + after)
        await line.until_the_client_leaves()

    async def scene() -> None:
        async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp", on_event):
            await all_came.wait()

    run(scene())
    assert events == [("STOP", {}), ("BALLOON_CHANGE", {"actual": 1}), ("RESUME", {})]


def test_the_three_symptoms_of_a_busy_monitor(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu, session_with(qemu.path) as holder:
            # The second waits in the backlog without a greeting, until its time-out.
            with pytest.raises(MonitorBusy, match="another client holds"):
                await Session.greeted(
                    open_monitor(qemu.path), ignored, greeting_timeout_s=0.02, request_timeout_s=1
                )
            # Its closed connection still fills the backlog; one more fits in ...
            waiting = asyncio.create_task(
                Session.greeted(
                    open_monitor(qemu.path), ignored, greeting_timeout_s=None, request_timeout_s=PATIENCE_S
                )
            )
            # ... and the next is refused at once.
            with pytest.raises(MonitorBusy, match="another client holds"):
                open_monitor(qemu.path)
            assert not waiting.done()
            await holder.close()
            second = await waiting
            try:
                assert await second.request("query-status")
            finally:
                await second.close()

    run(scene())


def test_a_cancelled_request_leaves_the_session_usable(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        asked, let_go = asyncio.Event(), asyncio.Event()

        async def serve(line: Line) -> None:
            await line.negotiate()
            late = await line.request()
            asked.set()
            await let_go.wait()
            await line.answer(late, "late")
            while True:
                request = await line.request()
                await line.answer(request, request["execute"])

        async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
            given_up = asyncio.create_task(session.request("slow"))
            await asked.wait()
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            let_go.set()
            assert await session.request("next") == "next"
            assert not session._waiting

    run(scene())


def test_requests_that_are_sent_together_each_get_their_own_reply(run: Run, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        requests = [await line.request() for _ in range(3)]  # it answers none before it has all
        for request in (requests[2], requests[0]):
            await line.answer(request, request["execute"])
        await line.send(
            b'{"error": {"class": "GenericError", "desc": "no such thing"}, "id": %d}\r\n' % requests[1]["id"]
        )
        await line.answer(await line.request(), "next")

    async def scene() -> None:
        async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
            first, refused, last = await session.request_all(
                Asked("query-status"), Asked("query-name"), Asked("query-uuid")
            )
            assert (first, last) == ("query-status", "query-uuid")
            with pytest.raises(QmpError, match=r"refused query-name: no such thing \(GenericError\)"):
                returned(refused)
            assert await session.request("query-migrate") == "next"

    run(scene())


def test_requests_that_are_sent_together_and_cancelled_leave_the_session_usable(
    run: Run, sockets_dir: Path
) -> None:
    async def scene() -> None:
        asked, let_go = asyncio.Event(), asyncio.Event()

        async def serve(line: Line) -> None:
            await line.negotiate()
            first, second = await line.request(), await line.request()
            await line.answer(first, "in time")
            asked.set()
            await let_go.wait()
            await line.answer(second, "late")
            await line.answer(await line.request(), "next")

        async with peer(sockets_dir / "a.qmp", serve), session_with(sockets_dir / "a.qmp") as session:
            given_up = asyncio.create_task(session.request_all(Asked("query-name"), Asked("query-uuid")))
            await asked.wait()
            given_up.cancel()
            with pytest.raises(asyncio.CancelledError):
                await given_up
            let_go.set()
            assert await session.request("query-status") == "next"
            assert not session._waiting

    run(scene())


def test_the_one_of_several_requests_that_is_not_answered_is_named(run: Run, sockets_dir: Path) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.answer(await line.request(), "in time")
        await line.until_the_client_leaves()

    async def scene() -> None:
        async with (
            peer(sockets_dir / "a.qmp", serve),
            session_with(sockets_dir / "a.qmp", request_timeout_s=0.1) as hung,
        ):
            with pytest.raises(ConnectionLost, match=r"did not answer query-uuid within 0\.1 s"):
                await hung.request_all(Asked("query-name"), Asked("query-uuid"), Asked("query-status"))
            assert hung.hung

    run(scene())


def test_a_request_that_is_not_answered_in_time_marks_the_session_as_hung(
    run: Run, sockets_dir: Path
) -> None:
    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.until_the_client_leaves()

    async def scene() -> None:
        hung_path, sound = sockets_dir / "a.qmp", sockets_dir / "b.qmp"
        async with (
            peer(hung_path, serve),
            peer(sound, answering),
            session_with(hung_path, request_timeout_s=0.5) as hung,
            session_with(sound) as other,
        ):
            waiting = asyncio.create_task(hung.request("also waits", timeout_s=PATIENCE_S))
            with pytest.raises(ConnectionLost, match=r"did not answer query-status within 0\.5 s"):
                await hung.request("query-status")
            with pytest.raises(ConnectionLost, match="did not answer query-status"):
                await waiting
            assert hung.hung
            with pytest.raises(ConnectionLost, match="did not answer query-status"):
                await hung.request("query-status")
            assert "did not answer" in str(await hung.ended())
            assert await other.request("query-status") == "query-status"
            assert not other.hung

    run(scene())


def test_twenty_thousand_events_leak_nothing(
    run: Run, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 20_000
    monkeypatch.setattr(client_module, "MOST_UNASKED_PER_S", count)
    seen: list[str] = []

    async def serve(line: Line) -> None:
        await line.negotiate()
        request = await line.request()
        for _ in range(count // 100):
            await line.send(b'{"event": "RTC_CHANGE", "data": {"offset": 1}}\r\n' * 100)
        await line.answer(request, "done")
        await line.until_the_client_leaves()

    async def scene() -> None:
        path = sockets_dir / "a.qmp"
        async with peer(path, serve), session_with(path, lambda name, _: seen.append(name)) as session:
            assert await session.request("wait") == "done"
            assert session.events.empty()
            assert not session.events.history
            assert not session._waiting

    run(scene())
    assert len(seen) == count


def test_closing_frees_everything_also_twice_and_after_a_loss(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        tasks_before = asyncio.all_tasks()
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:
            tasks_of_qemu = asyncio.all_tasks() - tasks_before
            monitor = open_monitor(qemu.path)
            session = await Session.greeted(monitor, ignored, greeting_timeout_s=1, request_timeout_s=1)
            qemu.drop_clients()
            assert "QEMU closed the monitor" in str(await session.ended())
            for _ in range(2):
                await session.close()
                assert monitor.connection.fileno() == -1
            assert asyncio.all_tasks() == tasks_before | tasks_of_qemu
            with pytest.raises(ConnectionLost, match="QEMU closed the monitor"):
                await session.request("query-status")

    run(scene())


async def test_a_connection_that_is_reset_while_it_is_closed_is_no_bug(sockets_dir: Path) -> None:
    async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:
        monitor = open_monitor(qemu.path)
        session = await Session.greeted(monitor, ignored, greeting_timeout_s=1, request_timeout_s=1)
        assert session._writer is not None
        reset = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
        session._writer.transport._force_close(reset)  # type: ignore[attr-defined]  # what a failed read does
        await session.close()
        assert "closed by us" in str(session.reason)


async def test_waiting_for_something_else_ends_with_the_session(sockets_dir: Path) -> None:
    async with SimulatedQemu(sockets_dir / "a.qmp") as qemu, session_with(qemu.path) as session:
        assert await session.while_running(asyncio.sleep(0, "done")) == "done"

        async def fails() -> None:
            raise QmpError("a", "b", "c")

        with pytest.raises(QmpError):
            await session.while_running(fails())
        left = asyncio.Event()

        async def waits() -> None:
            try:
                qemu.die()
                await asyncio.Event().wait()
            finally:
                left.set()

        with pytest.raises(ConnectionLost, match="QEMU closed the monitor"):
            await session.while_running(waits())
        assert left.is_set()


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999", "18446744073709551616", '[{"a": NaN}]'])
async def test_an_event_that_could_not_be_published_ends_the_session(value: str, sockets_dir: Path) -> None:
    """Neither JSON nor msgpack can encode the value, so publishing it would raise an error."""
    events: list[object] = []

    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.send(f'{{"event": "STOP", "data": {{"x": {value}}}}}\r\n'.encode())
        await line.until_the_client_leaves()

    async with (
        peer(sockets_dir / "a.qmp", serve),
        session_with(sockets_dir / "a.qmp", lambda *event: events.append(event)) as session,
    ):
        assert "this is no event" in str(await session.ended())
    assert events == []


async def test_an_exception_of_the_event_handler_is_raised(sockets_dir: Path) -> None:
    def on_event(_name: str, _details: object) -> None:
        raise LookupError("a bug")

    async def serve(line: Line) -> None:
        await line.negotiate()
        await line.send(b'{"event": "STOP"}\r\n')
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", serve):
        session = await Session.greeted(
            open_monitor(sockets_dir / "a.qmp"), on_event, greeting_timeout_s=1, request_timeout_s=1
        )
        assert "a bug in this program" in str(await session.ended())
        with pytest.raises(LookupError, match="a bug"):
            await session.close()


def test_what_is_sent_over_a_connection_that_has_just_broken_is_no_bug(run: Run, sockets_dir: Path) -> None:
    async def scene() -> None:
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu, session_with(qemu.path) as session:
            usual = session.repeated("query-balloon", None, Ignoring())
            over = asyncio.create_task(session.ended())
            asked = []
            qemu.drop_clients()
            while not over.done():  # in every turn of the loop until the session notices
                session.repeat(usual)
                asked.append(asyncio.create_task(session.request("query-status")))
                await asyncio.sleep(0)
            for outcome in await asyncio.gather(*asked, return_exceptions=True):
                assert isinstance(outcome, ConnectionLost), outcome

    run(scene())
