"""Gathers the facts about the host from /proc and /sys.

Sources: proc(5); Linux Documentation/admin-guide/mm/ksm.rst and accounting/psi.rst; adjtimex(2); OpenZFS
module/os/linux/zfs/arc_os.c.
"""

from __future__ import annotations

import ctypes
import os
import time
from typing import Final

from qmpballoon.doctor.facts import AgentFigures, ExaminedHost, Swap
from qmpballoon.procfs import is_number, parse_meminfo, text_of

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_KIB: Final = 1024
_TIMEX_BYTES: Final = 512  # more than struct timex has: 208
_TIME_ERROR: Final = 5  # of adjtimex(2): the clock is not synchronised
_MERGES: Final = "1"  # in /sys/kernel/mm/ksm/run


def examine_host(
    *,
    root: str = "",
    agent: AgentFigures | None = None,
    vms_size: int = 0,
    shared_by_guests: int = 0,
    clock_is_synchronised: bool | None = None,
) -> ExaminedHost:
    """Return what the kernel tells about the host; ``root`` is the directory of its ``proc`` and ``sys``.

    ``vms_size``: what all VMs have together, in bytes; ``shared_by_guests``: resident shared memory of QEMUs.
    """
    sizes = parse_meminfo(text_of(f"{root}/proc/meminfo"))
    tmpfs = sizes.get("Shmem")
    return ExaminedHost(
        mem_total=sizes.get("MemTotal"),
        mem_available=sizes.get("MemAvailable"),
        tmpfs=None if tmpfs is None else max(0, tmpfs - shared_by_guests),
        arc=parse_arc_size(text_of(f"{root}/proc/spl/kstat/zfs/arcstats")),
        swaps=parse_swaps(text_of(f"{root}/proc/swaps")),
        merged=_merged(f"{root}/sys/kernel/mm/ksm"),
        has_psi=text_of(f"{root}/proc/pressure/memory") != "",
        clock_is_synchronised=clock_is_synchronised,
        vms_size=vms_size,
        agent=agent,
    )


def parse_swaps(text: str) -> tuple[Swap, ...]:
    """Return the swap areas of /proc/swaps; the columns are Filename, Type, Size, Used, Priority, in KiB."""
    rows = (line.split() for line in text.splitlines()[1:])
    return tuple(
        Swap(row[0], int(row[2]) * _KIB, int(row[3]) * _KIB)
        for row in rows
        if len(row) >= 4 and is_number(row[2]) and is_number(row[3])
    )


def parse_arc_size(arcstats: str) -> int | None:
    """Return the size of the cache of ZFS in bytes; None without ZFS."""
    for line in arcstats.splitlines():
        row = line.split()
        if len(row) == 3 and row[0] == "size" and is_number(row[2]):
            return int(row[2])
    return None


def read_clock() -> bool | None:
    """Tell whether the kernel's clock is synchronised; None where the kernel may not be asked."""
    timex = ctypes.create_string_buffer(_TIMEX_BYTES)  # zeros: modes 0 changes nothing
    try:
        state = int(ctypes.CDLL(None).adjtimex(timex))
    except (OSError, AttributeError):
        return None
    return None if state < 0 else state != _TIME_ERROR


def wall_offset_s() -> float:
    """Return by how much the wall clock is ahead of the time since boot; it changes when the clock is set.

    A clock that is corrected gradually changes both. Source: clock_gettime(2).
    """
    return time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_BOOTTIME)


def _merged(ksm: str) -> int | None:
    """Return how many bytes KSM saves; None while it does not merge."""
    if text_of(f"{ksm}/run").strip() != _MERGES:
        return None
    pages = text_of(f"{ksm}/pages_sharing").strip()
    return int(pages) * _PAGE_BYTES if is_number(pages) else 0
