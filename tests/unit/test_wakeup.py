"""An event for one waiter."""

from __future__ import annotations

import asyncio

from qmpballoon.agent.wakeup import Wakeup


async def test_a_waiter_is_woken_and_waits_again_after_clear() -> None:
    wakeup, woken = Wakeup(), 0

    async def wait_twice() -> None:
        nonlocal woken
        for _ in range(2):
            await wakeup.wait()
            wakeup.clear()
            woken += 1

    waiting = asyncio.create_task(wait_twice())
    await asyncio.sleep(0)
    for expected in (1, 2):
        wakeup.set()
        wakeup.set()
        for _ in range(5):
            await asyncio.sleep(0)
        assert woken == expected
    await waiting


async def test_nobody_waits_for_what_is_set_and_a_cancelled_waiter_leaves_the_place_to_another() -> None:
    wakeup = Wakeup()
    wakeup.set()
    await wakeup.wait()
    wakeup.clear()
    waiting = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0)
    waiting.cancel()
    await asyncio.wait((waiting,))
    again = asyncio.create_task(wakeup.wait())
    await asyncio.sleep(0)
    assert not again.done()
    wakeup.set()
    await again
