"""The public Python API, on the simulated QEMU."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import PATIENCE_S, Line, peer

import qmpballoon
from qmpballoon.qmp import balloon
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import GIB, MIB


@asynccontextmanager
async def opened(path: Path, **how: Any) -> AsyncIterator[tuple[SimulatedQemu, qmpballoon.Vm]]:
    async with (
        SimulatedQemu(path, **how) as qemu,
        asyncio.timeout(PATIENCE_S),
        qmpballoon.connect(qemu.path) as vm,
    ):
        yield qemu, vm


async def test_the_example_of_the_package_works(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "web1.qmp") as (qemu, vm):
        await vm.ready(timeout_s=30)
        assert await vm.set_target("128MiB", wait_s=10) == 128 * MIB
        state = await vm.state()
        assert state.guest is not None
        assert state.guest.available == qemu.guest.available
        assert (vm.name, vm.qemu, vm.pid) == ("web1", "7.2.22", os.getpid())


async def test_the_name_is_that_of_qemu_if_it_has_one(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "web1.qmp", machine=MachineSpec(name="db 1")) as (_, vm):
        assert vm.name == "db 1"


async def test_a_state_has_the_fields_of_the_contract(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        state = await vm.state()
        assert (state.run_state, state.size, state.actual, state.target) == (
            "running",
            256 * MIB,
            256 * MIB,
            None,
        )
        assert state.balloon == 0
        assert state.guest is not None
        assert 0 <= state.guest.age_s < 3
        await vm.set_target(200 * MIB, wait_s=5)
        after = await vm.wait_for(lambda seen: seen.actual == 200 * MIB, timeout_s=5)
        assert after.target == 200 * MIB
        assert after.balloon == qemu.guest.balloon == 56 * MIB


async def test_held_is_computed_from_one_sample(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (_, vm):
        state = await vm.state()
        assert state.guest is not None
        assert state.guest.available is not None
        assert state.held == state.actual - state.guest.available
        await vm.set_target(160 * MIB, wait_s=5)
        after = await vm.wait_for(lambda seen: seen.actual == 160 * MIB, timeout_s=5)
        assert after.held is not None
        assert abs(after.held - state.held) <= 2 * MIB
    async with opened(sockets_dir / "b.qmp", guest=GuestSpec(statistics=False)) as (_, vm):
        assert (await vm.state(fresh_s=0.05)).held is None


@pytest.mark.parametrize(("moved", "known"), [(0, True), (1, True), (-2, True), (3, False), (-100, False)])
async def test_held_is_unknown_while_the_balloon_moves(
    moved: int, known: bool, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # An actual read after the move must not be combined with an available from before it.
    async with opened(sockets_dir / "a.qmp") as (_, vm):
        actuals = iter([200 * MIB, (200 + moved) * MIB])

        async def query_actual(_: object) -> int:
            return next(actuals)

        monkeypatch.setattr(balloon, "query_actual", query_actual)
        state = await vm.state()
        assert state.guest is not None
        assert state.guest.available is not None
        assert state.actual == (200 + moved) * MIB
        assert state.held == (max(0, state.actual - state.guest.available) if known else None)


async def test_without_statistics_guest_is_none(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(statistics=False)) as (_, vm):
        assert (await vm.state(fresh_s=0.05)).guest is None
        assert (await vm.state(fresh_s=0)).guest is None


async def test_a_guest_without_a_driver_is_not_waited_for(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(driver=False)) as (_, vm):
        async with asyncio.timeout(PATIENCE_S):
            assert (await vm.state(fresh_s=3600)).guest is None


async def test_two_concurrent_calls_of_state_each_return_one(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        first, second = await asyncio.gather(vm.state(), vm.state())
        assert first.guest is not None
        assert second.guest is not None
        assert qemu.guest.polling_interval_s == 1


# ── ready ────────────────────────────────────────────────────────────────────────────────────────


async def test_ready_waits_for_the_driver_to_come_up(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(boot_s=0.2), booted=False) as (_, vm):
        state = await vm.ready(timeout_s=PATIENCE_S)
        assert state.guest is not None


@pytest.mark.parametrize(
    ("how", "missing"),
    [
        ({"guest": GuestSpec(driver=False)}, "the guest's balloon driver is not up"),
        ({"guest": GuestSpec(statistics=False)}, "is up and sends no statistics"),
        ({"machine": MachineSpec(stopped=True)}, "the VM is prelaunch, not running"),
    ],
)
async def test_not_ready_names_what_is_missing(how: dict[str, Any], missing: str, sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", **how) as (_, vm):
        with pytest.raises(qmpballoon.NotReady, match=missing) as caught:
            await vm.ready(timeout_s=0.5)
        assert caught.value.code == "no-driver"
        assert isinstance(caught.value, TimeoutError)


# ── targets ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_target_is_rounded_up_as_qemu_does(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        assert await vm.set_target(128 * MIB + 1) == 128 * MIB + 4096 == qemu.guest.target
        assert await vm.set_target("50%") == 128 * MIB
        assert await vm.set_target("100%", wait_s=5) == 256 * MIB


@pytest.mark.parametrize(
    ("size", "error", "code"),
    [
        ("512M", qmpballoon.InvalidSize, "malformed"),
        ("many", qmpballoon.InvalidSize, "malformed"),
        (0, qmpballoon.OutOfRange, "out-of-range"),
        (-1, qmpballoon.OutOfRange, "out-of-range"),
        ("257MiB", qmpballoon.OutOfRange, "out-of-range"),
        ("101%", qmpballoon.OutOfRange, "out-of-range"),
        (2**60, qmpballoon.OutOfRange, "out-of-range"),
    ],
)
async def test_a_bad_size_is_refused_and_nothing_is_sent(
    size: int | str, error: type[qmpballoon.QmpBalloonError], code: str, sockets_dir: Path
) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        with pytest.raises(error) as caught:
            await vm.set_target(size)
        assert caught.value.code == code
        assert isinstance(caught.value, ValueError)
        assert qemu.guest.target == 256 * MIB
        assert (await vm.state(fresh_s=0)).target is None


async def test_not_reached_has_target_and_state(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(behaviour=Behaviour.STUCK)) as (qemu, vm):
        with pytest.raises(qmpballoon.NotReached, match=r"is at 256 MiB after 0\.02 s and") as caught:
            await vm.set_target("128MiB", wait_s=0.02)
        assert caught.value.target == 128 * MIB
        assert caught.value.state.actual == 256 * MIB
        assert caught.value.code == "not-reached"
        assert isinstance(caught.value, TimeoutError)
        assert qemu.guest.target == 128 * MIB  # the target stays


async def test_a_vm_without_a_balloon(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", machine=MachineSpec(device=None)) as (_, vm):
        for call in (vm.state(), vm.ready(timeout_s=1), vm.set_target("128MiB")):
            with pytest.raises(qmpballoon.NoBalloon) as caught:
                await call
            assert caught.value.code == "no-balloon"


async def test_an_error_of_qemu_has_its_class_and_description(sockets_dir: Path) -> None:
    faults = Faults(refuse=frozenset({"balloon"}))
    async with opened(sockets_dir / "a.qmp", faults=faults) as (qemu, vm):
        with pytest.raises(qmpballoon.QmpError) as caught:
            await vm.set_target("128MiB")
        assert caught.value.error_class == "GenericError"
        assert "refused on purpose" in caught.value.description
        qemu.faults = Faults()
        await vm.set_target("128MiB", wait_s=5)


async def test_a_wait_for_a_condition(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        asyncio.get_running_loop().call_later(0.02, qemu.set_demand, 100 * MIB)
        state = await vm.wait_for(
            lambda seen: seen.guest is not None and (seen.guest.available or 0) < 150 * MIB, timeout_s=5
        )
        assert state.guest is not None
        with pytest.raises(qmpballoon.NotReached, match="did not come true") as caught:
            await vm.wait_for(lambda _: False, timeout_s=0.02)
        assert caught.value.target is None
        assert caught.value.state.size == 256 * MIB


# ── events ───────────────────────────────────────────────────────────────────────────────────────


async def test_events_are_kept_from_connect_on_and_end_with_the_connection(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        await vm.set_target("128MiB", wait_s=5)
        words = []

        async def follow() -> None:
            async for event in vm.events():
                words.append(event.event)
                if event.event == "balloon-change":
                    qemu.terminate()

        with pytest.raises(qmpballoon.ConnectionLost, match="QEMU closed the monitor"):
            await follow()
        assert words[0] == "balloon-change"
        assert words[-1] == "shutdown"


async def test_a_slow_reader_gets_the_number_of_missed_events(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        qemu.faults = Faults(event_flood=1500)
        await vm._session.request("query-status")
        qemu.faults = Faults()
        events = vm.events()
        first = await anext(events)
        assert (first.event, first.data) == ("lagged", {"missed": 500})
        second = await anext(events)
        assert second.data == {"actual": 4096 * 501}
        await vm.state()


async def test_two_readers_each_get_every_event(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (_, vm):
        await vm.set_target("200MiB")
        first, second = await asyncio.gather(anext(vm.events()), anext(vm.events()))
        assert first == second
        assert first.event == "balloon-change"


# ── connecting and closing ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("found", [0, 5])
async def test_closing_restores_the_interval_and_leaves_the_balloon(found: int, sockets_dir: Path) -> None:
    async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:
        qemu.guest.set_polling_interval(found)
        async with qmpballoon.connect(qemu.path) as vm:
            states = []
            for _ in range(20):  # each starts while the previous one is running
                states.append(asyncio.create_task(vm.state()))
                await asyncio.sleep(0)
            await asyncio.gather(*states)
            assert qemu.guest.polling_interval_s == 1
            await vm.set_target("128MiB", wait_s=5)
        assert qemu.guest.polling_interval_s == found
        assert qemu.guest.target == 128 * MIB


async def test_a_dangerous_target_is_set_and_warned_of(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, vm):
        held = (await vm.state()).held
        assert held is not None
        await vm.set_target(held + 24 * MIB)  # what the command line accepts causes no warning
        with pytest.warns(qmpballoon.DangerousTarget, match="a: .* is less than the .* that the guest held"):
            await vm.set_target(held + 20 * MIB)
        assert 0 <= qemu.guest.target - (held + 20 * MIB) < 4096
        await vm.set_target("100%")
        with pytest.raises(qmpballoon.DangerousTarget):  # where warnings are errors, it is set, too
            await vm.set_target(held)
        assert 0 <= qemu.guest.target - held < 4096


async def test_a_connection_that_read_no_figures_sets_no_interval(
    sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[str] = []
    async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:
        execute = qemu.execute

        def recorded(command: str, arguments: Mapping[str, object]) -> object:
            executed.append(command)
            return execute(command, arguments)

        monkeypatch.setattr(qemu, "execute", recorded)
        async with qmpballoon.connect(qemu.path) as vm:
            await vm.set_target("128MiB", wait_s=5)
    assert "balloon" in executed
    assert "qom-set" not in executed


async def test_cancelling_a_call_leaves_the_connection_usable(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(behaviour=Behaviour.FROZEN_STATS)) as (qemu, vm):
        for call in (
            vm.state(fresh_s=60),
            vm.ready(timeout_s=60),
            vm.set_target("1GiB"),
            vm.wait_for(bool, timeout_s=60),
        ):
            task = asyncio.create_task(call)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait((task,))
        qemu.set_behaviour(Behaviour.IDEAL)
        assert (await vm.state()).guest is not None
        await vm.set_target("128MiB", wait_s=5)
    assert qemu.guest.polling_interval_s == 0


async def test_a_socket_that_comes_later_is_waited_for(sockets_dir: Path) -> None:
    async def hold() -> str:
        async with qmpballoon.connect(sockets_dir / "a.qmp", timeout_s=PATIENCE_S) as vm:
            return vm.name

    waiting = asyncio.create_task(hold())
    await asyncio.sleep(0)
    async with SimulatedQemu(sockets_dir / "a.qmp"):
        assert await waiting == "a"


async def test_no_socket_in_time_is_unreachable(sockets_dir: Path) -> None:
    with pytest.raises(qmpballoon.Unreachable, match="no such socket") as caught:
        async with qmpballoon.connect(sockets_dir / "a.qmp", timeout_s=0.01):
            pass
    assert caught.value.code == "offline"
    assert isinstance(caught.value, OSError)


async def test_a_monitor_that_another_client_holds_is_busy(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp") as (qemu, _):
        with pytest.raises(qmpballoon.MonitorBusy, match="another client holds") as caught:
            async with qmpballoon.connect(qemu.path, timeout_s=0.05):
                pass
        assert caught.value.code == "busy"


async def test_a_process_that_never_sends_a_greeting_is_unreachable(sockets_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as server:
        server.bind(os.fspath(sockets_dir / "a.qmp"))
        server.listen(1)
        with pytest.raises(qmpballoon.Unreachable, match="did not greet"):
            async with qmpballoon.connect(sockets_dir / "a.qmp", timeout_s=0.05):
                pass


async def test_a_server_that_is_not_qmp_is_a_lost_connection(sockets_dir: Path) -> None:
    async def send_mail_greeting(line: Line) -> None:
        await line.send(b"220 mail.example.org ESMTP\r\n")

    async with peer(sockets_dir / "a.qmp", send_mail_greeting):
        with pytest.raises(qmpballoon.ConnectionLost, match="this is not QMP") as caught:
            async with qmpballoon.connect(sockets_dir / "a.qmp"):
                pass
        assert caught.value.code == "offline"


@pytest.mark.parametrize(
    "fault", [{"refuse": frozenset({"query-name"})}, {"half_reply_to": frozenset({"*"})}]
)
async def test_a_connection_that_fails_at_once_leaks_nothing(
    fault: dict[str, Any], sockets_dir: Path
) -> None:
    async with SimulatedQemu(sockets_dir / "a.qmp", faults=Faults(**fault)) as qemu:
        before, tasks = set(os.listdir("/proc/self/fd")), asyncio.all_tasks()
        with pytest.raises((qmpballoon.QmpError, qmpballoon.ConnectionLost)):
            async with qmpballoon.connect(qemu.path):
                pass
        async with asyncio.timeout(PATIENCE_S):
            while qemu._connections:
                await asyncio.sleep(0)
        assert set(os.listdir("/proc/self/fd")) == before
        assert len(asyncio.all_tasks()) == len(tasks)


async def test_a_killed_qemu_is_connection_lost_and_closing_raises_nothing(sockets_dir: Path) -> None:
    async with opened(sockets_dir / "a.qmp", guest=GuestSpec(behaviour=Behaviour.STUCK)) as (qemu, vm):
        waiting = asyncio.create_task(vm.set_target("128MiB", wait_s=60))
        async with asyncio.timeout(PATIENCE_S):
            while qemu.guest.target != 128 * MIB:
                await asyncio.sleep(0)
        qemu.die()
        with pytest.raises(qmpballoon.ConnectionLost):
            await waiting
        with pytest.raises(qmpballoon.ConnectionLost):
            await vm.state()


async def test_an_error_of_the_user_is_raised_unchanged(sockets_dir: Path) -> None:
    async with SimulatedQemu(sockets_dir / "a.qmp") as qemu:

        async def fail() -> None:
            async with qmpballoon.connect(qemu.path) as vm:
                await vm.state()
                raise LookupError("mine")

        with pytest.raises(LookupError, match="mine"):
            await fail()
        assert qemu.guest.polling_interval_s == 0


def test_sizes_are_parsed_by_parse_size() -> None:
    assert qmpballoon.parse_size("1.5GiB") == GIB * 3 // 2
    assert qmpballoon.parse_size("50%", whole=10) == 5


@pytest.mark.parametrize("kind", ["a file", "a directory"])
async def test_what_is_no_socket_is_said_to_be_none(sockets_dir: Path, kind: str) -> None:
    (sockets_dir / "web.pid").touch()
    path = sockets_dir / "web.pid" if kind == "a file" else sockets_dir
    with pytest.raises(qmpballoon.Unreachable, match="this is no socket"):
        async with qmpballoon.connect(path, timeout_s=0):
            pass


async def test_another_machine_is_permitted_by_an_argument() -> None:
    with pytest.raises(qmpballoon.Unreachable, match="allow_remote=True permits it"):
        async with qmpballoon.connect("tcp:192.0.2.1:4444", timeout_s=0):
            pass
