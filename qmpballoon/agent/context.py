"""What is made first and shared by the agent's parts: configuration, store, feed, tick signal, clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from qmpballoon.agent.feed import Feed
from qmpballoon.agent.store import Store
from qmpballoon.config import Configuration


class TickSignal:
    """Asks for a tick before it is due; whoever ticks waits on it."""

    def __init__(self) -> None:
        self._soon = asyncio.Event()
        self._urgent = asyncio.Event()

    def soon(self) -> None:
        """Ask for a tick soon, as something happened that should not wait."""
        self._soon.set()

    def at_once(self) -> None:
        """Ask for a tick at once: a guest may be about to run out of memory."""
        self._urgent.set()
        self._soon.set()

    def clear(self) -> None:
        """Forget what was asked for: a tick begins."""
        self._soon.clear()
        self._urgent.clear()

    async def soon_by(self, at_s: float) -> None:
        """Wait until a tick is asked for, or the monotonic clock says ``at_s``."""
        await _set_by(self._soon, at_s)

    async def urgent_by(self, at_s: float) -> None:
        """Wait until a tick is asked for at once, or the monotonic clock says ``at_s``."""
        await _set_by(self._urgent, at_s)


async def _set_by(event: asyncio.Event, at_s: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(max(0.0, at_s - time.monotonic())):
            await event.wait()


@dataclass(slots=True, eq=False)
class Context:
    """``configuration`` is what is in force: a reload replaces it. ``clock`` is monotonic."""

    configuration: Configuration
    store: Store
    feed: Feed = field(default_factory=Feed)
    ticks: TickSignal = field(default_factory=TickSignal)
    clock: Callable[[], float] = time.monotonic

    @property
    def policy(self) -> str:
        """The policy in force: chosen by a request, else configured."""
        return self.store.chosen[0] or self.configuration.policy.name

    @property
    def mode(self) -> str:
        """The host's mode in force: chosen by a request, else configured."""
        return self.store.chosen[1] or self.configuration.policy.mode
