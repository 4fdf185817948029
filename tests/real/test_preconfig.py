"""A QEMU that is started with -preconfig and makes its machine later."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from agent_process import AgentWatch, StartAgent

from qmpballoon.api import connect
from qmpballoon.errors import Unreachable
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually
from qmpballoon.units import MIB


async def exit_preconfig(path: Path) -> None:
    """Send the command over a monitor of its own, and keep nothing open."""
    reader, writer = await asyncio.open_unix_connection(path)
    await reader.readline()
    for command in ("qmp_capabilities", "x-exit-preconfig"):
        writer.write(json.dumps({"execute": command}).encode() + b"\n")
        await reader.readline()
    writer.close()


async def test_a_qemu_in_preconfig_is_waited_for(
    lab: Lab, broker: LabBroker, watch: AgentWatch, start_agent: StartAgent, sockets_dir: Path
) -> None:
    control, monitor = sockets_dir / "control.sock", sockets_dir / "web.qmp"
    command = ["qemu-system-x86_64", "-preconfig", "-S", "-name", "web", "-m", "64", "-nodefaults"]
    command += ["-vga", "none", "-display", "none", "-accel", "tcg", "-device", "virtio-balloon-pci"]
    for path in (control, monitor):
        command += ["-qmp", f"unix:{path},server=on,wait=off"]
    qemu = Program(command, log=sockets_dir / "qemu.log")
    try:

        async def there() -> bool:
            return control.is_socket() and monitor.is_socket()

        await eventually(there, bool, timeout_s=30, what="QEMU listens")
        with pytest.raises(Unreachable, match="x-exit-preconfig"):
            async with connect(monitor, timeout_s=0.3):
                raise AssertionError("it has no machine")
        agent = start_agent(broker)
        await agent.until_logged("qemu-preconfig")
        assert watch.last_json("vms") in (None, [])
        await exit_preconfig(control)
        state = await watch.until_health("web", "paused")
        assert (state["size"], state["pid"]) == (64 * MIB, qemu.pid)
        assert not agent.logged("session-lost")
    finally:
        qemu.destroy()
