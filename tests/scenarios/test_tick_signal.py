"""The wait between two ticks of the agent."""

from __future__ import annotations

import asyncio
from itertools import count
from pathlib import Path

import pytest
from agent_harness import Qemus, running_agent

from qmpballoon.agent import context as context_module
from qmpballoon.agent.context import TickSignal
from qmpballoon.policy.schedule import SHORTEST_TICK_S
from qmpballoon.units import MIB

TURNS = 20  # of the event loop, more than a wait that is over needs to return


class Clocks:
    """The module ``time`` for a tick signal: each tick costs 1000 s of processor time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._costs = count(0.0, 1000.0)

    def monotonic(self) -> float:
        return self.now_s

    def thread_time(self) -> float:
        return next(self._costs)


@pytest.fixture(autouse=True)
def calm_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ticks come once an hour."""
    monkeypatch.setattr(context_module, "CALM_TICK_S", 3600.0)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    clocks = Clocks()
    monkeypatch.setattr(context_module, "time", clocks)
    return clocks


async def is_due(waiting: asyncio.Task[None]) -> bool:
    """Tell whether a wait for the next tick has returned, after some turns of the event loop."""
    for _ in range(TURNS):
        await asyncio.sleep(0)
    return waiting.done()


async def test_after_an_expensive_tick_an_emergency_does_not_wait(clocks: Clocks) -> None:
    signal = TickSignal()
    with signal.tick():
        pass
    waiting = asyncio.create_task(signal.due())
    signal.soon()
    clocks.now_s = SHORTEST_TICK_S
    assert not await is_due(waiting)
    signal.at_once()
    assert await is_due(waiting)


async def test_a_request_during_a_tick_or_before_the_wait_is_not_lost(clocks: Clocks) -> None:
    signal = TickSignal()
    with signal.tick():
        signal.at_once()
    clocks.now_s += SHORTEST_TICK_S
    assert await is_due(asyncio.create_task(signal.due()))
    with signal.tick():
        pass
    signal.at_once()
    clocks.now_s += SHORTEST_TICK_S
    assert await is_due(asyncio.create_task(signal.due()))


async def test_other_tasks_run_between_two_ticks_that_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
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
    costs = count(0.0, 1000.0)
    monkeypatch.setattr("time.thread_time", lambda: next(costs))
    qemu = await qemus.start("a")
    qemu.execute("balloon", {"value": 128 * MIB})
    async with running_agent(sockets_dir, monkeypatch, governed=True) as harness:
        await harness.until_health("a", "ok")
        await harness.until(lambda: harness.record("a").actual == 128 * MIB)
        _, available, _ = qemu.guest.memory()
        qemu.set_demand(available - 10 * MIB)
        await harness.until(lambda: qemu.guest.target > 128 * MIB)
        assert harness.record("a").why == "emergency"
