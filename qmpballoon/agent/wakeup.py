"""An event for one waiter: a tenth of the memory of asyncio's, and each VM has one."""

from __future__ import annotations

import asyncio


class Wakeup:
    """As `asyncio.Event`, but at most one task may wait at a time."""

    __slots__ = ("_is_set", "_waiter")

    def __init__(self) -> None:
        self._is_set = False
        self._waiter: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Wake the waiter; without one, the next one does not wait."""
        self._is_set = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def clear(self) -> None:
        """Make the next one wait."""
        self._is_set = False

    async def wait(self) -> None:
        """Wait until it is set; return at once if it is."""
        if self._is_set:
            return
        assert self._waiter is None, "somebody waits already"
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None
