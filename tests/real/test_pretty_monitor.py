"""A real monitor with pretty=on, as Kata's -qmp-pretty option makes it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from agent_process import AgentProcess

from qmpballoon.api import connect
from qmpballoon.cli import main
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def pretty_guest(lab: Lab, path: Path) -> LabGuest:
    chardev = f"socket,id=pretty,path={path},server=on,wait=off"
    arguments = ("-chardev", chardev, "-mon", "chardev=pretty,mode=control,pretty=on")
    return await lab.guest("web", fresh=True, arguments=arguments)


async def command(*words: str) -> int:
    return await asyncio.to_thread(main, list(words))


async def test_a_monitor_with_pretty_on_is_served(lab: Lab, sockets_dir: Path) -> None:
    path = sockets_dir / "pretty.sock"
    guest = await pretty_guest(lab, path)
    async with connect(path) as vm:
        state = await vm.ready(timeout_s=30)
        assert (vm.pid, state.size) == (guest.pid, guest.memory)
        assert await vm.set_target(guest.memory - 16 * MIB, wait_s=30) == guest.memory - 16 * MIB


async def test_commands_and_the_agent_serve_a_monitor_with_pretty_on(
    lab: Lab,
    sockets_dir: Path,
    start_agent: Callable[..., AgentProcess],
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = sockets_dir / "pretty.sock"
    guest = await pretty_guest(lab, path)
    assert await command("set", str(path), "112MiB", "--wait") == 0
    capsys.readouterr()
    assert await command("status", "--json", str(path)) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["size"], row["health"], row["pid"]) == (guest.memory, "ok", guest.pid)
    agent = start_agent(None, discovery={"sockets": [str(path)]})
    await agent.until_logged("vm-online")
    control = ("--control", str(agent.state_dir / "agent.sock"))
    assert await command("wait", "web", "ready", *control) == 0
    assert await command("set", "web", "100%", "--wait", *control) == 0
    assert await guest.monitor.actual() >= 127 * MIB
