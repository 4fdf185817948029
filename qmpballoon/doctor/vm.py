"""Gathers the facts about a VM: over its session, and of its QEMU's process. Nothing is changed.

Statistics are read as they are. Whether they are fresh is known to the caller, which has them polled.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Final

from qmpballoon.doctor.facts import Backend, Balloon, ExaminedVm, Feature, Process
from qmpballoon.errors import NoBalloon, QmpError
from qmpballoon.model.records import GuestStats
from qmpballoon.procfs import age_of, life_of, parse_meminfo, text_of
from qmpballoon.qmp import balloon
from qmpballoon.qmp.client import Session
from qmpballoon.qmp.monitor import holders_of
from qmpballoon.qmp.statistics import parse_statistics
from qmpballoon.units import MAX_SIZE

_PERIPHERALS: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_PINNING: Final = ("vfio-", "vhost-vdpa")  # beginnings of the types of devices for which QEMU frees nothing
_NOT_PINNING: Final = ("vfio-ap", "vfio-ccw")
_MOST_LISTED: Final = 64  # devices and backends of one VM; a QEMU may claim any number


async def examine(
    session: Session, *, name: str, pid: int | None, is_fresh: bool, proc: str = "/proc"
) -> ExaminedVm:
    """Return what QEMU tells about a VM, and the kernel about its process.

    ``is_fresh``: the guest's statistics are of now. ``proc`` is where procfs is mounted.

    Raises:
        QmpError: QEMU refused what every VM is asked.
        ConnectionLost: the session ended meanwhile.
    """
    vm = ExaminedVm(
        name=name,
        socket=session.path,
        pid=pid,
        qemu=session.version,
        is_pretty=session.is_pretty,
        run_state=await balloon.query_run_state(session),
        size=await balloon.memory_size(session),
        balloon=await _balloon(session, is_fresh=is_fresh),
        backends=await _backends(session, pid, proc),
        passed_through=await _passed_through(session),
        host_memory=parse_meminfo(text_of(f"{proc}/meminfo")).get("MemTotal"),
    )
    return vm if pid is None else _with_process(vm, pid, proc)


async def holding_processes(path: str, proc: str = "/proc") -> tuple[Process, ...]:
    """Return the processes that hold a monitor, as far as the kernel lets this process see them."""
    return await asyncio.to_thread(lambda: processes_with(holders_of(path), proc))


def processes_with(inodes: Collection[int], proc: str = "/proc") -> tuple[Process, ...]:
    """Return a process for each of these sockets (inodes of sockfs) that has it open."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    holding: list[Process] = []
    for pid in sorted(int(each) for each in os.listdir(proc) if each.isdecimal()) if wanted else ():
        opened = wanted & _opened(f"{proc}/{pid}/fd")
        if opened:
            wanted -= opened
            holding.append(Process(pid, text_of(f"{proc}/{pid}/comm").strip() or "?"))
        if not wanted:
            break
    return tuple(holding)


def _opened(descriptors: str) -> set[str]:
    """Return what the descriptors of a process are; empty for a process of another user."""
    found = set()
    try:
        for each in os.listdir(descriptors):
            found.add(os.readlink(f"{descriptors}/{each}"))
    except OSError:  # it has ended, or closed one meanwhile
        pass
    return found


