"""The balloon device, the VM's size, and the guest's figures."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import PATIENCE_S, Line, peer, session_with

from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.model.records import STATISTICS, GuestStats
from qmpballoon.qmp.balloon import (
    MIGRATION,
    BalloonDevice,
    Sampler,
    find_balloon,
    memory_size,
    parse_migrating,
    parse_stats,
    query_actual,
    query_driver,
    query_run_state,
)
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS, QUEUE_STATUS
from qmpballoon.sim.guest import Behaviour, GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB


@asynccontextmanager
async def attached(path: Path, **how: Any) -> AsyncIterator[tuple[SimulatedQemu, Session]]:
    async with SimulatedQemu(path, **how) as qemu, session_with(qemu.path) as session:
        yield qemu, session


@pytest.mark.parametrize(
    "kind",
    [
        "virtio-balloon-pci",
        "virtio-balloon-ccw",
        "virtio-balloon-device",
        "virtio-balloon-pci-transitional",
        "virtio-balloon-pci-non-transitional",
    ],
)
@pytest.mark.parametrize("device_id", ["balloon0", "any other", None])
async def test_the_device_is_found_by_its_kind(kind: str, device_id: str | None, sockets_dir: Path) -> None:
    machine = MachineSpec(device=kind, device_id=device_id)
    async with attached(sockets_dir / "a.qmp", machine=machine) as (qemu, session):
        device = await find_balloon(session)
        assert device.path == qemu.machine.device_path
        assert device.kind == kind
        status = await query_driver(session, device)
        assert status is not None
        assert status.up


async def test_a_vm_without_a_balloon_says_how_to_get_one(sockets_dir: Path) -> None:
    async with attached(sockets_dir / "a.qmp", machine=MachineSpec(device=None)) as (_, session):
        with pytest.raises(NoBalloon, match="-device virtio-balloon-pci"):
            await find_balloon(session)
        with pytest.raises(QmpError) as caught:
            await query_actual(session)
        assert caught.value.error_class == "DeviceNotActive"


async def test_the_size_counts_dimms_and_no_nvdimms(sockets_dir: Path) -> None:
    machine = MachineSpec(dimms=(64 * MIB,), nvdimms=(128 * MIB,))
    guest = GuestSpec(size=256 * MIB)
    async with attached(sockets_dir / "a.qmp", machine=machine, guest=guest) as (qemu, session):
        assert await memory_size(session) == await query_actual(session) == 256 * MIB
        qemu.plug(32 * MIB)
        assert await memory_size(session) == await query_actual(session) == 288 * MIB


@pytest.mark.parametrize(("base", "dimm"), [(0, None), (4096, None), (2**53, 2**53)])
async def test_a_size_that_no_vm_has_is_a_loss(base: int, dimm: int | None, sockets_dir: Path) -> None:
    """Such as of ``-machine none``: a quarter of nothing is no floor."""
    dimms = [] if dimm is None else [{"type": "dimm", "data": {"size": dimm}}]

    async def talk(line: Line) -> None:
        await line.negotiate()
        await line.answer(await line.request(), {"base-memory": base})
        await line.answer(await line.request(), dimms)
        await line.until_the_client_leaves()

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost, match="are not a VM memory size"):
            await memory_size(session)


async def test_run_state_and_migration_are_qmp_words(sockets_dir: Path) -> None:
    async with attached(sockets_dir / "a.qmp") as (qemu, session):
        assert await query_run_state(session) == "running"
        assert not parse_migrating(session, await session.request(*MIGRATION))
        for status, expected in (("active", True), ("postcopy-paused", True), ("completed", False)):
            qemu.set_migration(status)
            assert parse_migrating(session, await session.request(*MIGRATION)) is expected
        qemu.execute("stop", {})
        assert await query_run_state(session) == "paused"


async def test_the_driver_and_what_it_negotiated(sockets_dir: Path) -> None:
    guest = GuestSpec(deflate_on_oom=True, statistics=False)
    async with attached(sockets_dir / "a.qmp", guest=guest) as (qemu, session):
        device = await find_balloon(session)
        status = await query_driver(session, device)
        assert status is not None
        assert "VIRTIO_BALLOON_F_DEFLATE_ON_OOM" in status.features
        assert not status.has_statistics
        qemu.set_behaviour(Behaviour.NO_DRIVER)
        status = await query_driver(session, device)
        assert status is not None
        assert not status.up
        assert not status.features


@pytest.mark.parametrize("version", [(5, 2, 0), (11, 1, 3)])
async def test_a_qemu_that_may_not_be_asked_for_the_driver_is_not(
    version: tuple[int, int, int], sockets_dir: Path
) -> None:
    async with attached(sockets_dir / "a.qmp", machine=MachineSpec(version=version)) as (qemu, session):
        assert await query_driver(session, await find_balloon(session)) is None
        assert not qemu.aborted


async def test_a_refused_driver_query_gives_none(sockets_dir: Path) -> None:
    faults = Faults(refuse=frozenset({DRIVER_STATUS}))
    async with attached(sockets_dir / "a.qmp", faults=faults) as (_, session):
        assert await query_driver(session, await find_balloon(session)) is None


# ── figures ──────────────────────────────────────────────────────────────────────────────────────


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


@pytest.mark.parametrize(
    "answer", [None, [], "text", 1, {"actual": -1}, {"actual": "1"}, {"actual": 2**60}, {}]
)
async def test_an_answer_of_another_shape_is_a_loss(answer: object, sockets_dir: Path) -> None:
    async def talk(line: Line) -> None:
        await line.negotiate()
        while True:
            await line.answer(await line.request(), answer)

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost, match=r"where an? (object|number|list) belongs"):
            await query_actual(session)


# ── the sampler ──────────────────────────────────────────────────────────────────────────────────


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
