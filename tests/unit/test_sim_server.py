"""The simulated QEMU: events, faults, timers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Babble, Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

PATIENCE_S = 10.0
NO_REPLY_S = 0.1
DEVICE = "/machine/peripheral/balloon0"


class Client:
    """A bare client."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def line(self, timeout_s: float = PATIENCE_S) -> bytes:
        async with asyncio.timeout(timeout_s):
            return await self.reader.readline()

    def send(self, command: str, **arguments: object) -> None:
        request = {"execute": command, "arguments": arguments, "id": command}
        self.writer.write(json.dumps(request).encode())

    async def ask(self, command: str, **arguments: object) -> dict[str, Any]:
        self.send(command, **arguments)
        reply = json.loads(await self.line())
        assert isinstance(reply, dict)
        return reply

    async def rest(self) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self.reader.read()


@asynccontextmanager
async def connected(path: Path, *, negotiated: bool = True) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_unix_connection(path, limit=2**25)
    client = Client(reader, writer)
    try:
        if negotiated:
            await client.line()
            await client.ask("qmp_capabilities")
        yield client
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


@pytest.fixture
async def qemu(sockets_dir: Path) -> AsyncIterator[SimulatedQemu]:
    async with SimulatedQemu(sockets_dir / "a.qmp") as running:
        yield running


async def test_a_move_sends_an_event_at_its_first_step_and_at_its_end(qemu: SimulatedQemu) -> None:
    async with connected(qemu.path) as client:
        assert await client.ask("balloon", value=128 * MIB) == {"return": {}, "id": "balloon"}
        first, last = [json.loads(await client.line()) for _ in range(2)]
        assert first["event"] == last["event"] == "BALLOON_CHANGE"
        assert 128 * MIB < first["data"]["actual"] < 256 * MIB
        assert last["data"]["actual"] == 128 * MIB
        assert await client.ask("query-balloon") == {"return": {"actual": 128 * MIB}, "id": "query-balloon"}


async def test_a_rearmed_interval_brings_fresh_figures_within_the_same_second(qemu: SimulatedQemu) -> None:
    async with connected(qemu.path) as client:
        seen = set()
        for anonymous in (10 * MIB, 20 * MIB, 30 * MIB):
            qemu.set_demand(anonymous)
            for value in (0, 5):
                interval = "guest-stats-polling-interval"
                await client.ask("qom-set", path=DEVICE, property=interval, value=value)
            expected = qemu.guest.available
            async with asyncio.timeout(PATIENCE_S):
                while True:
                    reply = await client.ask("qom-get", path=DEVICE, property="guest-stats")
                    if reply["return"]["stats"]["stat-available-memory"] == expected:
                        break
            seen.add(expected)
        assert len(seen) == 3


async def test_events_go_to_every_monitor_and_each_has_its_own_client(sockets_dir: Path) -> None:
    paths = sockets_dir / "a.qmp", sockets_dir / "b.qmp"
    async with SimulatedQemu(*paths), connected(paths[0]) as first, connected(paths[1]) as second:
        first.send("stop")
        assert json.loads(await first.line())["event"] == json.loads(await second.line())["event"] == "STOP"


async def test_faults_affect_the_first_monitor_only(sockets_dir: Path) -> None:
    paths = sockets_dir / "a.qmp", sockets_dir / "b.qmp"
    faults = Faults(silent_to=frozenset({"*"}))
    async with (
        SimulatedQemu(*paths, faults=faults),
        connected(paths[0]) as silent,
        connected(paths[1]) as control,
    ):
        silent.send("query-balloon")
        assert "return" in await control.ask("query-balloon")
        with pytest.raises(TimeoutError):
            await silent.line(NO_REPLY_S)


async def test_without_a_greeting_no_request_is_answered(sockets_dir: Path) -> None:
    paths = sockets_dir / "a.qmp", sockets_dir / "b.qmp"
    async with (
        SimulatedQemu(*paths, faults=Faults(silent_greeting=True)) as qemu,
        connected(paths[0], negotiated=False) as client,
        connected(paths[1]) as witness,
    ):
        client.send("qmp_capabilities")
        assert "return" in await witness.ask("query-balloon")  # the request before it was read, too
        qemu.drop_clients()
        assert await client.rest() == b""


async def test_it_stops_replying_after_a_number_of_replies(qemu: SimulatedQemu) -> None:
    qemu.faults.silent_after_replies = 2
    async with connected(qemu.path) as client:
        assert "return" in await client.ask("query-status")
        client.send("query-status")
        with pytest.raises(TimeoutError):
            await client.line(NO_REPLY_S)


