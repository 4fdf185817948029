"""Blocking calls in threads of their own."""

from __future__ import annotations

import asyncio
import threading

import pytest

from qmpballoon.mqtt.connecting import MOST_THREADS, in_own_thread

PATIENCE_S = 60.0


async def test_what_the_call_raises_is_raised() -> None:
    def refused() -> None:
        raise ConnectionRefusedError("here")

    await in_own_thread(lambda: None, name="returns")
    with pytest.raises(ConnectionRefusedError, match="here"):
        await in_own_thread(refused, name="raises")


async def test_calls_that_were_given_up_are_bounded_and_end_by_themselves() -> None:
    goes_on = threading.Event()
    calls = [
        asyncio.create_task(in_own_thread(goes_on.wait, name=f"stuck {number}"))  # type: ignore[arg-type]
        for number in range(MOST_THREADS)
    ]
    await asyncio.sleep(0)
    for call in calls:
        call.cancel()
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    stuck = [thread for thread in threading.enumerate() if thread.name.startswith("stuck")]
    assert len(stuck) == MOST_THREADS
    assert all(thread.daemon for thread in stuck)
    with pytest.raises(OSError, match="earlier attempts"):
        await in_own_thread(lambda: None, name="one more")
    goes_on.set()
    for thread in stuck:
        thread.join(PATIENCE_S)
    await in_own_thread(lambda: None, name="free again")
