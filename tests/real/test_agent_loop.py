"""The agent on uvloop, and where uvloop cannot be used on asyncio's own loop."""

from __future__ import annotations

from pathlib import Path

import pytest
from agent_process import AgentWatch, StartAgent

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.lab import Lab
from qmpballoon.units import MIB


async def test_uvloop_is_used_where_it_is_installed(
    broker: LabBroker, watch: AgentWatch, start_agent: StartAgent
) -> None:
    agent = start_agent(broker)
    await watch.until_published("status", b"online")
    assert agent.logged("asyncio-loop") == []
    assert await agent.terminate() == 0


@pytest.mark.parametrize(
    "failure",
    [
        'ImportError("no wheel")',
        'AttributeError("of another Python")',
        'DeprecationWarning("of another Python")',
        'OSError("no such library")',
        'SystemError("not initialised")',
    ],
)
async def test_without_uvloop_the_agent_runs_on_asyncio_and_logs_it_once(
    lab: Lab,
    broker: LabBroker,
    watch: AgentWatch,
    start_agent: StartAgent,
    sockets_dir: Path,
    failure: str,
) -> None:
    (sockets_dir / "uvloop.py").write_text(f"raise {failure}\n")
    guest = await lab.guest("web")
    agent = start_agent(broker, before=("env", f"PYTHONPATH={sockets_dir}"))
    await watch.until_health("web", "ok")
    await watch.moved("web", guest, 112 * MIB)
    assert await agent.terminate() == 0
    (line,) = agent.logged("asyncio-loop")
    assert failure.split('"')[1] in line
