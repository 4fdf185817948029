"""The machine below the VMs, as the kernel tells it: memory, stall, and the QEMU processes.

Parsing is pure and separate from reading. What this kernel does not have is None.
Sources: proc(5); Linux Documentation/accounting/psi.rst; OpenZFS module/os/linux/zfs/arc_os.c.
"""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpballoon.descriptors import with_reserve
from qmpballoon.model.records import Life

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_LARGEST_FILE: Final = 65536
_SIZE_LINE: Final = re.compile(r"^([^:\n]+):[ \t]*([0-9]{1,20}) kB$", re.MULTILINE)
_STATUS_SIZE: Final = re.compile(r"\n(Vm[A-Z][A-Za-z]*|HugetlbPages):[ \t]*([0-9]{1,20}) kB(?=\n)")
_LONGEST_STATM: Final = 256  # seven numbers
_STATM_DATA: Final = 5  # the place of data and stack among them
_ENDED: Final = ("Z", "X")
_STOPPED: Final = ("T", "t")  # by a signal, by a tracer


@dataclass(frozen=True, slots=True)
class HostSample:
    """The host's memory in bytes, and stall as percent of the last ten seconds."""

    mem_total: int | None  # MemTotal without the pool of huge pages
    mem_available: int | None  # MemAvailable and what the cache of ZFS can give
    psi_some_avg10: float | None
    psi_full_avg10: float | None


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What /proc/PID/stat tells: the state's letter, and when it started in ticks since boot."""

    state: str
    started: int


def parse_meminfo(text: str) -> dict[str, int]:
    """Return the sizes of /proc/meminfo in bytes: its lines ``Key: N kB``."""
    return {key: int(number) * 1024 for key, number in _SIZE_LINE.findall(text)}


def parse_pressure(text: str) -> dict[str, float]:
    """Return ``avg10`` of each line of a PSI file: ``{"some": 0.0, "full": 0.0}``."""
    found = {}
    for line in text.splitlines():
        kind, _, fields = line.partition(" ")
        for field in fields.split():
            name, _, value = field.partition("=")
            if name == "avg10" and value.isascii() and value.replace(".", "", 1).isdigit():
                found[kind] = float(value)
    return found


def huge_page_pool(meminfo: str) -> int:
    """Return the bytes that /proc/meminfo reserves for huge pages: nothing else can use them.

    ``Hugetlb`` covers the pages of all sizes; kernels before 4.19 only tell those of the default size.
    """
    sizes = parse_meminfo(meminfo)
    if "Hugetlb" in sizes:
        return sizes["Hugetlb"]
    for line in meminfo.splitlines():
        key, _, number = line.partition(":")
        if key == "HugePages_Total" and is_number(number := number.strip()):
            return int(number) * sizes.get("Hugepagesize", 0)
    return 0


def parse_arc(arcstats: str) -> int:
    """Return the bytes that the cache of ZFS gives when memory is short: its size above ``c_min``.

    MemAvailable does not count them. The lines are ``name type value``.
    """
    rows = [line.split() for line in arcstats.splitlines()]
    values = {row[0]: int(row[2]) for row in rows if len(row) == 3 and is_number(row[2])}
    if "size" not in values or "c_min" not in values:
        return 0
    return max(0, values["size"] - values["c_min"])


def is_number(text: str) -> bool:
    """Tell whether the text is a whole number as the kernel prints them, of at most twenty digits."""
    return text.isascii() and text.isdigit() and len(text) <= 20


def parse_process_stat(text: str) -> ProcessStat | None:
    """Return what matters of /proc/PID/stat; the process's name may hold any character but NUL."""
    _, bracket, rest = text.rpartition(") ")
    fields = rest.split()
    if not bracket or len(fields) < 20 or not fields[19].isdecimal():
        return None
    return ProcessStat(state=fields[0], started=int(fields[19]))


def read_host(proc: str = "/proc") -> HostSample:
    """Read the host's figures now; ``proc`` is where procfs is mounted."""
    meminfo = text_of(f"{proc}/meminfo")
    memory = parse_meminfo(meminfo)
    total, available = memory.get("MemTotal"), memory.get("MemAvailable")
    stall = parse_pressure(text_of(f"{proc}/pressure/memory"))
    return HostSample(
        mem_total=None if total is None else max(0, total - huge_page_pool(meminfo)),
        mem_available=None
        if available is None
        else available + parse_arc(text_of(f"{proc}/spl/kstat/zfs/arcstats")),
        psi_some_avg10=stall.get("some"),
        psi_full_avg10=stall.get("full"),
    )


def life_of(pid: int) -> Life | None:
    """Return the life of the process, None if it is gone."""
    stat = parse_process_stat(text_of(f"/proc/{pid}/stat"))
    return Life(pid, stat.started) if stat and stat.state not in _ENDED else None


