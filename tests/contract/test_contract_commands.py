"""No command that the program sends ends a QEMU, in any state of that QEMU."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from both_qemus import PATIENCE_S, Qemu, Start, Wire, installed_version
from exchanges import BACKEND, DEVICE, INTERVAL
from recorded_commands import recorded_commands

import qmpballoon
from qmpballoon.agent.vm_session import VmSession
from qmpballoon.lab.guest import BalloonDevice, LabGuest, balloon_of
from qmpballoon.lab.lab import Lab
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import COMMANDS, DRIVER_STATUS, QUEUE_STATUS, may_be_sent
from qmpballoon.qmp.monitor import open_monitor
from qmpballoon.units import MIB

VERSION = ".".join(map(str, installed_version()))
SENT = [name for name in COMMANDS if may_be_sent(name, VERSION)]

MEMORY = "/objects/pc.ram"

StartQemu = Callable[[Start], Awaitable[Qemu]]

ARGUMENTS: dict[str, dict[str, object]] = {
    "qom-list": {"path": "/machine/peripheral"},
    "balloon": {"value": 112 * MIB},
    "qom-get guest-stats": {"path": DEVICE, "property": "guest-stats"},
    f"qom-get {INTERVAL}": {"path": DEVICE, "property": INTERVAL},
    f"qom-set {INTERVAL}": {"path": DEVICE, "property": INTERVAL, "value": 1},
    "qom-get deflate-on-oom": {"path": DEVICE, "property": "deflate-on-oom"},
    "qom-get free-page-reporting": {"path": DEVICE, "property": "free-page-reporting"},
    "qom-get hugetlb": {"path": MEMORY, "property": "hugetlb"},
    "qom-get mem-path": {"path": MEMORY, "property": "mem-path"},
    DRIVER_STATUS: {"path": BACKEND},
    QUEUE_STATUS: {"path": BACKEND, "queue": 2},
}
OF_OTHER_MEMORY = {"qom-get hugetlb": "GenericError", "qom-get mem-path": "GenericError"}  # of memfd and file
WITHOUT_BALLOON = {  # the class of the error; all others are answered
    **OF_OTHER_MEMORY,
    "qom-get free-page-reporting": "DeviceNotFound",
    "query-balloon": "DeviceNotActive",
    "balloon": "DeviceNotActive",
    "qom-get guest-stats": "DeviceNotFound",
    f"qom-get {INTERVAL}": "DeviceNotFound",
    f"qom-set {INTERVAL}": "DeviceNotFound",
    "qom-get deflate-on-oom": "DeviceNotFound",
    DRIVER_STATUS: "GenericError",
    QUEUE_STATUS: "GenericError",
}


async def send_all(path: Path, *, run_state: str) -> dict[str, str]:
    """Send all commands, in the order of the table; check the run state; return the class of each error."""
    errors = {}
    async with Wire.connected(path) as wire:
        await wire.message()
        for name in SENT:
            reply = await wire.execute(name.split()[0], **ARGUMENTS.get(name, {}))
            if "return" not in reply:
                errors[name] = reply["error"]["class"]
        status = await wire.execute("query-status")
        assert status["return"]["status"] == run_state
    return errors


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("balloon", [True, False])
async def test_no_sent_command_ends_a_qemu_without_a_guest(
    start_qemu: StartQemu, balloon: bool, stopped: bool
) -> None:
    qemu = await start_qemu(Start(device="virtio-balloon-pci" if balloon else None, stopped=stopped))
    errors = await send_all(qemu.path, run_state="prelaunch" if stopped else "running")
    expected = OF_OTHER_MEMORY if balloon else WITHOUT_BALLOON
    assert errors == {name: error for name, error in expected.items() if name in SENT}


@pytest.mark.parametrize("stopped", [False, True])
@pytest.mark.parametrize("driver", [True, False])
async def test_no_sent_command_ends_a_qemu_with_a_linux_guest(
    sockets_dir: Path, driver: bool, stopped: bool
) -> None:
    async with Lab(sockets_dir) as lab:
        guest = await lab.guest("linux", driver=driver)
        assert (await guest.guest_memory()).driver == driver
        if stopped:
            await guest.monitor.execute("stop")
        assert await send_all(guest.socket, run_state="paused" if stopped else "running") == OF_OTHER_MEMORY
        if driver and not stopped:
            await guest.monitor.until_actual(
                lambda actual: actual < guest.memory, timeout_s=PATIENCE_S, what="its balloon moves"
            )
        assert guest.program.exit_status is None


# ── commands that the program sends ───────────────────────────────────────────────────────────────────


async def use_the_api(socket: Path, guest: LabGuest) -> None:
    async with qmpballoon.connect(socket, timeout_s=PATIENCE_S) as vm:
        state = await vm.state(fresh_s=PATIENCE_S if guest.machine.driver else 0)
        assert state.size == guest.memory
        assert (state.guest is not None) == guest.machine.driver
        assert await vm.set_target(guest.memory - 16 * MIB) == guest.memory - 16 * MIB
        assert (await vm.driver_up()) in (guest.machine.driver, None)


async def sample_as_the_agent(socket: Path, guest: LabGuest) -> None:
    clock = asyncio.get_running_loop().time
    session = await Session.greeted(
        open_monitor(socket),
        lambda event, details: None,
        greeting_timeout_s=PATIENCE_S,
        request_timeout_s=PATIENCE_S,
    )
    try:
        vm = VmSession(session, guest.pid, stats_interval_s=1, clock=clock)
        await vm.look()
        is_new = await vm.take_sample(ask=True, wait_s=PATIENCE_S if guest.machine.driver else 0)
        assert is_new == guest.machine.driver
        await vm.look()
        assert vm.driver_up == guest.machine.driver
        assert vm.deflates_on_oom == guest.machine.driver
        vm.close()
    finally:
        await session.close()


@pytest.mark.parametrize(
    ("machine", "driver"), [(None, True), (None, False), ("q35", True), ("microvm", True), ("microvm", False)]
)
@pytest.mark.parametrize("use", [use_the_api, sample_as_the_agent])
async def test_only_listed_commands_are_sent_and_unstable_ones_only_to_tried_versions(
    sockets_dir: Path, use: Callable[[Path, LabGuest], Awaitable[None]], driver: bool, machine: str | None
) -> None:
    async with Lab(sockets_dir) as lab:
        balloon = BalloonDevice(balloon_of(machine), deflate_on_oom=True)
        guest = await lab.guest("linux", balloon=balloon, driver=driver, kind=machine)
        async with recorded_commands(guest.socket, sockets_dir / "proxy") as sent:
            await use(sockets_dir / "proxy", guest)
        assert sent[0] == "qmp_capabilities"
        assert "query-balloon" in sent
        assert set(sent) <= set(SENT)
        assert (DRIVER_STATUS in sent) == (DRIVER_STATUS in SENT)
        assert await guest.monitor.status() == "running"
        assert guest.program.exit_status is None


# ── their stability in QEMU's schema ───────────────────────────────────────────────────────────────────────

UNSTABLE_IS_FLAGGED_SINCE = (6, 2, 0)


async def test_qemu_marks_the_same_commands_unstable_as_the_table_and_none_deprecated(
    sockets_dir: Path,
) -> None:
    async with Lab(sockets_dir) as lab:
        qemu = await lab.empty_qemu("schema")
        async with Wire.connected(qemu.socket) as wire:
            await wire.negotiate()
            schema: list[dict[str, Any]] = (await wire.execute("query-qmp-schema"))["return"]
    features = {each["name"]: each.get("features", []) for each in schema if each["meta-type"] == "command"}
    flagged = any("unstable" in each for each in features.values())
    assert flagged == (installed_version() >= UNSTABLE_IS_FLAGGED_SINCE)
    for name, sent in COMMANDS.items():
        command = name.split()[0]
        stable = sent.tried is None
        assert stable or command.startswith("x-")
        assert (command in features) == (installed_version() >= since(sent.since))
        assert "deprecated" not in features.get(command, [])
        if flagged and command in features:
            assert ("unstable" in features[command]) != stable


def since(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))
