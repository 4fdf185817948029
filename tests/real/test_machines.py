"""Guests on microvm, on q35 behind a root port and hot-plugged, on aarch64 and s390x."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import foreign
import pytest
from agent_process import PATIENCE_S, AgentProcess

import qmpballoon
from qmpballoon.cli import main
from qmpballoon.lab.guest import QEMU_VARIABLE, BalloonDevice, LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import MissingPrograms
from qmpballoon.pytest_plugin import BalloonConnect, StartQemuVm
from qmpballoon.units import MIB

PORT = ("-device", "pcie-root-port,id=port1,slot=1")
MMIO = "virtio-balloon-device"


async def on(machine: str, lab: Lab) -> LabGuest:
    """Start a guest on a machine, with its balloon."""
    if machine == "microvm":
        return await lab.guest("web", kind="microvm", balloon=BalloonDevice(MMIO))
    if machine == "microvm with PCI":
        return await lab.guest("web", kind="microvm,pcie=on")
    behind = BalloonDevice("virtio-balloon-pci,bus=port1")
    if machine == "q35 behind a root port":
        return await lab.guest("web", kind="q35", balloon=None, arguments=(*PORT, "-device", behind.option()))
    guest = await lab.guest("web", kind="q35", balloon=None, arguments=PORT)
    added = {"driver": "virtio-balloon-pci", "id": "balloon0", "bus": "port1"}
    with pytest.raises(qmpballoon.NoBalloon):
        async with qmpballoon.connect(guest.socket) as vm:
            await vm.state()
    await guest.monitor.execute("device_add", added)
    return guest


@pytest.mark.parametrize(
    "machine", ["microvm", "microvm with PCI", "q35 behind a root port", "q35 hot-plugged"]
)
async def test_a_balloon_moves_and_reports_on_other_machines(
    machine: str, lab: Lab, start_agent: Callable[..., AgentProcess]
) -> None:
    guest = await on(machine, lab)
    async with qmpballoon.connect(guest.socket) as vm:
        state = await vm.ready(timeout_s=PATIENCE_S)
        assert (state.size, state.actual) == (guest.memory, guest.memory)
        async with vm.squeeze("112MiB", wait_s=PATIENCE_S):
            assert await guest.monitor.actual() <= 113 * MIB
    agent = start_agent(None)
    await agent.until_logged("vm-online")
    control = ("--control", str(agent.state_dir / "agent.sock"))
    await agent.until_logged("now=ok")
    assert await asyncio.to_thread(main, ["set", "web", "112MiB", "--wait", *control]) == 0
    assert await agent.terminate() == 0


@pytest.mark.parametrize("processor", list(foreign.MACHINES))
@pytest.mark.parametrize("deflates", [False, True])
async def test_a_balloon_moves_and_reports_on_another_processor(
    processor: str, deflates: bool, lab: Lab, sockets_dir: Path, start_agent: Callable[..., AgentProcess]
) -> None:
    directory = foreign.fetched(processor)
    if directory is None:
        pytest.skip("not downloaded: make test-machines")
    balloon = ("-device", "virtio-balloon,id=balloon0" + ",deflate-on-oom=on" * deflates)
    await lab.own_qemu([*foreign.command(processor, directory, sockets_dir), *balloon], "far")
    async with qmpballoon.connect(lab.guests[0].socket) as vm:
        state = await vm.ready(timeout_s=2 * PATIENCE_S)
        assert (state.size, state.actual) == (256 * MIB, 256 * MIB)
        assert await vm.driver_up() is not False
        async with vm.squeeze("160MiB", wait_s=PATIENCE_S):
            assert await lab.guests[0].monitor.actual() <= 161 * MIB
    agent = start_agent(None)
    await agent.until_logged("vm-online")
    await agent.until_logged("now=ok")
    control = ("--control", str(agent.state_dir / "agent.sock"))
    assert await asyncio.to_thread(main, ["set", "far", "192MiB", "--wait", *control]) == 0
    assert await asyncio.to_thread(main, ["doctor", "far", *control]) in (0, 1)
    assert await agent.terminate() == 0


def test_a_test_chooses_its_machine(qemu_vm: StartQemuVm, balloon_connect: BalloonConnect) -> None:
    guest = qemu_vm(machine="microvm")
    vm = balloon_connect(guest)
    vm.ready(timeout_s=PATIENCE_S)
    vm.set_target("112MiB", wait_s=PATIENCE_S)
    assert guest.actual() <= 113 * MIB


def test_a_test_chooses_its_qemu(qemu_vm: StartQemuVm, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingPrograms, match="qemu-system-none"):
        qemu_vm(qemu="qemu-system-none")
    monkeypatch.setenv(QEMU_VARIABLE, "qemu-system-none")
    with pytest.raises(MissingPrograms, match="qemu-system-none"):
        qemu_vm()
