"""Behaviour that the agent relies on, of a real QEMU and of the simulated one."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from signal import SIGABRT, SIGKILL, SIGTERM
from typing import Any

import pytest
from both_qemus import PATIENCE_S, SIZE, Qemu, Start, Wire
from exchanges import BACKEND, DEVICE, INTERVAL
from qemu.qmp import ConnectError, ExecuteError, QMPClient

from qmpballoon.qmp.commands import DRIVER_STATUS
from qmpballoon.sim.qemu.dialect import Dialect, VirtioStatus
from qmpballoon.units import MIB

NO_REPLY_S = 0.1  # a monitor that another client holds sends nothing; a free one answers within a millisecond

StartQemu = Callable[[Start], Awaitable[Qemu]]


def refused(description: str, error_class: str = "GenericError") -> dict[str, Any]:
    return {"error": {"class": error_class, "desc": description}}


async def actual(wire: Wire) -> int:
    reply = await wire.execute("query-balloon")
    value = reply["return"]["actual"]
    assert isinstance(value, int)
    return value


async def event_of(wire: Wire, dialect: Dialect, command: str) -> dict[str, Any]:
    """Send a command that causes one event and return that: in front of the reply, or after it on 5.2."""
    reply, events = await wire.execute_with_events(command)
    assert reply == {"return": {}}
    assert len(events) == (0 if command in dialect.events_after_reply else 1)
    return events[0] if events else await wire.message()


async def test_qemu_qmp_connects_to_it(qemu: Qemu) -> None:
    client = QMPClient("contract")
    await client.connect(str(qemu.path))
    try:
        assert (await client.execute("query-status"))["running"] is True  # type: ignore[index]
        assert await client.execute("query-balloon") == {"actual": SIZE}
        with pytest.raises(ExecuteError, match="expects a size") as caught:
            await client.execute("balloon", {"value": 0})
        assert caught.value.error_class == "GenericError"
        with pytest.raises(ExecuteError) as caught:
            await client.execute("no-such-command")
        assert caught.value.error_class == "CommandNotFound"
        with client.listener(("STOP", "RESUME")) as listener:
            await client.execute("stop")
            await client.execute("cont")
            async with asyncio.timeout(PATIENCE_S):
                assert [(await listener.get())["event"] for _ in range(2)] == ["STOP", "RESUME"]
    finally:
        await client.disconnect()


async def test_a_command_before_negotiation_is_refused(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        greeting = await wire.message()
        assert set(greeting["QMP"]) == {"version", "capabilities"}
        reply = await wire.execute("query-status")
        assert reply == refused(
            "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
        )


async def test_every_client_negotiates_for_itself(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
    async with Wire.connected(qemu.path) as wire:
        await wire.message()
        assert "error" in await wire.execute("query-status")


async def test_a_second_client_is_greeted_when_the_first_leaves(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as first, Wire.connected(qemu.path) as second:
        await first.negotiate()
        with pytest.raises(TimeoutError):
            await second.line(NO_REPLY_S)
        await first.close()
        await second.negotiate()
        assert await actual(second) == SIZE


async def test_two_clients_wait_and_the_next_cannot_connect(qemu: Qemu) -> None:
    async with AsyncExitStack() as stack:
        holder = await stack.enter_async_context(Wire.connected(qemu.path))
        await holder.negotiate()
        waiting = [await stack.enter_async_context(Wire.connected(qemu.path)) for _ in range(2)]
        late = stack.enter_context(socket.socket(socket.AF_UNIX))
        late.setblocking(False)
        with pytest.raises(BlockingIOError):
            late.connect(str(qemu.path))
        await holder.close()
        await waiting[0].negotiate()
        await waiting[0].close()
        await waiting[1].negotiate()


async def test_a_client_that_closed_while_queued_is_skipped(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as holder:
        await holder.negotiate()
        async with Wire.connected(qemu.path):
            pass
        async with Wire.connected(qemu.path) as next_client:
            await holder.close()
            await next_client.negotiate()
            assert await actual(next_client) == SIZE


async def test_a_queued_clients_requests_are_answered_when_it_is_accepted(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as holder, Wire.connected(qemu.path) as waiting:
        await holder.negotiate()
        waiting.send(b'{"execute":"qmp_capabilities"}{"execute":"query-balloon","id":"early"}')
        await holder.close()
        assert "QMP" in await waiting.message()
        assert await waiting.message() == {"return": {}}
        assert await waiting.message() == {"return": {"actual": SIZE}, "id": "early"}


async def test_the_peer_pid_of_the_socket_is_qemus(qemu: Qemu) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(qemu.path))
        credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    assert struct.unpack("3i", credentials)[0] == qemu.pid


@pytest.mark.parametrize("value", [0, -1, -(2**63)])
async def test_a_target_of_zero_or_less_is_refused(qemu: Qemu, dialect: Dialect, value: int) -> None:
    sentence = f"Parameter '{dialect.refused_size}' expects a size"
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        assert await wire.execute("balloon", value=value) == refused(sentence)


async def test_a_target_without_a_driver_is_accepted_and_moves_nothing(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        for value in (1, 100 * MIB + 1, 2**40):
            assert await wire.execute_with_events("balloon", value=value) == ({"return": {}}, [])
        assert await actual(wire) == SIZE


async def test_without_a_balloon_the_device_is_not_active(start_qemu: StartQemu) -> None:
    qemu = await start_qemu(Start(device=None))
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        absent = refused("No balloon device has been activated", "DeviceNotActive")
        assert await wire.execute("query-balloon") == absent
        assert await wire.execute("balloon", value=MIB) == absent


async def test_a_device_without_an_id_is_found_by_its_type(start_qemu: StartQemu) -> None:
    qemu = await start_qemu(Start(device_id=None))
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        reply = await wire.execute("qom-list", path="/machine/peripheral-anon")
        [name] = [child["name"] for child in reply["return"] if child["type"] == "child<virtio-balloon-pci>"]
        statistics = await wire.execute(
            "qom-get", path=f"/machine/peripheral-anon/{name}", property="guest-stats"
        )
        assert statistics["return"]["last-update"] == 0
        assert set(statistics["return"]["stats"].values()) == {2**64 - 1}


async def test_the_size_counts_dimms_and_not_nvdimms(start_qemu: StartQemu) -> None:
    qemu = await start_qemu(Start(dimm=True, nvdimm=True))
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        summary = (await wire.execute("query-memory-size-summary"))["return"]
        devices = (await wire.execute("query-memory-devices"))["return"]
        dimms = sum(device["data"]["size"] for device in devices if device["type"] == "dimm")
        assert summary == {"base-memory": SIZE, "plugged-memory": 256 * MIB}
        assert await actual(wire) == SIZE + dimms == SIZE + 128 * MIB


async def test_stop_and_cont_send_one_event_before_their_reply(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        published = []
        for command in ("cont", "stop", "stop", "cont", "cont"):
            _, events = await wire.execute_with_events(command)
            published.append([event["event"] for event in events])
        assert published == [[], ["STOP"], [], ["RESUME"], []]


async def test_the_first_reset_event_is_the_hosts_and_later_ones_the_guests(
    qemu: Qemu, dialect: Dialect
) -> None:
    # How many follow is up to the firmware: none, one or two were seen.
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        first = await event_of(wire, dialect, "system_reset")
        _, [*later, stop] = await wire.execute_with_events("stop")
        assert first["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        assert {first["event"], *(event["event"] for event in later)} == {"RESET"}
        assert all(event["data"] == {"guest": True, "reason": "guest-reset"} for event in later)
        assert stop["event"] == "STOP"


async def test_a_reset_with_no_reboot_ends_qemu(start_qemu: StartQemu, dialect: Dialect) -> None:
    qemu = await start_qemu(Start(no_reboot=True))
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        event = await event_of(wire, dialect, "system_reset")
        assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "host-qmp-system-reset")
        assert await wire.line() == b""
    assert await qemu.ended() == 0


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (-1, "timer value must be greater than zero"),
        (2**32, "timer value is too big"),
        (0.5, f"Invalid parameter type for '{INTERVAL}', expected: integer"),
    ],
)
async def test_a_polling_interval_is_whole_seconds(qemu: Qemu, value: float, sentence: str) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        assert await wire.execute("qom-set", path=DEVICE, property=INTERVAL, value=2) == {"return": {}}
        assert await wire.execute("qom-set", path=DEVICE, property=INTERVAL, value=value) == refused(sentence)
        assert await wire.execute("qom-get", path=DEVICE, property=INTERVAL) == {"return": 2}


async def test_the_polling_interval_stays_when_the_client_leaves(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        await wire.execute("qom-set", path=DEVICE, property=INTERVAL, value=7)
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        assert await wire.execute("qom-get", path=DEVICE, property=INTERVAL) == {"return": 7}


async def test_quit_sends_shutdown_replies_and_removes_the_socket(qemu: Qemu, dialect: Dialect) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        event = await event_of(wire, dialect, "quit")
        assert (event["event"], event["data"]) == ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})
        assert await wire.line() == b""
    assert await qemu.ended() == 0
    assert not qemu.path.exists()


async def test_query_virtio_status_has_the_known_effect_of_the_version(qemu: Qemu, dialect: Dialect) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        wire.send(json.dumps({"execute": DRIVER_STATUS, "arguments": {"path": BACKEND}}).encode())
        if dialect.virtio_status is VirtioStatus.ABORTS:
            assert await wire.line() == b""
            assert await qemu.ended() == -SIGABRT
        else:
            answered = dialect.virtio_status is VirtioStatus.ANSWERED
            assert ("return" in await wire.message()) == answered
            assert await actual(wire) == SIZE


async def test_sigterm_sends_shutdown_and_removes_the_socket(qemu: Qemu) -> None:
    async with Wire.connected(qemu.path) as wire:
        await wire.negotiate()
        await qemu.kill(SIGTERM)
        event = await wire.message()
        assert (event["event"], event["data"]["reason"]) == ("SHUTDOWN", "host-signal")
        assert await wire.line() == b""
    assert not qemu.path.exists()


async def test_sigkill_leaves_a_stale_socket_that_the_next_one_replaces(start_qemu: StartQemu) -> None:
    qemu = await start_qemu(Start())
    await qemu.kill(SIGKILL)
    assert qemu.path.is_socket()
    with pytest.raises(ConnectError):
        await QMPClient("stale").connect(str(qemu.path))
    again = await start_qemu(Start(name="second run"))
    assert again.path == qemu.path
    assert again.pid != qemu.pid
    async with Wire.connected(Path(again.path)) as wire:
        await wire.negotiate()
        assert await wire.execute("query-name") == {"return": {"name": "second run"}}
