"""A bounded wait for a real process."""

from __future__ import annotations

import asyncio
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
    """Call ``probe`` until ``condition`` is true for its answer, and return that answer.

    Raises:
        LabError: not within ``timeout_s``; the message has ``what`` was expected and the last answer.
    """
    answer: T | str = "no answer"
    try:
        async with asyncio.timeout(timeout_s) as limit:
            while True:
                answer = found = await probe()
                if condition(found):
                    return found
                await asyncio.sleep(interval_s)
    except TimeoutError as error:
        if not limit.expired():
            raise  # the probe's own
        raise LabError(f"{what}: not within {timeout_s:g} s; the last answer was {answer!r}") from error
