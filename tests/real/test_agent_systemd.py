"""What the service manager hears of the agent."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from agent_process import PATIENCE_S, StartAgent


class ServiceManager:
    """The other end of NOTIFY_SOCKET."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.setblocking(False)
        self.heard: list[str] = []

    async def until(self, state: str) -> None:
        """Wait until a state is said, once more."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                message = await asyncio.get_running_loop().sock_recv(self.socket, 4096)
                states = message.decode().splitlines()
                self.heard += states
                if state in states:
                    return


@pytest.fixture
def manager(sockets_dir: Path) -> Iterator[ServiceManager]:
    manager = ServiceManager(sockets_dir / "notify")
    with manager.socket:
        yield manager


async def test_the_service_manager_hears_ready_alive_reloading_and_stopping(
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
    assert "STOPPING=1" not in manager.heard
    status, _ = await asyncio.gather(agent.terminate(), manager.until("STOPPING=1"))
    assert status == 0
    assert any(state.startswith("MONOTONIC_USEC=") for state in manager.heard)
    assert all(line.startswith("<") for line in agent.log.read_text().splitlines())  # a priority, no stamp


async def test_an_agent_without_broker_or_manager_rules_and_ends_well(start_agent: StartAgent) -> None:
    agent = start_agent(None)
    await agent.until_logged("agent-started")
    assert await agent.terminate() == 0
    assert agent.logged("agent-stopped")
