"""Monitors on abstract unix sockets, which have no file: the API, the one-shot commands and the agent."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable

import pytest
from agent_process import PATIENCE_S, AgentProcess

import qmpballoon
from qmpballoon.cli import main
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def abstract(lab: Lab) -> tuple[str, LabGuest]:
    """Start a guest with one more monitor, and return its address and the guest."""
    name = f"qmpballoon-{uuid.uuid4().hex[:8]}"
    more = ("-qmp", f"unix:{name},abstract=on,server=on,wait=off")
    return f"@{name}", await lab.guest(fresh=True, arguments=more, qemu_name=None)


async def command(*words: str) -> int:
    return await asyncio.to_thread(main, list(words))


async def test_the_api_and_the_commands_take_an_abstract_socket(
    lab: Lab, capsys: pytest.CaptureFixture[str]
) -> None:
    address, guest = await abstract(lab)
    async with qmpballoon.connect(address) as vm:
        assert (vm.name, vm.pid) == (address[1:], guest.pid)
        await vm.ready(timeout_s=PATIENCE_S)
        assert await command("status", address, "--timeout", "0.2") == 3
        assert "another client holds this monitor" in capsys.readouterr().out
        with pytest.raises(qmpballoon.MonitorBusy):
            async with qmpballoon.connect(address, timeout_s=0.1):
                pass
    assert await command("set", address, "112MiB", "--wait") == 0
    capsys.readouterr()
    assert await command("status", address, "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["socket"], row["pid"], row["health"]) == (address, guest.pid, "ok")
    assert row["actual"] <= 113 * MIB
    await guest.kill()
    assert await command("status", address) == 3
    assert "nobody listens on this socket" in capsys.readouterr().out


async def test_the_agent_serves_an_abstract_socket_as_it_comes_and_goes(
    lab: Lab, start_agent: Callable[..., AgentProcess]
) -> None:
    address, guest = await abstract(lab)
    agent = start_agent(None, discovery={"sockets": [address], "forget_after_s": 1})
    await agent.until_logged("vm-online")
    await guest.kill()
    await agent.until_logged("vm-forgotten")
    await guest.start()
    await agent.until_logged("vm-online", times=2)
    control = ("--control", str(agent.state_dir / "agent.sock"))
    assert await command("wait", address, "ready", *control) == 0
    assert await agent.terminate() == 0
