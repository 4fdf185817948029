"""One bounded wait for what a real process does in its own time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from qmpballoon.lab.require import LabError

T = TypeVar("T")


async def eventually(
    probe: Callable[[], Awaitable[T]],
    condition: Callable[[T], bool],
    *,
    timeout_s: float,
    what: str,
    interval_s: float = 0.02,
) -> T:
    """Ask ``probe`` until ``condition`` holds for its answer, and return that answer.

    Raises:
        LabError: not within ``timeout_s``; the message has ``what`` was expected and the last answer.
    """
    deadline = time.monotonic() + timeout_s
    answer: T | str = "no answer"
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                answer = found = await probe()
                if condition(found):
                    return found
                await asyncio.sleep(interval_s)
    except TimeoutError as error:
        if time.monotonic() < deadline:
            raise  # the probe's own
        raise LabError(f"{what}: not within {timeout_s:g} s; the last answer was {answer!r}") from error
