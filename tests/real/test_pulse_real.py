"""``pulse`` on real guests: the host has the pages that a workload freed, and the guest keeps its memory."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from contextlib import suppress

import pytest
from agent_process import PATIENCE_S, AgentProcess, StartAgent

from qmpballoon.cli import main
from qmpballoon.control import find_agents
from qmpballoon.errors import Unreachable
from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.lab import Lab
from qmpballoon.procfs import rss_of
from qmpballoon.units import MIB

Capture = pytest.CaptureFixture[str]
MEMORY = 256 * MIB
FREED = 90 * MIB
WAIT_S = 180.0  # for what takes some seconds on an idle machine


async def command(*argv: str) -> int:
    async with asyncio.timeout(WAIT_S):
        return await asyncio.to_thread(main, argv)


async def after_a_workload(lab: Lab) -> LabGuest:
    """Return a guest whose workload held memory and has freed it; QEMU still has the pages."""
    guest = await lab.guest("web", memory=MEMORY)
    before = rss_of(guest.pid) or 0
    await guest.command("hold 130")
    await guest.command("hold 20")
    assert (rss_of(guest.pid) or 0) - before > FREED, "QEMU holds what the guest has freed"
    return guest


async def control_of(agent: AgentProcess) -> str:
    """Return the agent's control socket when the agent knows a VM."""
    path = str(agent.state_dir / "agent.sock")
    async with asyncio.timeout(WAIT_S):
        while True:
            with suppress(Unreachable):
                if (await find_agents(path)).running[0].vms:
                    return path
            await asyncio.sleep(0.05)


async def test_the_host_has_freed_memory_again_and_the_guest_its_size(lab: Lab, capsys: Capture) -> None:
    guest = await after_a_workload(lab)
    before = rss_of(guest.pid) or 0
    assert await command("pulse", "--control=", str(guest.socket), "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["freed"] > FREED - 10 * MIB
    assert before - (rss_of(guest.pid) or 0) > FREED - 20 * MIB
    await guest.monitor.until_actual(MEMORY.__eq__, timeout_s=PATIENCE_S, what="all of it is back")
    memory = await guest.guest_memory()
    assert (memory.held, memory.oom_kills) == (20 * MIB, 0)
    await guest.command("hold 130")  # it can use what it was given back


async def test_an_interrupted_one_is_undone(lab: Lab) -> None:
    guest = await after_a_workload(lab)
    running = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "qmpballoon", "pulse", "--control=", str(guest.socket))
    )
    try:
        await guest.monitor.until_actual(
            lambda actual: actual < MEMORY, timeout_s=PATIENCE_S, what="it gives memory"
        )
        running.send_signal(signal.SIGTERM)
        async with asyncio.timeout(WAIT_S):
            assert await running.wait() in (0, 143)  # a fast machine may have finished
    finally:
        if running.returncode is None:
            running.kill()
            await running.wait()
    await guest.monitor.until_actual(MEMORY.__eq__, timeout_s=PATIENCE_S, what="all of it is back")


async def test_through_an_agent_it_stays_under_its_policy(
    lab: Lab, start_agent: StartAgent, capsys: Capture
) -> None:
    guest = await after_a_workload(lab)
    agent = start_agent(None, policy={"mode": "auto"})
    control = await control_of(agent)
    assert await command("wait", f"--control={control}", "web", "ready") == 0
    before = await guest.monitor.actual()
    capsys.readouterr()
    assert await command("pulse", f"--control={control}", "web", "--json") == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["freed"] > FREED - 10 * MIB
    assert abs(await guest.monitor.actual() - before) <= MIB
    assert await command("why", f"--control={control}", "web") == 0
    printed = capsys.readouterr().out
    assert "auto by fairshare" in printed
    assert printed.count("(pulse)") == 2


async def test_it_is_undone_when_the_agent_is_terminated(lab: Lab, start_agent: StartAgent) -> None:
    guest = await after_a_workload(lab)
    agent = start_agent(None, policy={"mode": "auto"})
    control = await control_of(agent)
    assert await command("wait", f"--control={control}", "web", "ready") == 0
    before = await guest.monitor.actual()
    pulse = asyncio.create_task(command("pulse", f"--control={control}", "web"))
    await guest.monitor.until_actual(
        lambda actual: actual < before - MIB, timeout_s=PATIENCE_S, what="it gives memory"
    )
    await agent.terminate()
    await guest.monitor.until_actual(
        lambda actual: abs(actual - before) <= MIB, timeout_s=PATIENCE_S, what="all of it is back"
    )
    assert await pulse in (0, 3)  # a fast machine may have finished


async def test_it_is_undone_after_an_agent_that_was_killed(lab: Lab, start_agent: StartAgent) -> None:
    guest = await after_a_workload(lab)
    agent = start_agent(None)
    control = await control_of(agent)
    assert await command("wait", f"--control={control}", "web", "ready") == 0
    before = await guest.monitor.actual()
    pulse = asyncio.create_task(command("pulse", f"--control={control}", "web"))
    await guest.monitor.until_actual(
        lambda actual: actual < before - MIB, timeout_s=PATIENCE_S, what="it gives memory"
    )
    agent.kill()
    await pulse
    agent.start()
    await guest.monitor.until_actual(
        lambda actual: abs(actual - before) <= MIB, timeout_s=PATIENCE_S, what="all of it is back"
    )
