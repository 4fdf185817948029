"""When the retained topics are reported that a later run may have to clear."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from qmpballoon.mqtt import announced as announced_module
from qmpballoon.mqtt.announced import Announced

PATIENCE_S = 20.0


class Reports:
    """Notes how many topics each report had, and takes as long as the test wants."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.came = asyncio.Event()
        self.may_end = asyncio.Event()
        self.may_end.set()

    async def __call__(self, topics: frozenset[str]) -> None:
        self.sizes.append(len(topics))
        self.came.set()
        await self.may_end.wait()

    async def until(self, size: int) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while self.sizes[-1:] != [size]:
                self.came.clear()
                await self.came.wait()


@asynccontextmanager
async def reporting(reports: Reports) -> AsyncIterator[tuple[Announced, asyncio.Event]]:
    announced, reported = Announced(["old"], reports), asyncio.Event()
    running = asyncio.create_task(announced.run(reported.set))
    try:
        yield announced, reported
    finally:
        running.cancel()
        await asyncio.wait((running,))


async def test_topics_that_come_together_are_one_report() -> None:
    reports = Reports()
    async with reporting(reports) as (announced, reported):
        for number in range(100):
            announced.add(f"vm/{number}")
        assert announced.has_new
        await reports.until(101)
        await asyncio.wait_for(reported.wait(), PATIENCE_S)
        assert (reports.sizes, announced.has_new) == ([101], False)


async def test_a_topic_that_comes_during_a_report_is_not_reported_yet() -> None:
    reports = Reports()
    async with reporting(reports) as (announced, reported):
        reports.may_end.clear()
        announced.add("a")
        await reports.until(2)
        announced.add("b")
        reports.may_end.set()
        await asyncio.wait_for(reported.wait(), PATIENCE_S)
        assert announced.has_new
        await reports.until(3)
        assert reports.sizes == [2, 3]


async def test_what_waited_for_its_report_when_a_connection_was_lost_is_reported_on_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reports = Reports()
    announced, reported = Announced([], reports), asyncio.Event()
    with monkeypatch.context() as long:
        long.setattr(announced_module, "QUIET_S", 1000.0)
        long.setattr(announced_module, "INTERVAL_S", 1000.0)
        lost = asyncio.create_task(announced.run(reported.set))
        announced.add("a")
        while announced._changed.is_set():
            await asyncio.sleep(0)
        lost.cancel()
        await asyncio.wait((lost,))
    assert (reports.sizes, announced.has_new) == ([], True)
    running = asyncio.create_task(announced.run(reported.set))
    await asyncio.wait_for(reported.wait(), PATIENCE_S)
    assert (reports.sizes, announced.has_new) == ([1], False)
    running.cancel()
    await asyncio.wait((running,))


async def test_topics_that_never_cease_to_come_are_reported_all_the_same() -> None:
    reports = Reports()
    async with reporting(reports) as (announced, _):

        async def keep_coming() -> None:
            number = 0
            while not reports.sizes:
                announced.add(f"vm/{(number := number + 1)}")
                await asyncio.sleep(0)

        await asyncio.wait_for(keep_coming(), PATIENCE_S)
        assert reports.sizes[0] > 2  # with the old one: many in one report


async def test_topics_that_come_one_by_one_are_reported_in_ever_longer_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(announced_module, "QUIET_S", 300.0)
    monkeypatch.setattr(announced_module, "INTERVAL_S", 1000.0)
    waited: list[float] = []
    reports = Reports()
    announced = Announced([], reports)

    async def quiet_at_once(quiet_s: float) -> bool:
        announced._changed.clear()
        waited.append(quiet_s)
        return True

    announced._until_quiet = quiet_at_once  # type: ignore[method-assign]
    running = asyncio.create_task(announced.run(lambda: None))
    for number in range(1, 5):
        announced.add(str(number))
        await reports.until(number)
    running.cancel()
    await asyncio.wait((running,))
    assert waited == [300.0, 600.0, 1000.0, 1000.0]
