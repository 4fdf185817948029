"""What the agent's parts share: configuration, store, feed, ticks, wheel, clock, sockets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from qmpballoon.agent.feed import Feed
from qmpballoon.agent.store import Store
from qmpballoon.agent.wheel import Wheel
from qmpballoon.config import Configuration
from qmpballoon.policy.schedule import CALM_TICK_S, TickSchedule
from qmpballoon.qmp.monitor import SocketTables


class TickSignal:
    """Wakes the governor when the schedule says so, or when a tick is requested before it is due."""

    def __init__(self) -> None:
        self._schedule = TickSchedule(time.monotonic, calm_s=CALM_TICK_S)
        self._asked = asyncio.Event()

    @property
    def calm_s(self) -> float:
        """Seconds between ticks when no tick is requested."""
        return self._schedule.calm_s

    def rests(self, *, is_at_rest: bool) -> None:
        """Note whether the tick that was done moved no guest; see `TickSchedule.rests`."""
        self._schedule.rests = is_at_rest

    def soon(self, *, little: bool = False) -> None:
        """Request a tick soon, because something changed; ``little`` as in `TickSchedule.ask`."""
        if self._schedule.ask(little=little):
            self._asked.set()

    def at_once(self) -> None:
        """Request a tick at once: a guest may be about to run out of memory."""
        if self._schedule.ask_urgently():
            self._asked.set()

    @contextmanager
    def tick(self) -> Iterator[None]:
        """Measure the tick that the body does; it serves all requests made before it."""
        self._schedule.began()
        spent_s = time.thread_time()
        try:
            yield
        finally:
            self._schedule.ended(time.thread_time() - spent_s)

    async def due(self) -> None:
        """Wait until the next tick is due; other tasks run at least once."""
        await asyncio.sleep(0)
        while (pause_s := self._schedule.pause_s) > 0:
            self._asked.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._asked.wait()


@dataclass(slots=True, eq=False)
class Context:
    """``configuration`` is what is in force: a reload replaces it. ``clock`` is monotonic."""

    configuration: Configuration
    store: Store
    feed: Feed = field(default_factory=Feed)
    ticks: TickSignal = field(default_factory=TickSignal)
    wheel: Wheel = field(default_factory=Wheel)
    clock: Callable[[], float] = time.monotonic
    socket_tables: SocketTables = field(default_factory=SocketTables)

    @property
    def policy(self) -> str:
        """The policy in force: chosen by a request, else configured."""
        return self.store.chosen[0] or self.configuration.policy.name

    @property
    def mode(self) -> str:
        """The host's mode in force: chosen by a request, else configured."""
        return self.store.chosen[1] or self.configuration.policy.mode