async def _balloon(session: Session, *, is_fresh: bool) -> Balloon | None:
    try:
        device = await balloon.find_balloon(session)
    except NoBalloon:
        return None
    status = await balloon.query_driver(session, device)
    taken = status.features if status is not None and status.up else None
    reporting = await _property(session, device.path, "free-page-reporting")
    last_update, stats = 0, GuestStats()
    try:
        answer = await session.request("qom-get", {"path": device.path, "property": "guest-stats"})
        last_update, stats = parse_statistics(session, answer)
    except QmpError:  # QEMU before 1.5
        pass
    return Balloon(
        kind=device.kind,
        path=device.path,
        driver=None if status is None else status.up,
        deflate_on_oom=Feature(
            await balloon.offers_deflate_on_oom(session, device),
            None if taken is None else balloon.DEFLATE_ON_OOM in taken,
        ),
        free_page_reporting=Feature(
            reporting if isinstance(reporting, bool) else None,
            None if taken is None else balloon.FREE_PAGE_REPORTING in taken,
        ),
        has_statistics_queue=None if taken is None else balloon.STATS_QUEUE in taken,
        has_reported=last_update != 0,
        has_figures=stats != GuestStats(),
        is_fresh=is_fresh,
        swapped_out=stats.swap_out,
    )


async def _backends(session: Session, pid: int | None, proc: str) -> tuple[Backend, ...]:
    try:
        rows = _rows(await session.request("query-memdev"))
        kinds = await _children(session, "/objects")
    except QmpError:
        return ()
    found = []
    for row in rows:
        name, size, shared = row.get("id"), row.get("size"), row.get("share")
        if not isinstance(name, str) or type(size) is not int or not 0 <= size <= MAX_SIZE:
            continue
        backend = Backend(
            name, size, shared if isinstance(shared, bool) else None, row.get("prealloc") is True
        )
        match kinds.get(name):
            case "memory-backend-memfd":
                told = await _property(session, f"/objects/{name}", "hugetlb")
                backend = replace(backend, huge=told if isinstance(told, bool) else None)
            case "memory-backend-file":
                path = await _property(session, f"/objects/{name}", "mem-path")
                mounts = text_of(f"{proc}/{pid or 'self'}/mounts")
                kind = file_system_of(path, mounts)
                is_huge = None if kind is None else kind == "hugetlbfs"
                backend = replace(backend, huge=is_huge, is_on_tmpfs=kind == "tmpfs")
        found.append(backend)
    return tuple(found)


def file_system_of(path: object, mounts: str) -> str | None:
    """Return the type of the file system that a path is on, by /proc/PID/mounts; None: it is not known."""
    if not isinstance(path, str) or not path.startswith("/"):
        return None
    longest, kind = 0, None
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        place = fields[1].rstrip("/") + "/"
        if f"{path}/".startswith(place) and len(place) >= longest:  # a later mount hides an earlier one
            longest, kind = len(place), fields[2]
    return kind


async def _passed_through(session: Session) -> tuple[str, ...]:
    found = []
    for place in _PERIPHERALS:
        for name, kind in (await _children(session, place)).items():
            if kind.startswith(_PINNING) and kind not in _NOT_PINNING:
                found.append(f"{name} ({kind})")
    return tuple(found[:_MOST_LISTED])


async def _children(session: Session, path: str) -> dict[str, str]:
    """Return the names and types of the objects below a path."""
    try:
        rows = _rows(await session.request("qom-list", {"path": path}))
    except QmpError:
        return {}
    return {
        str(row.get("name")): kind[len("child<") : -1]
        for row in rows
        if (kind := str(row.get("type"))).startswith("child<") and kind.endswith(">")
    }


async def _property(session: Session, path: str, name: str) -> object:
    try:
        return await session.request("qom-get", {"path": path, "property": name})
    except QmpError:  # this QEMU or this object does not have it
        return None


def _rows(answer: object) -> Sequence[Mapping[str, object]]:
    rows = answer if isinstance(answer, list) else []
    return [row for row in rows if isinstance(row, dict)][:_MOST_LISTED]


def _with_process(vm: ExaminedVm, pid: int, proc: str) -> ExaminedVm:
    sizes, life = parse_meminfo(text_of(f"{proc}/{pid}/status")), life_of(pid)
    return replace(
        vm,
        age_s=None if life is None else age_of(life),
        locked=sizes.get("VmLck"),
        swapped=sizes.get("VmSwap"),
        shared_resident=sizes.get("RssShmem", 0),
    )
