"""The Python API on real guests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest
from agent_process import PATIENCE_S
from qemu.qmp import QMPClient

import qmpballoon
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def polling_interval_s(guest: LabGuest) -> object:
    arguments = {
        "path": await guest.monitor.balloon_path(),
        "property": "guest-stats-polling-interval",
    }
    return await guest.monitor.execute("qom-get", arguments)


async def test_a_balloon_is_set_and_read_in_three_lines(lab: Lab) -> None:
    guest = await lab.guest("web")
    async with qmpballoon.connect(guest.socket) as vm:
        await vm.ready(timeout_s=PATIENCE_S)
        assert await vm.set_target("112MiB", wait_s=PATIENCE_S) == 112 * MIB
        state = await vm.state(fresh_s=PATIENCE_S)
        assert abs(await guest.monitor.actual() - 112 * MIB) <= MIB
        assert (vm.name, vm.pid, vm.qemu) == ("web", guest.pid, await guest.monitor.version())
        assert (state.size, state.target, state.run_state) == (guest.memory, 112 * MIB, "running")
        assert state.guest is not None
        assert state.guest.available is not None
        assert abs(state.guest.available - (await guest.guest_memory()).available) < 4 * MIB
        assert state.guest.age_s < 1
        assert await polling_interval_s(guest) == 1
        with pytest.raises(qmpballoon.OutOfRange):
            await vm.set_target("129MiB")
        with pytest.raises(qmpballoon.InvalidSize):
            await vm.set_target("112M")
    assert await polling_interval_s(guest) == 0
    await guest.monitor.until_actual((112 * MIB).__eq__, timeout_s=PATIENCE_S, what="the last of 16 MiB")


async def test_the_polling_interval_is_left_as_it_was_found(lab: Lab) -> None:
    guest = await lab.guest("web")
    property_of = {
        "path": await guest.monitor.balloon_path(),
        "property": "guest-stats-polling-interval",
    }
    await guest.monitor.execute("qom-set", {**property_of, "value": 7})

    async def fail() -> None:
        async with qmpballoon.connect(guest.socket) as vm:
            await vm.ready(timeout_s=PATIENCE_S)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert await polling_interval_s(guest) == 7


async def test_a_guest_without_a_driver_is_not_ready_and_reaches_no_target(lab: Lab) -> None:
    bare, none = await asyncio.gather(
        lab.guest("bare", driver=False), lab.empty_qemu("none", balloon=None, paused=False)
    )
    async with qmpballoon.connect(bare.socket) as vm:
        with pytest.raises(qmpballoon.NotReady, match="driver is not up"):
            await vm.ready(timeout_s=0.3)
        with pytest.raises(qmpballoon.NotReached) as raised:
            await vm.set_target("64MiB", wait_s=0.3)
        assert (raised.value.target, raised.value.state.actual) == (64 * MIB, bare.memory)
        assert raised.value.state.guest is None
        await bare.command("driver load")
        state = await vm.wait_for(lambda state: state.actual == 64 * MIB, timeout_s=PATIENCE_S)
        assert state.balloon == 64 * MIB
        assert await bare.monitor.actual() == 64 * MIB
    async with qmpballoon.connect(none.socket) as vm:
        with pytest.raises(qmpballoon.NoBalloon):
            await vm.state()


async def test_events_come_until_the_connection_is_lost(lab: Lab) -> None:
    guest = await lab.guest("web")
    async with contextlib.AsyncExitStack() as stack:
        vm = await stack.enter_async_context(qmpballoon.connect(guest.socket))
        await guest.monitor.set_target(112 * MIB)  # another client's target; no one has read events yet
        await guest.monitor.execute("stop")
        await guest.monitor.execute("cont")
        async with asyncio.timeout(PATIENCE_S):
            seen = [event async for event in first_of(vm.events(), {"balloon-change", "stopped", "resumed"})]
        assert {"balloon-change", "stopped", "resumed"} <= {event.event for event in seen}
        [change, *_] = [event for event in seen if event.event == "balloon-change"]
        assert isinstance(change.data["actual"], int)
        assert change.ts.tzinfo is not None
        await guest.kill()
        with pytest.raises(qmpballoon.ConnectionLost):
            await all_of(vm.events())
        with pytest.raises(qmpballoon.ConnectionLost):
            await vm.state()
    with pytest.raises(qmpballoon.Unreachable, match="nobody listens"):
        async with qmpballoon.connect(guest.socket, timeout_s=0.2):
            pass


async def all_of(events: AsyncIterator[qmpballoon.Event]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        async for _ in events:
            pass


async def first_of(
    events: AsyncIterator[qmpballoon.Event], wanted: set[str]
) -> AsyncIterator[qmpballoon.Event]:
    """Yield events until there was one of each wanted word."""
    left = set(wanted)
    async for event in events:
        yield event
        left.discard(event.event)
        if not left:
            return


async def test_connect_waits_for_the_vm_and_names_the_client_that_holds_the_monitor(lab: Lab) -> None:
    path = lab.directory / "late.qmp"
    with pytest.raises(qmpballoon.Unreachable, match="no such socket"):
        async with qmpballoon.connect(path, timeout_s=0.1):
            pass

    async def connect() -> str:
        async with qmpballoon.connect(path, timeout_s=PATIENCE_S) as vm:
            return vm.name

    early = asyncio.create_task(connect(), name="connects before QEMU is there")
    guest = await lab.empty_qemu("late")
    assert await early == "late"

    holder = QMPClient("holder")
    await holder.connect(str(guest.socket))
    with pytest.raises(qmpballoon.MonitorBusy, match="another client"):
        await connect_briefly(guest)
    await holder.disconnect()
    guest.stop()
    with pytest.raises(qmpballoon.Unreachable, match="is stopped"):
        await connect_briefly(guest)
    guest.cont()
    assert await connect() == "late"


async def connect_briefly(guest: LabGuest) -> None:
    async with qmpballoon.connect(guest.socket, timeout_s=0.3):
        pass


async def test_a_cancelled_call_leaves_the_connection_usable(lab: Lab) -> None:
    guest = await lab.guest("bare", driver=False)
    async with qmpballoon.connect(guest.socket) as vm:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await vm.set_target("64MiB", wait_s=60)
        for _ in range(50):
            task = asyncio.create_task(vm.state(), name="cancelled at once")
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait({task})
        assert (await vm.state(fresh_s=0)).actual == guest.memory
    assert await polling_interval_s(guest) == 0
