"""The wait between two ticks of the agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest
from agent_harness import PATIENCE_S, Qemus, qemus_in, running_agent

from qmpballoon.agent import context as context_module
from qmpballoon.agent.context import TickSignal
from qmpballoon.units import MIB


@pytest.fixture
async def qemus(sockets_dir: Path) -> AsyncIterator[Qemus]:
    async with qemus_in(sockets_dir) as started:
        yield started


@pytest.fixture(autouse=True)
def expensive_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ticks come once an hour, and each cost so much that it is not paid for within that hour."""
    monkeypatch.setattr(context_module, "CALM_TICK_S", 3600.0)
    costs = count(0.0, 1000.0)
    monkeypatch.setattr("time.thread_time", lambda: next(costs))


async def test_after_an_expensive_tick_an_emergency_does_not_wait() -> None:
    signal = TickSignal()
    with signal.tick():
        pass
    waiting = asyncio.create_task(signal.due())
    signal.soon()
    await asyncio.sleep(0)  # it waits now, for an hour
    assert not waiting.done()
    signal.at_once()
    await asyncio.wait_for(waiting, PATIENCE_S)


async def test_who_asks_during_a_tick_or_before_anybody_waits_is_not_forgotten() -> None:
    signal = TickSignal()
    with signal.tick():
        signal.at_once()
    await asyncio.wait_for(signal.due(), PATIENCE_S)
    with signal.tick():
        pass
    signal.at_once()
    await asyncio.wait_for(signal.due(), PATIENCE_S)


async def test_others_run_between_two_ticks_that_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.thread_time", lambda: 0.0)
    signal, ran = TickSignal(), asyncio.Event()
    asyncio.get_running_loop().call_soon(ran.set)
    with signal.tick():
        signal.at_once()
    await signal.due()
    assert ran.is_set()


async def test_a_starving_guest_is_relieved_after_an_expensive_tick(
    qemus: Qemus, sockets_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qemu = await qemus.start("a")
    qemu.execute("balloon", {"value": 128 * MIB})
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").actual == 128 * MIB)
        _, available, _ = qemu.guest.memory()
        qemu.set_demand(available - 10 * MIB)
        await harness.until(lambda: qemu.guest.target > 128 * MIB)
        assert harness.record("a").why == "emergency"
