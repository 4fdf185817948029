"""The retained topics that a later run of the agent may have to clear."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Set
from typing import Final, TypeAlias

INTERVAL_S: Final = 0.2

Report: TypeAlias = Callable[[frozenset[str]], Awaitable[None]]
"""Keeps the topics, so that a run after a crash knows them; returns when they are kept."""


class Announced:
    """Topics that have, or had, a retained value.

    ``before`` are those of the last run. ``report`` is awaited with all of them before the first message to
    a new one. All that is new within INTERVAL_S is reported in one call.
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
        while True:
            await self._changed.wait()
            self._changed.clear()
            topics = frozenset(self._topics)
            await self._report(topics)
            self._has_new = not self._topics <= topics
            reported()
            await asyncio.sleep(INTERVAL_S)