async def test_a_refused_command_is_answered_with_an_error(qemu: SimulatedQemu) -> None:
    qemu.faults.refuse = frozenset({"balloon"})
    async with connected(qemu.path) as client:
        assert (await client.ask("balloon", value=1))["error"]["class"] == "GenericError"
        assert "return" in await client.ask("query-balloon")


@pytest.mark.parametrize("size", [0, 1, 50, 138, 139, 150, 161, 170])
async def test_it_closes_at_any_byte(qemu: SimulatedQemu, size: int) -> None:
    qemu.faults.cut_after_bytes = size
    async with connected(qemu.path, negotiated=False) as client:
        client.send("qmp_capabilities")
        client.send("query-status")
        assert len(await client.rest()) == size


async def test_it_closes_after_half_a_reply(qemu: SimulatedQemu) -> None:
    qemu.faults.half_reply_to = frozenset({"query-balloon"})
    async with connected(qemu.path) as client:
        client.send("query-balloon")
        assert await client.rest() == b'{"return": {"actual": 2684354'


@pytest.mark.parametrize(
    ("babble", "ids"),
    [
        (Babble.UNKNOWN_ID, ["never asked", "query-status"]),
        (Babble.ID_TWICE, ["query-status", "query-status"]),
        (Babble.NO_ID, [None]),
    ],
)
async def test_replies_with_unexpected_ids(
    qemu: SimulatedQemu, babble: Babble, ids: list[str | None]
) -> None:
    qemu.faults.babble = babble
    async with connected(qemu.path) as client:
        client.send("query-status")
        assert [json.loads(await client.line()).get("id") for _ in ids] == ids


async def test_bytes_that_are_not_json(qemu: SimulatedQemu) -> None:
    async with connected(qemu.path) as client:
        qemu.faults.babble = Babble.NOT_AN_OBJECT
        client.send("query-status")
        assert isinstance(json.loads(await client.line()), list)
        assert "return" in json.loads(await client.line())
        qemu.faults.babble = Babble.RANDOM_BYTES
        client.send("query-status")
        with pytest.raises(UnicodeDecodeError):
            json.loads(await client.line())
        assert "return" in json.loads(await client.line())


async def test_a_flood_of_events_and_a_large_reply(qemu: SimulatedQemu) -> None:
    qemu.faults.event_flood = 2000
    qemu.faults.reply_padding = 2 * MIB
    async with connected(qemu.path) as client:
        client.send("query-status")
        for _ in range(2000):
            assert json.loads(await client.line())["event"] == "BALLOON_CHANGE"
        reply = await client.line()
        assert len(reply) > 2 * MIB
        assert json.loads(reply)["return"]["status"] == "running"


async def test_slow_replies_keep_their_order(qemu: SimulatedQemu) -> None:
    async with connected(qemu.path) as client:
        qemu.faults.reply_delay_s = 0.02
        commands = ["query-status", "query-name", "query-uuid"]
        for command in commands:
            client.send(command)
        assert [json.loads(await client.line())["id"] for _ in commands] == commands


@pytest.mark.parametrize("unlink", [False, True])
async def test_an_ended_qemu_closes_its_connections(qemu: SimulatedQemu, unlink: bool) -> None:
    async with connected(qemu.path) as client:
        qemu.die(unlink=unlink)
        assert await client.rest() == b""
        assert qemu.path.exists() is not unlink
        with pytest.raises(FileNotFoundError if unlink else ConnectionRefusedError):
            await asyncio.open_unix_connection(qemu.path)


async def test_faults_are_set_over_a_second_monitor(sockets_dir: Path) -> None:
    paths = sockets_dir / "a.qmp", sockets_dir / "a.control"
    async with SimulatedQemu(*paths) as qemu, connected(paths[1]) as control:
        assert await control.ask(
            "x-simulate", demand=[40 * MIB, 5 * MIB], behaviour="stuck", faults=["refuse=stop"], plug=64 * MIB
        ) == {"return": {}, "id": "x-simulate"}
        assert (qemu.guest.anonymous, qemu.guest.caches, qemu.guest.size) == (40 * MIB, 5 * MIB, 320 * MIB)
        assert qemu.guest.behaviour is Behaviour.STUCK
        assert qemu.faults == Faults(refuse=frozenset({"stop"}))
        for wrong in ({"demand": 1}, {"behaviour": "odd"}, {"faults": ["odd"]}, {"odd": 1}):
            assert "error" in await control.ask("x-simulate", **wrong)


