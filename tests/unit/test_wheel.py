"""The wheel: each member is called when its pause is over, in its turn, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest

from qmpballoon.agent.wheel import MOST_AT_ONCE, SLOT_S, Wheel

PATIENCE_S = 60.0


class Polled:
    """A member that notes when it is called."""

    def __init__(self, called: Callable[[Polled], None]) -> None:
        self._called = called

    def due(self) -> None:
        self._called(self)


class Times:
    """The members in the order of their calls, and the loop's time of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Polled, float]] = []
        self.called = asyncio.Event()

    def member(self) -> Polled:
        return Polled(self._note)

    def _note(self, member: Polled) -> None:
        self.calls.append((member, asyncio.get_running_loop().time()))
        self.called.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while len(self.calls) < count:
                self.called.clear()
                await self.called.wait()


@asynccontextmanager
async def turning() -> AsyncIterator[tuple[Wheel, Times]]:
    wheel = Wheel()
    task = asyncio.create_task(wheel.run())
    try:
        yield wheel, Times()
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_members_are_called_in_the_order_of_their_pauses_and_never_too_early() -> None:
    async with turning() as (wheel, times):
        began_s = asyncio.get_running_loop().time()
        late, soon, at_once = times.member(), times.member(), times.member()
        wheel.put(late, 0.12)
        wheel.put(soon, 0.02)
        wheel.put(at_once, 0.0)
        await times.until(3)
        assert [member for member, _ in times.calls] == [at_once, soon, late]
        assert times.calls[1][1] - began_s >= 0.02
        assert times.calls[2][1] - began_s >= 0.12


async def test_a_new_pause_replaces_the_one_before() -> None:
    async with turning() as (wheel, times):
        moved, other = times.member(), times.member()
        wheel.put(moved, 3600.0)
        wheel.put(other, 0.03)
        wheel.put(moved, 0.01)
        await times.until(2)
        wheel.put(moved, 0.01)
        wheel.put(moved, 3600.0)
        wheel.put(other, 0.03)
        await times.until(3)
        assert [member for member, _ in times.calls] == [moved, other, other]


async def test_a_member_that_is_removed_is_not_called_also_by_one_of_the_same_slot() -> None:
    async with turning() as (wheel, times):
        first, removed, last = times.member(), times.member(), times.member()

        def remove(member: Polled) -> None:
            wheel.remove(removed)
            times._note(member)

        remover = Polled(remove)
        wheel.put(first, 0.01)
        wheel.remove(first)
        for member in (remover, removed):
            wheel.put(member, 0.02)
        wheel.put(last, 0.1)
        await times.until(2)
        assert [member for member, _ in times.calls] == [remover, last]
        wheel.remove(first)  # one that is not there is ignored


async def test_members_with_long_pauses_share_slots() -> None:
    async with turning() as (wheel, times):
        loop = asyncio.get_running_loop()
        start_s = (loop.time() // SLOT_S + 20) * SLOT_S  # a pause that ends within one slot for both
        for _ in range(2):
            wheel.put(times.member(), start_s - loop.time() - SLOT_S / 2)
        assert len(wheel._slots) == 1
        await times.until(2)


async def test_other_tasks_run_between_the_parts_of_a_slot_with_many_members() -> None:
    async with turning() as (wheel, times):
        for _ in range(10 * MOST_AT_ONCE):
            wheel.put(times.member(), 0.0)
        counts = [0]
        async with asyncio.timeout(PATIENCE_S):
            while counts[-1] < 10 * MOST_AT_ONCE:
                await asyncio.sleep(0)
                counts.append(len(times.calls))
        assert max(after - before for before, after in pairwise(counts)) == MOST_AT_ONCE


async def test_lateness_is_told_once() -> None:
    async with turning() as (wheel, times):
        loop = asyncio.get_running_loop()
        wheel.put(times.member(), 0.0)
        began_s = loop.time()
        while loop.time() < began_s + 0.05:  # a loop that is busy
            pass
        await times.until(1)
        assert 0.03 < wheel.lateness_s() < PATIENCE_S
        assert wheel.lateness_s() == 0.0
