"""A guest's statistics, and when a sample of them is new."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import PATIENCE_S, Line, peer, session_with

from qmpballoon.model.records import STATISTICS, GuestStats
from qmpballoon.qmp.balloon import (
    BalloonDevice,
)
from qmpballoon.qmp.commands import QUEUE_STATUS
from qmpballoon.qmp.statistics import Sampler, parse_stats


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, 0),
        (4096, 4096),
        (2**53, 2**53),
        (2**53 + 1, None),
        (2**64 - 1, None),  # not reported
        (2**64, None),
        (-1, None),
        (1.5, None),
        (4096.0, None),
        ("4096", None),
        (True, None),
        (None, None),
        ([1], None),
    ],
)
def test_a_figure_is_a_believable_whole_number_or_none(value: object, expected: int | None) -> None:
    assert parse_stats({"stat-available-memory": value}).available == expected


def test_every_figure_has_its_place() -> None:
    names = {
        "stat-total-memory": "total",
        "stat-free-memory": "free",
        "stat-available-memory": "available",
        "stat-disk-caches": "caches",
        "stat-swap-in": "swap_in",
        "stat-swap-out": "swap_out",
        "stat-major-faults": "major_faults",
        "stat-minor-faults": "minor_faults",
        "stat-htlb-pgalloc": "hugetlb_allocs",
        "stat-htlb-pgfail": "hugetlb_failures",
        "stat-oom-kills": "oom_kills",
        "stat-alloc-stalls": "alloc_stalls",
        "stat-async-scans": "async_scans",
        "stat-direct-scans": "direct_scans",
        "stat-async-reclaims": "async_reclaims",
        "stat-direct-reclaims": "direct_reclaims",
    }
    assert sorted(names.values()) == sorted(STATISTICS)
    figures = parse_stats({key: number for number, key in enumerate(names)} | {"stat-of-tomorrow": 1})
    assert {name: getattr(figures, name) for name in names.values()} == {
        name: number for number, name in enumerate(names.values())
    }
    assert parse_stats({}) == GuestStats()


class ScriptedStats:
    """A device whose statistics the test sets; it notes what the interval was set to."""

    def __init__(self, interval_s: object = 0) -> None:
        self.interval_s = interval_s
        self.set_to: list[object] = []
        self.answer: Mapping[str, object] = {"last-update": 0, "stats": {}}
        self.asked = asyncio.Event()
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.fresh: list[int] = []  # figures of "available" that come, one each time it is armed
        self.is_calm = False  # figures that are the same come as well; otherwise they stand for none
        self.queue: dict[str, object] = {"last-avail-idx": 1}

    def report(self, last_update: int, available: int) -> None:
        self.answer = {"last-update": last_update, "stats": {"stat-available-memory": available}}

    async def talk(self, line: Line) -> None:
        await line.negotiate()
        while True:
            request = await line.request()
            self.asked.set()
            await self.may_answer.wait()
            arguments = request["arguments"]
            if request["execute"] == "qom-set":
                self.interval_s = arguments["value"]
                self.set_to.append(arguments["value"])
                if arguments["value"] and self.fresh:
                    before = self.answer
                    self.report(100, self.fresh.pop(0))
                    taken = self.queue["last-avail-idx"]
                    if isinstance(taken, int) and (self.is_calm or self.answer != before):
                        self.queue = {"last-avail-idx": (taken + 1) % 2**16}
                await line.answer(request, {})
            elif request["execute"] == QUEUE_STATUS:
                await line.answer(request, self.queue)
            elif arguments["property"] == "guest-stats":
                await line.answer(request, self.answer)
            else:
                await line.answer(request, self.interval_s)


@asynccontextmanager
async def sampling(path: Path, device: ScriptedStats, clock: Any = time.monotonic) -> AsyncIterator[Sampler]:
    async with peer(path, device.talk), session_with(path) as session:
        yield Sampler(session, BalloonDevice("/machine/peripheral/b", "virtio-balloon-pci"), clock=clock)


async def test_figures_from_before_the_connection_are_not_a_sample(sockets_dir: Path) -> None:
    device = ScriptedStats()
    device.report(1000, 5)
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        await sampler.poll()
        assert sampler.sample is None
        assert sampler.ever_reported
        assert device.set_to == [2]


@pytest.mark.parametrize(("found_s", "set_to"), [(0, [2]), (5, [2, 0, 2]), (2, [2, 0, 2])])
async def test_what_is_asked_to_start_asks_the_guest_at_once_whatever_interval_was_found(
    sockets_dir: Path, found_s: int, set_to: list[int]
) -> None:
    device = ScriptedStats(found_s)
    device.report(1000, 5)
    async with peer(sockets_dir / "a.qmp", device.talk), session_with(sockets_dir / "a.qmp") as session:
        sampler = Sampler(session, BalloonDevice("/machine/peripheral/b", "virtio-balloon-pci"))
        await sampler.started(await session.request_all(*sampler.asked_to_start(2)), 2)
        assert device.set_to == set_to  # QEMU asks the guest when the interval was 0 before
        assert (sampler.found_s, sampler.is_armed_with(2)) == (found_s, True)
        assert sampler.is_first_awaited
        assert sampler.ever_reported


async def test_the_first_sample_is_awaited_for_a_second_after_the_guest_was_asked(sockets_dir: Path) -> None:
    now_s = 10.0
    device = ScriptedStats()
    async with sampling(sockets_dir / "a.qmp", device, lambda: now_s) as sampler:
        assert not sampler.is_first_awaited
        await sampler.start(2)
        now_s = 10.9
        assert sampler.is_first_awaited
        now_s = 11.0
        assert not sampler.is_first_awaited
        await sampler.rearm()
        assert sampler.is_first_awaited
        device.report(1000, 5)
        await sampler.poll()
        assert sampler.sample is not None
        assert not sampler.is_first_awaited


async def test_a_guest_that_never_reported_is_known_as_such(sockets_dir: Path) -> None:
    async with sampling(sockets_dir / "a.qmp", ScriptedStats()) as sampler:
        assert not sampler.ever_reported
        await sampler.start(2)
        await sampler.poll()
        assert not sampler.ever_reported


async def test_a_sample_is_new_when_its_figures_or_its_second_changed(sockets_dir: Path) -> None:
    now_s = 10.0
    device = ScriptedStats()
    device.report(1000, 5)
    async with sampling(sockets_dir / "a.qmp", device, lambda: now_s) as sampler:
        await sampler.start(2)
        device.report(1000, 6)
        await sampler.poll()
        assert sampler.sample is not None
        assert sampler.sample.stats.available == 6
        now_s = 12.5
        await sampler.poll()
        assert sampler.sample.aged(now_s).age_s == 2.5
        device.report(1001, 6)
        await sampler.poll()
        assert sampler.sample.aged(now_s).age_s == 0.0


async def test_the_clock_of_the_guests_host_is_never_subtracted(sockets_dir: Path) -> None:
    """``last-update`` may jump back, when the wall clock is set: that is a change like any other."""
    device = ScriptedStats()
    device.report(1000, 5)
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        device.report(3, 5)
        await sampler.poll()
        assert sampler.sample is not None


async def test_after_a_reset_old_figures_count_no_more(sockets_dir: Path) -> None:
    device = ScriptedStats()
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        device.report(1000, 5)
        await sampler.poll()
        assert sampler.sample is not None
        sampler.forget()
        await sampler.poll()
        assert sampler.sample is None
        device.report(1010, 7)
        await sampler.poll()
        assert sampler.sample is not None
        assert sampler.sample.stats.available == 7


async def test_figures_that_came_before_a_reset_and_are_read_after_it_are_old(sockets_dir: Path) -> None:
    device = ScriptedStats()
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        device.report(1000, 5)
        await sampler.poll()
        device.report(1001, 6)  # nobody looks
        sampler.forget()
        for _ in range(2):
            await sampler.poll()
            assert sampler.sample is None
        device.report(1010, 7)
        await sampler.poll()
        assert sampler.sample is not None
        assert sampler.sample.stats.available == 7


async def test_figures_that_were_asked_for_before_a_reset_prove_nothing(sockets_dir: Path) -> None:
    device = ScriptedStats()
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        device.report(1000, 5)
        device.asked.clear()
        device.may_answer.clear()
        asked = asyncio.create_task(sampler.poll(), name="a look")
        await device.asked.wait()
        sampler.forget()
        device.may_answer.set()
        await asked
        assert sampler.sample is None
        device.report(1001, 6)  # it came before the reset, too, as far as anybody can tell
        await sampler.poll()
        assert sampler.sample is None
        device.report(1010, 7)
        await sampler.poll()
        assert sampler.sample is not None
        assert sampler.sample.stats.available == 7


async def test_an_interval_that_is_armed_already_is_armed_anew_to_be_asked_now(sockets_dir: Path) -> None:
    """Setting the value that is there asks nothing: the 0 between is needed."""
    device = ScriptedStats(interval_s=2)
    device.report(1000, 5)
    device.fresh = [9]
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        assert device.set_to == [0, 2]
        await sampler.poll()
        assert sampler.sample is not None
        await sampler.stop()
        assert device.interval_s == 2


async def test_fresh_figures_are_asked_for_again_when_none_came(sockets_dir: Path) -> None:
    device = ScriptedStats()
    device.fresh = [5, 5, 5, 7]  # the guest had not handed its buffer back twice
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        await sampler.poll()
        assert await sampler.refresh(timeout_s=PATIENCE_S)
        assert sampler.sample is not None
        assert sampler.sample.stats.available == 7
        assert device.set_to[:5] == [2, 0, 2, 0, 2]
        assert device.interval_s == 2


@pytest.mark.parametrize("taken", [1, 2**16 - 3])
async def test_figures_of_a_calm_guest_that_come_again_are_known_by_the_count_of_samples(
    taken: int, sockets_dir: Path
) -> None:
    device = ScriptedStats()
    device.fresh, device.is_calm, device.queue = [5] * 9, True, {"last-avail-idx": taken}
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        await sampler.poll()
        assert sampler.sample is not None
        before_s = sampler.sample.seen_at_s
        assert await sampler.refresh(timeout_s=PATIENCE_S)
        assert sampler.sample.seen_at_s > before_s
        assert (sampler.sample.stats.available, len(device.fresh)) == (5, 6)


@pytest.mark.parametrize("told", [{}, {"last-avail-idx": "7"}, {"last-avail-idx": None}])
async def test_where_the_count_of_samples_is_not_told_the_same_figures_are_no_new_ones(
    told: dict[str, object], sockets_dir: Path
) -> None:
    device = ScriptedStats()
    device.fresh, device.queue = [5] * 9, {"last-avail-idx": None, **told}
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.start(2)
        await sampler.poll()
        assert not await sampler.refresh(timeout_s=0.1)


async def test_a_silent_guest_is_waited_for_until_the_timeout(sockets_dir: Path) -> None:
    async with sampling(sockets_dir / "a.qmp", ScriptedStats()) as sampler:
        await sampler.start(2)
        assert not await sampler.refresh(timeout_s=0.03)
        assert sampler.sample is None


@pytest.mark.parametrize("found", [0, 7])
async def test_the_interval_is_left_as_it_was_found(found: int, sockets_dir: Path) -> None:
    device = ScriptedStats(interval_s=found)
    async with sampling(sockets_dir / "a.qmp", device) as sampler:
        await sampler.stop()
        assert device.set_to == []  # nothing was begun
        await sampler.start(2)
        assert device.interval_s == 2
        await sampler.stop()
        assert device.interval_s == found


@pytest.mark.parametrize("found", [0, 1])
@pytest.mark.parametrize("after", range(1, 8))
async def test_the_interval_is_left_as_it_was_found_also_after_a_cancelled_call(
    found: int, after: int, sockets_dir: Path
) -> None:
    """Cancelled with the n-th request on its way: what QEMU made of it is not known."""
    device = ScriptedStats(interval_s=found)
    device.fresh = list(range(1, 20))
    async with sampling(sockets_dir / "a.qmp", device) as sampler:

        async def sample() -> None:
            await sampler.start(1)
            await sampler.refresh(timeout_s=PATIENCE_S)

        sent = 0
        session_request = sampler._session.request

        async def counted(*arguments: Any, **options: Any) -> object:
            nonlocal sent
            sent += 1
            if sent == after:
                asyncio.get_running_loop().call_soon(calling.cancel)
            return await session_request(*arguments, **options)

        sampler._session.request = counted  # type: ignore[method-assign]
        calling = asyncio.create_task(sample())
        await asyncio.wait((calling,))
        await sampler.stop()
        assert device.interval_s == found
