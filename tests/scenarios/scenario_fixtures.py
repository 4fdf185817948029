"""Fixtures of many scenarios: simulated QEMUs, and an agent over them; modules may have another."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from agent_harness import AgentHarness, Qemus, qemus_in, running_agent


@pytest.fixture
async def qemus(sockets_dir: Path) -> AsyncIterator[Qemus]:
    """No QEMU yet; those that a test starts end with it."""
    async with qemus_in(sockets_dir) as started:
        yield started


@pytest.fixture
async def harness(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[AgentHarness]:
    """An agent without a governor, in which the VM ``a`` is ok."""
    await qemus.start("a")
    async with running_agent(sockets_dir, monkeypatch) as ready:
        await ready.until_health("a", "ok")
        yield ready
