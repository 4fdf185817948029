"""Ctrl-C: the agent stops as after SIGTERM, and at once when it is pressed again."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_process import PATIENCE_S, AgentProcess, AgentWatch, StartAgent, until

from qmpballoon.lab.broker import LabBroker
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

SIZE = 256 * MIB
BUDGET = 200 * MIB


@pytest.fixture
async def qemu(sockets_dir: Path) -> AsyncIterator[SimulatedQemu]:
    """A simulated QEMU whose guest is idle."""
    machine = MachineSpec(name="web")
    async with SimulatedQemu(sockets_dir / "web.qmp", guest=GuestSpec(size=SIZE), machine=machine) as qemu:
        yield qemu


async def shrinking(start_agent: StartAgent, qemu: SimulatedQemu, broker: LabBroker | None) -> AgentProcess:
    """Start an agent with ``on_exit = "release"`` and wait until it has shrunk the guest."""
    agent = start_agent(
        broker,
        agent={"on_exit": "release"},
        policy={"mode": "auto"},
        host={"budget": BUDGET, "reserve": "16MiB"},
        vm={"qmp_timeout_s": 60},
    )
    await until(lambda: qemu.guest.actual <= BUDGET, what="the guest is shrunk")
    return agent


async def test_ctrl_c_stops_it_cleanly(
    start_agent: StartAgent, qemu: SimulatedQemu, broker: LabBroker, watch: AgentWatch
) -> None:
    agent = await shrinking(start_agent, qemu, broker)
    await watch.until_published("status", b"online")
    agent.program.signal(signal.SIGINT)
    assert await agent.program.ended(timeout_s=PATIENCE_S) == 130
    await until(lambda: qemu.guest.actual == SIZE, what="all is given back")
    await watch.until_last("status", b"offline")
    assert agent.logged("why=on-exit")
    assert not agent.logged("now=offline")
    assert "agent-stopped" in agent.log.read_text().splitlines()[-1]


async def test_a_second_ctrl_c_ends_it_at_once(start_agent: StartAgent, qemu: SimulatedQemu) -> None:
    agent = await shrinking(start_agent, qemu, None)
    qemu.faults.silent_to = frozenset({"balloon"})  # the release then takes a minute to fail
    agent.program.signal(signal.SIGINT)
    await agent.until_logged("agent-stopping")
    agent.program.signal(signal.SIGINT)
    # a shell reports 130 for it, too
    assert await agent.program.ended(timeout_s=PATIENCE_S / 2) == -signal.SIGINT
    assert not agent.logged("agent-stopped")


async def test_ctrl_c_is_ignored_if_a_shell_started_the_agent_in_the_background(
    start_agent: StartAgent, qemu: SimulatedQemu
) -> None:
    command = ("sh", "-c", 'trap "" INT; exec "$0" "$@"')
    agent = start_agent(None, before=command)
    await agent.until_logged("vm-online")
    agent.program.signal(signal.SIGINT)
    agent.reload()
    await agent.until_logged("reloaded")
    assert await agent.terminate() == 0
