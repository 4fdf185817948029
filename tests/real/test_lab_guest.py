"""The lab's guests behave as the other tests assume."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from qemu.qmp import ExecuteError, QMPClient

from qmpballoon.lab.guest import BalloonDevice, LabGuest, Machine
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB

PATIENCE_S = 60.0  # for what takes a second on an idle machine


def _is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_tests_run_with_asyncio_in_debug_mode() -> None:
    async def debug() -> bool:
        return asyncio.get_running_loop().get_debug()

    assert asyncio.run(debug())


async def test_a_fresh_guest_boots_and_its_balloon_moves(lab: Lab) -> None:
    guest = await lab.guest(fresh=True)
    before = await guest.guest_memory()
    assert before.driver
    assert guest.boots == 1
    assert await guest.monitor.actual() == guest.memory == 128 * MIB
    await guest.monitor.set_target(96 * MIB)
    await guest.monitor.until_actual((96 * MIB).__eq__, timeout_s=PATIENCE_S, what="the balloon takes 32 MiB")
    after = await guest.guest_memory()
    assert before.total - after.total == 32 * MIB  # deflate-on-oom is off: the guest's total has shrunk


async def test_memory_held_in_a_guest_is_not_available_until_it_is_freed(lab: Lab) -> None:
    guest = await lab.guest()
    free = await guest.guest_memory()
    await guest.command("hold 40")
    holding = await guest.guest_memory()
    assert holding.held == 40 * MIB
    assert 39 * MIB <= free.available - holding.available <= 42 * MIB
    await guest.command("hold 0")
    # per-CPU lists keep freed pages for some seconds, not counted as available (Linux 6.12)
    await eventually(
        guest.guest_memory,
        lambda released: free.available - released.available <= 2 * MIB,
        timeout_s=PATIENCE_S,
        what="the freed memory is available",
        interval_s=0.1,
    )


async def test_a_guest_grows_in_steps_and_a_newer_order_replaces_an_older(lab: Lab) -> None:
    guest = await lab.guest()
    await guest.command("grow 40 8")
    held = []

    async def grow() -> int:
        held.append((await guest.guest_memory()).held)
        return held[-1]

    await eventually(grow, (40 * MIB).__eq__, timeout_s=PATIENCE_S, what="40 MiB are held")
    assert held == sorted(held)
    assert len(set(held)) > 3
    await guest.command("grow 60 1")
    await guest.command("hold 10")
    assert (await guest.guest_memory()).held == 10 * MIB


async def test_a_guest_whose_workload_is_killed_still_answers(lab: Lab) -> None:
    guest = await lab.guest()
    with pytest.raises(LabError, match="killed"):
        await guest.command("hold 200")
    memory = await guest.guest_memory()
    assert memory.oom_kills == 1
    assert memory.held == 0
    await guest.command("hold 10")
    assert "Out of memory" in guest.console.read_text()


async def test_with_deflate_on_oom_a_guest_takes_memory_back_from_the_balloon(lab: Lab) -> None:
    guest = await lab.guest(balloon=BalloonDevice(deflate_on_oom=True))
    await guest.monitor.set_target(80 * MIB)
    await guest.monitor.until_actual((80 * MIB).__eq__, timeout_s=PATIENCE_S, what="the balloon takes 48 MiB")
    await guest.command("hold 50")
    assert await guest.monitor.actual() > 80 * MIB
    assert (await guest.guest_memory()).oom_kills == 0


async def test_what_a_guest_reads_from_its_disk_is_cached_until_dropped(lab: Lab) -> None:
    guest = await lab.guest(disk=64 * MIB)
    await guest.command("cache 20")
    cached = (await guest.guest_memory()).cached
    await guest.command("drop")
    assert cached >= 20 * MIB
    assert (await guest.guest_memory()).cached < 2 * MIB


async def test_a_guest_without_its_driver_keeps_all_memory_until_the_driver_loads(lab: Lab) -> None:
    guest = await lab.guest(driver=False)
    await guest.monitor.set_target(96 * MIB)
    assert not (await guest.guest_memory()).driver
    assert await guest.monitor.actual() == guest.memory
    await guest.command("driver load")
    await guest.monitor.until_actual(
        (96 * MIB).__eq__, timeout_s=PATIENCE_S, what="the new driver reaches the target"
    )
    await guest.command("driver unload")
    await guest.monitor.until_actual(guest.memory.__eq__, timeout_s=PATIENCE_S, what="the balloon is empty")


async def test_a_guest_reboots_inside_the_same_qemu(lab: Lab) -> None:
    guest = await lab.guest()
    pid = guest.pid
    await guest.command("hold 20")
    guest.reboot()
    await guest.booted(boots=2)
    assert guest.pid == pid
    assert (await guest.guest_memory()).held == 0


async def test_a_guest_that_powers_off_ends_its_qemu(lab: Lab) -> None:
    guest = await lab.guest()
    guest.power_off()
    assert await guest.program.ended(timeout_s=PATIENCE_S) == 0
    assert not guest.socket.exists()


async def test_a_killed_qemu_leaves_its_socket_and_a_new_one_takes_its_place(lab: Lab) -> None:
    guest = await lab.empty_qemu()
    pid = guest.pid
    await guest.kill()
    with socket.socket(socket.AF_UNIX) as client, pytest.raises(ConnectionRefusedError):
        client.connect(str(guest.socket))
    await guest.restart()
    assert guest.pid != pid
    assert await guest.monitor.status() == "prelaunch"
    client_of_the_agent = QMPClient()
    await client_of_the_agent.connect(str(guest.socket))
    await client_of_the_agent.disconnect()


async def test_a_terminated_qemu_removes_its_socket(lab: Lab) -> None:
    guest = await lab.empty_qemu()
    await guest.terminate()
    assert not guest.socket.exists()


async def test_a_stopped_qemu_does_not_answer_until_it_continues(lab: Lab) -> None:
    guest = await lab.empty_qemu()
    guest.stop()
    with pytest.raises(LabError, match="query-status not answered"):
        await guest.monitor.execute("query-status", timeout_s=0.3)
    guest.cont()
    assert await guest.monitor.status() == "prelaunch"


async def test_a_qemu_without_a_balloon_is_an_error(lab: Lab) -> None:
    guest = await lab.empty_qemu(balloon=None)
    with pytest.raises(ExecuteError, match="No balloon device"):
        await guest.monitor.actual()


async def test_a_qemu_that_does_not_start_is_an_error_with_its_output(lab: Lab) -> None:
    with pytest.raises(LabError, match="no-such-device"):
        await lab.empty_qemu(arguments=("-device", "no-such-device"))


async def test_a_guest_that_does_not_boot_in_time_is_an_error_with_its_console(lab: Lab) -> None:
    guest = await lab.guest(boot_delay_s=60, wait=False)
    await eventually(
        lambda: asyncio.to_thread(lambda: guest.console.read_text().count("Run /init")),
        bool,
        timeout_s=PATIENCE_S,
        what="init",
    )
    with pytest.raises(LabError, match=r"(?s)has not booted.*Run /init"):
        await guest.booted(timeout_s=0.1)


async def test_a_cancelled_start_leaves_no_qemu(sockets_dir: Path) -> None:
    guest = LabGuest(sockets_dir, Machine())
    task = asyncio.create_task(guest.start(), name="start a guest")
    while guest._program is None:  # QEMU was started just now, and does not listen yet
        await asyncio.sleep(0)
    pid = guest.pid
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not _is_there(pid)
    assert [path.suffix for path in sockets_dir.iterdir()] == [".log"]


async def test_a_guest_ends_with_the_program_that_started_it(sockets_dir: Path) -> None:
    script = (
        "import asyncio, sys\n"
        "from pathlib import Path\n"
        "from qmpballoon.lab.guest import LabGuest, Machine\n"
        "async def main():\n"
        "    async with LabGuest(Path(sys.argv[1]), Machine()) as guest:\n"
        "        print(guest.pid, flush=True)\n"
        "        await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(sockets_dir)], stdout=subprocess.PIPE, text=True
    ) as starter:
        assert starter.stdout is not None
        pid = int(starter.stdout.readline())
        assert _is_there(pid)
        os.kill(starter.pid, signal.SIGKILL)

    async def qemu_is_there() -> bool:
        return _is_there(pid)

    await eventually(qemu_is_there, lambda there: not there, timeout_s=PATIENCE_S, what="QEMU ends too")
