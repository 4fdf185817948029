"""The balloon device, the VM's size, and the guest's driver."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import Line, peer, session_with

from qmpballoon.errors import ConnectionLost, NoBalloon, QmpError
from qmpballoon.qmp.balloon import (
    MIGRATION,
    find_balloon,
    memory_size,
    parse_migrating,
    query_actual,
    query_driver,
    query_run_state,
)
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.commands import DRIVER_STATUS
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
