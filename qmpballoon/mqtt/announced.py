"""The retained topics that a later run of the agent may have to clear."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Set
from contextlib import suppress
from typing import Final, TypeAlias

INTERVAL_S: Final = 0.2
QUIET_S: Final = 0.02

Report: TypeAlias = Callable[[frozenset[str]], Awaitable[None]]
"""Keeps the topics, so that a run after a crash knows them; returns when they are kept."""


class Announced:
    """Topics that have, or had, a retained value.

    ``before`` are those of the last run. ``report`` is awaited with all of them before the first message to
    a new one. While topics keep coming, all that is new within INTERVAL_S is reported in one call; the last
    ones are reported when none has come for QUIET_S, or for a few times that if the report before was recent.
    """

    def __init__(self, before: Iterable[str], report: Report | None) -> None:
        self._topics = set(before)
        self._report = report
        self._changed = asyncio.Event()
        self._has_new = False

    @property
    def has_new(self) -> bool:
        """Whether a topic is not reported yet: nothing may be retained until then."""
        return self._has_new

    @property
    def topics(self) -> Set[str]:
        """All of them."""
        return self._topics

    def add(self, topic: str) -> None:
        """Add a topic; it is reported soon."""
        if topic not in self._topics:
            self._topics.add(topic)
            self._has_new = self._report is not None
            self._changed.set()

    def discard(self, topic: str) -> None:
        """Remove a topic that the broker has cleared."""
        self._topics.discard(topic)
        self._changed.set()

    async def run(self, reported: Callable[[], None]) -> None:
        """Report changes, until cancelled, and call ``reported`` after each report."""
        if self._report is None:
            return
        if self._has_new:  # the connection before was lost while they waited
            self._changed.set()
        clock = asyncio.get_running_loop().time
        quiet_s, reported_at_s, was_quiet = QUIET_S, float("-inf"), False
        while True:
            await self._changed.wait()
            # A report has all topics: if they come one by one, and slowly, it is not made for each of them.
            follows_soon = was_quiet and clock() - reported_at_s < INTERVAL_S
            quiet_s = min(INTERVAL_S, 2 * quiet_s) if follows_soon else QUIET_S
            was_quiet = await self._until_quiet(quiet_s)
            topics = frozenset(self._topics)
            await self._report(topics)
            self._has_new = not self._topics <= topics
            reported()
            reported_at_s = clock()

    async def _until_quiet(self, quiet_s: float) -> bool:
        """Wait until nothing has changed for ``quiet_s``; return False if INTERVAL_S passed first."""
        with suppress(TimeoutError):
            async with asyncio.timeout(INTERVAL_S):
                while True:
                    self._changed.clear()
                    try:
                        async with asyncio.timeout(quiet_s):
                            await self._changed.wait()
                    except TimeoutError:
                        return True
        return False