def has_ended(life: Life) -> bool:
    """Tell whether the life is over; one whose process is there and cannot be looked at is not."""
    stat = parse_process_stat(text_of(f"/proc/{life.pid}/stat"))
    if stat is not None:
        return stat.started != life.started or stat.state in _ENDED
    try:
        os.kill(life.pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


def is_stopped(pid: int) -> bool:
    """Tell whether the process is stopped (SIGSTOP, or under a debugger)."""
    stat = parse_process_stat(text_of(f"/proc/{pid}/stat"))
    return stat is not None and stat.state in _STOPPED


def age_of(life: Life) -> float:
    """Return the seconds since the life began.

    /proc/uptime, which lxcfs replaces in a container, would be the same clock: see proc(5), lxcfs(8).
    """
    return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - life.started / _TICKS_PER_S)


def rss_of(pid: int) -> int | None:
    """Return the resident memory of a process in bytes, huge pages included; None if it is gone."""
    resident = ResidentMemory(pid)
    try:
        return resident.read()
    finally:
        resident.close()


class ResidentMemory:
    """What ``rss_of`` tells, again and again, at a seventh of the time: a file is kept open.

    Huge pages are not in VmRSS. Where a process has some, both are read at one moment from /proc/PID/status,
    which takes 50 µs and not 2 as /proc/PID/statm does. See proc(5).
    """

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._has_huge_pages: bool | None = None  # None: to be looked for
        self._statm: int | None = None
        self._closed = False

    def read(self) -> int | None:
        """Return the resident memory in bytes, None if the process is gone or this was closed."""
        if self._closed:
            return None
        if self._has_huge_pages is False:
            return _resident(self._read_statm())
        return self.look_closely()[0]

    def look_closely(self) -> tuple[int | None, int]:
        """Look whether the process has huge pages by now; return what `read` does, and the swapped bytes."""
        sizes = {} if self._closed else self._read_status()
        resident = sizes["VmRSS"] + sizes.get("HugetlbPages", 0) if "VmRSS" in sizes else None
        return resident, sizes.get("VmSwap", 0)

    def close(self) -> None:
        """Close the file; nothing is read any more."""
        self._closed = True
        if self._statm is not None:
            os.close(self._statm)
            self._statm = None

    def _read_status(self) -> dict[str, int]:
        sizes = status_of(self._pid)
        if "VmRSS" in sizes:
            self._has_huge_pages = sizes.get("HugetlbPages", 0) > 0
        return sizes

    def _read_statm(self) -> bytes:
        try:
            if self._statm is None:
                self._statm = os.open(f"/proc/{self._pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
            return os.pread(self._statm, _LONGEST_STATM, 0)
        except OSError:
            return b""


def _resident(statm: bytes) -> int | None:
    fields = statm.split()
    return int(fields[1]) * _PAGE_BYTES if len(fields) > 1 and fields[1].isdigit() else None


def can_hold(pid: int, size: int) -> bool:
    """Tell whether a process has as much writable memory mapped as a guest of ``size`` bytes needs.

    Address space that is only reserved does not count: Go and Java programs reserve gigabytes of it. Where
    /proc/PID/maps may not be read (another user's process), all of the address space counts. See proc(5).
    """
    pages = text_of(f"/proc/{pid}/statm").split()
    if len(pages) < _STATM_DATA + 1 or int(pages[0]) * _PAGE_BYTES < size:
        return False
    if int(pages[_STATM_DATA]) * _PAGE_BYTES >= size:  # private and writable, as QEMU's memory mostly is
        return True
    maps = _whole(f"/proc/{pid}/maps")
    return not maps or mapped_writable(maps) >= size


def mapped_writable(maps: str) -> int:
    """Return how many bytes of the mappings in /proc/PID/maps are writable."""
    total = 0
    for line in maps.splitlines():
        addresses, _, rest = line.partition(" ")
        first, _, last = addresses.partition("-")
        if rest[1:2] == "w":
            total += int(last, 16) - int(first, 16)
    return total


def status_of(pid: int) -> dict[str, int]:
    """Return the sizes ``Vm…`` (such as VmRSS, VmSwap) and ``HugetlbPages`` of /proc/PID/status in bytes."""
    return {key: int(number) * 1024 for key, number in _STATUS_SIZE.findall(text_of(f"/proc/{pid}/status"))}


def _whole(path: str) -> str:
    """Return a file of /proc that comes in many parts, empty if it cannot be read."""
    try:
        return with_reserve(Path(path).read_bytes).decode("utf-8", "surrogateescape")
    except OSError:
        return ""


def text_of(path: str) -> str:
    """Return a file of /proc or /sys, empty if it cannot be read; without the cost of a text stream."""

    def read() -> bytes:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(handle, _LARGEST_FILE)
        finally:
            os.close(handle)

    try:
        return with_reserve(read).decode("utf-8", "surrogateescape")
    except OSError:
        return ""