async def test_an_older_qemu_has_no_command_for_the_virtio_status(sockets_dir: Path) -> None:
    machine = MachineSpec(version=(7, 1, 0))
    async with SimulatedQemu(sockets_dir / "a.qmp", machine=machine) as qemu, connected(qemu.path) as client:
        reply = await client.ask("x-query-virtio-status", path=f"{DEVICE}/virtio-backend")
        assert reply["error"]["class"] == "CommandNotFound"


async def test_qemu_11_aborts_on_the_virtio_status_and_leaves_its_socket(sockets_dir: Path) -> None:
    machine = MachineSpec(version=(11, 1, 3))
    async with SimulatedQemu(sockets_dir / "a.qmp", machine=machine) as qemu, connected(qemu.path) as client:
        refused = await client.ask("x-query-virtio-status", path=DEVICE)
        assert refused["error"]["desc"] == f"Path {DEVICE} is not a realized VirtIODevice"
        client.send("x-query-virtio-status", path=f"{DEVICE}/virtio-backend")
        assert await client.rest() == b""
        assert qemu.exited.is_set()
        assert qemu.aborted
        assert qemu.path.is_socket()


@pytest.mark.parametrize("booted", [True, False])
async def test_the_virtio_status_shows_whether_the_driver_is_up(sockets_dir: Path, booted: bool) -> None:
    guest = GuestSpec(boot_s=1000.0, deflate_on_oom=True)
    async with AsyncExitStack() as stack:
        qemu = SimulatedQemu(sockets_dir / "a.qmp", guest=guest, booted=booted)
        client = await stack.enter_async_context(connected((await stack.enter_async_context(qemu)).path))
        status = await client.ask("x-query-virtio-status", path=f"{DEVICE}/virtio-backend")
        up = any("DRIVER_OK" in each for each in status["return"]["status"]["statuses"])
        taken = any("DEFLATE_ON_OOM" in each for each in status["return"]["guest-features"]["dev-features"])
        assert (up, taken) == (booted, booted)


async def test_a_migration_is_reported(qemu: SimulatedQemu) -> None:
    async with connected(qemu.path) as client:
        qemu.set_migration("active", run_state="postmigrate")
        assert (await client.ask("query-migrate"))["return"] == {"status": "active"}
        assert (await client.ask("query-status"))["return"]["status"] == "postmigrate"


async def test_idle_qemus_set_no_timers(sockets_dir: Path) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        for number in range(50):
            qemu = await stack.enter_async_context(SimulatedQemu(sockets_dir / f"{number}.qmp"))
            client = await stack.enter_async_context(connected(qemu.path))
            interval = "guest-stats-polling-interval"
            await client.ask("qom-set", path=DEVICE, property=interval, value=1)
        waiting = [timer for timer in loop._scheduled if not timer.cancelled()]  # type: ignore[attr-defined]
        assert not [timer for timer in waiting if "SimulatedQemu" in repr(timer)]


def test_it_runs_on_uvloop_too(sockets_dir: Path) -> None:
    async def exchange() -> list[object]:
        async with SimulatedQemu(sockets_dir / "a.qmp") as qemu, connected(qemu.path) as client:
            qemu.faults.half_reply_to = frozenset({"query-balloon"})
            client.send("balloon", value=128 * MIB)
            lines = [json.loads(await client.line()) for _ in range(3)]
            client.send("query-balloon")
            return [*(line.get("event") for line in lines), await client.rest()]

    moved = "BALLOON_CHANGE"
    assert uvloop.run(exchange()) == [None, moved, moved, b'{"return": {"actual": 1342177']


def test_faults_are_parsed_from_words() -> None:
    words = ["silent-greeting", "reply-delay-s=0.5", "refuse=balloon,stop", "babble=no-id", "event-flood=9"]
    assert Faults.parse(words) == Faults(
        silent_greeting=True,
        reply_delay_s=0.5,
        refuse=frozenset({"balloon", "stop"}),
        babble=Babble.NO_ID,
        event_flood=9,
    )


@pytest.mark.parametrize("word", ["odd", "silent-greeting=1", "refuse", "event-flood=x", "babble=odd", ""])
def test_an_unknown_fault_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"fault|take"):
        Faults.parse([word])
