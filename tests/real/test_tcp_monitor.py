"""Monitors over TCP on this machine: the API, the one-shot commands and the agent."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import pytest
from agent_process import PATIENCE_S, AgentProcess
from serving import serving

import qmpballoon
from qmpballoon.api import connect
from qmpballoon.cli import main
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.qmp.tcp import is_tcp_listening
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]


def free_port(host: str = "127.0.0.1") -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


async def over_tcp(lab: Lab, **how: Any) -> tuple[str, LabGuest]:
    """Start a guest with one more monitor, and return its address and the guest."""
    place = f"127.0.0.1:{free_port()}"
    more = ("-qmp", f"tcp:{place},server=on,wait=off")
    return f"tcp:{place}", await lab.guest(fresh=True, arguments=more, **how)


async def has(guest: LabGuest, actual: int) -> None:
    """Wait for the last step of a move: *reached* is said within 1 MiB of the target."""
    await guest.monitor.until_actual(actual.__eq__, timeout_s=PATIENCE_S, what="the last step")


async def command(*words: str) -> int:
    return await asyncio.to_thread(main, list(words))


async def test_a_balloon_is_set_and_read_over_tcp(lab: Lab) -> None:
    address, guest = await over_tcp(lab, qemu_name=None)
    async with connect(address) as vm:
        state = await vm.ready(timeout_s=PATIENCE_S)
        assert (vm.pid, vm.name, state.size) == (None, address.removeprefix("tcp:"), guest.memory)
        assert await vm.set_target("112MiB", wait_s=PATIENCE_S) == 112 * MIB
    await has(guest, 112 * MIB)
    async with connect(address.replace("127.0.0.1", "localhost")) as vm:
        assert (await vm.state()).actual == 112 * MIB


async def test_the_one_shot_commands_take_an_address(lab: Lab, capsys: Capture) -> None:
    address, guest = await over_tcp(lab)
    assert await command("wait", address, "ready") == 0
    assert await command("set", address, "112MiB", "--wait") == 0
    await has(guest, 112 * MIB)
    capsys.readouterr()
    assert await command("status", address, "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["actual"], row["pid"], row["rss"], row["socket"]) == (112 * MIB, None, None, address)
    assert row["health"] == "ok"
    assert await command("status", address) == 0
    assert "112 MiB" in capsys.readouterr().out
    assert await command("doctor", address) in (0, 1)
    printed = " ".join(capsys.readouterr().out.split())
    assert address in printed
    assert "the monitor is one over TCP, which tells nothing of its process" in printed
    assert await command("pulse", address) == 0
    await has(guest, 112 * MIB)


async def test_a_port_on_which_nobody_listens(capsys: Capture) -> None:
    address = f"tcp:127.0.0.1:{free_port()}"
    assert not is_tcp_listening(address)
    assert await command("status", address) == 3
    printed = capsys.readouterr().out
    assert "nobody listens on this port" in printed
    assert "offline" in printed
    with pytest.raises(qmpballoon.Unreachable, match="nobody listens on this port"):
        async with connect(address, timeout_s=0.1):
            pass


async def test_a_monitor_that_is_held(lab: Lab, capsys: Capture) -> None:
    address, _ = await over_tcp(lab)
    async with connect(address):
        assert is_tcp_listening(address)
        assert await command("status", address, "--timeout", "0.3") == 3
        assert "another client holds this monitor" in capsys.readouterr().out
        for _ in range(3):  # those given up stay in the backlog; the last gets no connection at all
            with pytest.raises(qmpballoon.MonitorBusy, match="another client holds"):
                async with connect(address, timeout_s=0.2):
                    pass
    async with connect(address, timeout_s=PATIENCE_S) as vm:
        assert (await vm.state()).run_state == "running"


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_what_is_no_monitor_is_named(host: str) -> None:
    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"SSH-2.0-OpenSSH_9.2p1\r\n")
        await reader.read(1)

    try:
        port = free_port(host)
    except OSError:
        pytest.skip("no IPv6 on this machine")
    for typed in (f"[{host}]" if ":" in host else host, "localhost"):
        async with serving(greet, (host, port)):
            with pytest.raises(qmpballoon.ConnectionLost, match="an SSH server"):
                async with connect(f"tcp:{typed}:{port}"):
                    pass


async def test_another_machine_needs_permission(capsys: Capture) -> None:
    with pytest.raises(qmpballoon.Unreachable, match="allow_remote=True"):
        async with connect("tcp:192.0.2.1:4444"):
            pass
    assert await command("status", "tcp:192.0.2.1:4444") == 2
    assert "--allow-remote" in capsys.readouterr().err
    with pytest.raises(qmpballoon.Unreachable):
        async with connect("tcp:qmpballoon.invalid:4444", timeout_s=2, allow_remote=True):
            pass


async def test_the_agent_serves_a_monitor_over_tcp(
    lab: Lab, start_agent: Callable[..., AgentProcess], capsys: Capture
) -> None:
    address, guest = await over_tcp(lab, qemu_name="far")
    agent = start_agent(None, discovery={"sockets": [address]})
    await agent.until_logged("vm-online")
    control = ("--control", str(agent.state_dir / "agent.sock"))
    assert await command("wait", address, "ready", *control) == 0
    capsys.readouterr()
    assert await command("status", "--json", "far", *control) == 0
    [row] = json.loads(capsys.readouterr().out)
    assert (row["size"], row["pid"], row["rss"], row["health"]) == (guest.memory, None, None, "ok")
    assert await command("set", "far", "112MiB", "--wait", *control) == 0
    await has(guest, 112 * MIB)
    await guest.kill()
    await agent.until_logged("session-lost")
    await guest.start()
    await agent.until_logged("vm-online", times=2)
    assert await command("wait", "far", "ready", *control) == 0
    agent.configure(discovery={"sockets": []})
    agent.reload()
    await agent.until_logged("reloaded")
    assert await command("status", "far", *control) == 3
    assert await agent.terminate() == 0
