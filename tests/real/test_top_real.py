"""`top` on a real broker with an agent and a guest: seen, steered, and a broker that restarts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from agent_process import MOVED_S, PATIENCE_S, AgentProcess, until
from textual.pilot import Pilot
from top_fleet import screen_text

from qmpballoon.cli.top import explained
from qmpballoon.client import Client
from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import LabGuest
from qmpballoon.top.app import TopApp
from qmpballoon.top.source import BrokerSource
from qmpballoon.units import MIB

StartGuest = Callable[..., Awaitable[LabGuest]]


@pytest.fixture
async def source(broker: LabBroker) -> AsyncIterator[BrokerSource]:
    source = BrokerSource(broker.url, lambda: Client(broker.url, timeout_s=PATIENCE_S))
    task = asyncio.create_task(source.run(), name="source")
    yield source
    task.cancel()
    await asyncio.wait((task,), timeout=PATIENCE_S)
    assert task.cancelled()


async def shown(app: TopApp, pilot: Pilot[None], *texts: str, timeout_s: float = PATIENCE_S) -> str:
    """Wait until all of these are on the screen; return what is there."""

    def text() -> str:
        app.look()
        found = screen_text(app)
        return found if all(text in found for text in texts) else ""

    return await until(text, what=f"{texts} on the screen", timeout_s=timeout_s)


async def test_a_guest_is_seen_and_moved_and_the_broker_may_restart(
    source: BrokerSource,
    broker: LabBroker,
    start_guest: StartGuest,
    start_agent: Callable[..., AgentProcess],
    sockets_dir: Path,
) -> None:
    guest = await start_guest()
    vm = guest.name
    agent = start_agent(broker, policy={"mode": "auto"})
    app = TopApp(source, explained)
    options: dict[str, Any] = {"size": (80, 24), "notifications": True}
    async with app.run_test(**options) as pilot:
        await shown(app, pilot, "edge-7", f" {vm}", "1/1 VMs", "ok")
        await pilot.press("down", "enter")
        await shown(app, pilot, f"edge-7/{vm}", "size 128 MiB", "health ok")
        await pilot.press("t", *"112MiB", "enter")
        await shown(app, pilot, "from 128 MiB to 112 MiB")
        await pilot.press("y")
        await shown(app, pilot, "target 112 MiB is set")
        await shown(app, pilot, "actual 112 MiB", "mode manual", timeout_s=MOVED_S)
        await pilot.press("m", "home", "enter", "y")
        await shown(app, pilot, "mode auto")
        await pilot.press("escape")
        await broker.kill()
        await shown(app, pilot, "NOT CONNECTED", f" {vm}")
        await broker.restart()
        await until(lambda: source.problem is None, what="connected again")
        await shown(app, pilot, "1/1 VMs", f" {vm}")
        assert "NOT CONNECTED" not in screen_text(app)
        assert await agent.terminate() == 0
        await shown(app, pilot, "its agent is not connected", "offline")
        assert source.vms[f"edge-7/{vm}"].size == 128 * MIB
