"""Notifications to the service manager."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from agent_process import PATIENCE_S, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.process import Program


class ServiceManager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.received: list[str] = []

    def discard(self) -> None:
        """Drop notifications that were not read yet."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.socket.recv(4096)

    async def until(self, state: str) -> None:
        """Wait until a state is sent, once more."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
                states = message.decode().splitlines()
                self.received += states
                if state in states:
                    return


@pytest.fixture
def manager(sockets_dir: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(sockets_dir / "notify")
    with manager.socket:
        yield manager


@pytest.fixture
def start_qemus(sockets_dir: Path) -> Iterator[Callable[..., Program]]:
    """Starts simulated QEMUs, in processes of their own, at ``NAME.qmp``, or at ``NAME-0.qmp`` and so on."""
    started: list[Program] = []

    def start(name: str, *options: str) -> Program:
        command = (sys.executable, "-m", "qmpballoon.sim.qemu", f"{sockets_dir}/{name}.qmp", "--name", name)
        started.append(Program([*command, "--fork", *options], log=sockets_dir / f"{name}.log"))
        return started[-1]

    yield start
    for program in started:
        program.destroy()


async def test_systemd_is_notified_of_ready_watchdog_reloading_and_stopping(
    manager: ServiceManager, start_agent: StartAgent, sockets_dir: Path
) -> None:
    environment = (f"NOTIFY_SOCKET={sockets_dir}/notify", "WATCHDOG_USEC=1000000", "JOURNAL_STREAM=8:1")
    agent = start_agent(None, before=("env", *environment))
    await manager.until("READY=1")
    await manager.until("WATCHDOG=1")
    await manager.until("WATCHDOG=1")
    agent.reload()
    await manager.until("RELOADING=1")
    await manager.until("READY=1")
    agent.file.write_text("[nonsense]\n")
    agent.reload()
    await manager.until("RELOADING=1")
    await manager.until("READY=1")
    assert "STOPPING=1" not in manager.received
    status, _ = await asyncio.gather(agent.terminate(), manager.until("STOPPING=1"))
    assert status == 0
    assert any(state.startswith("MONOTONIC_USEC=") for state in manager.received)
    assert all(line.startswith("<") for line in agent.log.read_text().splitlines())  # a priority, no stamp


async def test_an_agent_without_broker_or_systemd_starts_and_ends_with_0(
    start_agent: StartAgent,
) -> None:
    agent = start_agent(None)
    await agent.until_logged("agent-started")
    assert await agent.terminate() == 0
    assert agent.logged("agent-stopped")


async def test_an_agent_out_of_descriptors_continues_logs_it_and_recovers(
    manager: ServiceManager,
    start_agent: StartAgent,
    broker: LabBroker,
    start_qemus: Callable[..., Program],
    sockets_dir: Path,
) -> None:
    start_qemus("first")
    environment = (f"NOTIFY_SOCKET={sockets_dir}/notify", "WATCHDOG_USEC=1000000")
    agent = start_agent(broker, before=("prlimit", "--nofile=40:40", "env", *environment))
    await agent.until_logged("broker-connected")
    await agent.until_logged("vm-online vm=first")
    many = start_qemus("many", "--count", "30")
    await agent.until_logged("descriptors-exhausted")
    manager.discard()
    await manager.until("WATCHDOG=1")
    open_files = f"/proc/{agent.program.pid}/fd"
    await until(lambda: len(os.listdir(open_files)) == 40, what="no descriptor is left")
    agent.reload()
    await agent.until_logged("reload-refused")
    await broker.restart()
    await agent.until_logged("broker-lost")
    manager.discard()
    await manager.until("WATCHDOG=1")

    many.signal(signal.SIGTERM)
    await agent.until_logged("descriptors-left")
    await agent.until_logged("broker-connected", times=2)
    start_qemus("late")
    await agent.until_logged("vm-online vm=late")
    assert not agent.logged("health vm=first was=ok")
    assert len(agent.logged("vm-online vm=first")) == 1
    assert await agent.terminate() == 0
