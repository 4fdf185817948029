"""Figures of the kernel about the host and about QEMU's process."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qmpballoon import procfs
from qmpballoon.procfs import (
    ResidentMemory,
    age_of,
    can_hold,
    is_stopped,
    life_of,
    mapped_writable,
    parse_arc,
    parse_meminfo,
    parse_pressure,
    parse_process_stat,
    read_host,
    rss_of,
    status_of,
)
from qmpballoon.units import MIB


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing until it is killed."""
    process = subprocess.Popen(["sleep", "60"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_meminfo_is_bytes_and_omits_lines_without_a_size() -> None:
    sizes = "MemTotal:       24576 kB\nMemAvailable:    1024 kB\n"
    text = f"{sizes}HugePages_Total:       0\nnonsense\nX: -1 kB\nY: ² kB\n"
    assert parse_meminfo(text) == {"MemTotal": 24576 * 1024, "MemAvailable": 1024 * 1024}


def a_proc(directory: Path, meminfo: str, **files: str) -> str:
    """Write a tree that stands for /proc, and return its path."""
    (directory / "meminfo").write_text(meminfo)
    for name, text in files.items():
        place = directory / {"arcstats": "spl/kstat/zfs/arcstats", "pressure": "pressure/memory"}[name]
        place.parent.mkdir(parents=True)
        place.write_text(text)
    return str(directory)


MEMINFO = "MemTotal: 8192 kB\nMemAvailable: 1024 kB\nShmem: 4096 kB\nSwapFree: 9999 kB\n"


def test_memory_that_the_zfs_cache_can_free_is_available(tmp_path: Path) -> None:
    arcstats = "9 1 0x01 147 39984 1 2\nname type data\nhits 4 7\nc_min 4 1048576\nsize 4 3145728\n"
    assert read_host(a_proc(tmp_path, MEMINFO, arcstats=arcstats)).mem_available == 3 * MIB


@pytest.mark.parametrize(
    "arcstats",
    [
        "",
        "size 4 99\n",
        "c_min 4 5\nsize 4 4\n",  # it is below its minimum
        "c_min 4 x\nsize 4 99\n",
        "c_min 4 1\nsize 4 -99\n",
        f"c_min 4 0\nsize 4 {'9' * 5000}\n",
        "c_min 4 0\nsize 4 ²\n",
    ],
)
def test_a_zfs_cache_that_can_free_nothing_adds_nothing(arcstats: str) -> None:
    assert parse_arc(arcstats) == 0


def test_tmpfs_and_swap_are_not_available(tmp_path: Path) -> None:
    assert read_host(a_proc(tmp_path, MEMINFO)).mem_available == MIB


@pytest.mark.parametrize(
    ("pool", "total"),
    [
        ("HugePages_Total: 2\nHugepagesize: 2048 kB\n", 4),
        ("HugePages_Total: 2\nHugepagesize: 2048 kB\nHugetlb: 5120 kB\n", 3),  # pages of other sizes, too
        ("HugePages_Total: ²\nHugepagesize: 2048 kB\n", 8),
        ("HugePages_Total: 2\n", 8),
        ("Hugetlb: 16384 kB\n", 0),
        ("", 8),
    ],
)
def test_the_pool_of_huge_pages_is_not_part_of_the_total(pool: str, total: int, tmp_path: Path) -> None:
    assert read_host(a_proc(tmp_path, MEMINFO + pool)).mem_total == total * MIB


def test_the_stall_of_the_host_is_read(tmp_path: Path) -> None:
    sample = read_host(a_proc(tmp_path, MEMINFO, pressure="some avg10=2.50\nfull avg10=1.00\n"))
    assert (sample.psi_some_avg10, sample.psi_full_avg10) == (2.5, 1.0)


def test_pressure_is_the_average_of_ten_seconds() -> None:
    text = (
        "some avg10=1.25 avg60=9.00 avg300=9.00 total=9\n\nfull avg10=0.00 avg60=9.00 avg300=9.00 total=9\n"
        "odd avg10=² avg60\n"
    )
    assert parse_pressure(text) == {"some": 1.25, "full": 0.0}


def test_a_process_name_may_contain_brackets_and_blanks() -> None:
    text = "4711 (qemu) R 1 (x) y) T 1 " + "0 " * 17 + "889123 0 0\n"
    stat = parse_process_stat(text)
    assert stat is not None
    assert (stat.state, stat.started) == ("T", 889123)


@pytest.mark.parametrize(
    "text", ["", "4711 (qemu) S 1 2 3", "4711 qemu S " + "1 " * 30, "1 (a) S " + "² " * 30]
)
def test_an_invalid_stat_line_is_none(text: str) -> None:
    assert parse_process_stat(text) is None


def test_the_host_is_read_with_the_files_of_this_kernel() -> None:
    sample = read_host()
    assert sample.mem_total is not None
    assert sample.mem_available is not None
    assert 0 < sample.mem_available <= sample.mem_total


def test_without_any_file_every_figure_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "text_of", lambda _: "")
    assert read_host() == procfs.HostSample(None, None, None, None)


def test_a_life_is_a_pid_and_when_it_started(child: subprocess.Popen[bytes]) -> None:
    life = life_of(child.pid)
    assert life is not None
    assert life.pid == child.pid
    assert life == life_of(child.pid)
    assert life != life_of(os.getpid())
    assert str(life) == f"{child.pid}-{life.started}"
    assert 0 <= age_of(life) < 60


def test_a_zombie_has_no_life(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    assert life_of(child.pid) is None
    child.wait()
    assert life_of(child.pid) is None
    assert rss_of(child.pid) is None
    assert not is_stopped(child.pid)


def test_resident_memory_is_read_until_the_process_ends_or_the_file_is_closed(
    child: subprocess.Popen[bytes],
) -> None:
    ours, ended = ResidentMemory(os.getpid()), ResidentMemory(child.pid)
    assert ended.read()
    child.kill()
    child.wait()
    assert ended.read() is None
    assert ResidentMemory(child.pid).read() is None
    ended.close()
    assert ours.read()
    ours.close()
    ours.close()
    assert ours.read() is None


def test_a_stopped_process_differs_from_a_running_one(child: subprocess.Popen[bytes]) -> None:
    assert not is_stopped(child.pid)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert is_stopped(child.pid)
    assert life_of(child.pid) is not None


def test_resident_memory_is_bytes() -> None:
    before = rss_of(os.getpid())
    assert before is not None
    assert before > sys.getsizeof(before)
    with mmap.mmap(-1, 2**25) as taken:  # never memory that the process had already
        taken.write(b"\x01" * len(taken))
        after = rss_of(os.getpid())
    assert after is not None
    assert after - before > 2**24


STATUS = "Name:\tqemu\nVmRSS:\t  90000 kB\nVmSwap:\t     12 kB\nHugetlbPages:\t    4096 kB\nVmSwap:\n"


def test_the_sizes_of_a_process_are_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "text_of", {"/proc/7/status": STATUS}.__getitem__)
    assert status_of(7) == {"VmRSS": 90000 * 1024, "VmSwap": 12 * 1024, "HugetlbPages": 4096 * 1024}


def test_huge_pages_are_resident_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "text_of", lambda path: STATUS)
    resident = ResidentMemory(os.getpid())
    assert resident.read() == resident.read() == rss_of(os.getpid()) == (90000 + 4096) * 1024
    monkeypatch.setattr(procfs, "text_of", lambda path: STATUS.replace("4096", "0"))
    assert resident.read() == 90000 * 1024
    monkeypatch.setattr(procfs, "text_of", lambda path: STATUS)
    small = resident.read()  # none existed: the cheaper file is read until the next closer look
    assert small is not None
    assert small != (90000 + 4096) * 1024
    assert resident.look_closely() == ((90000 + 4096) * 1024, 12 * 1024)
    assert resident.read() == (90000 + 4096) * 1024
    resident.close()
    assert resident.read() is None
    assert resident.look_closely() == (None, 0)


def test_a_kernel_without_huge_pages_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def status(path: str) -> str:
        read.append(path)
        return "Name:\tqemu\nVmRSS:\t  90000 kB\n"

    monkeypatch.setattr(procfs, "text_of", status)
    resident = ResidentMemory(os.getpid())
    assert resident.look_closely() == (90000 * 1024, 0)
    assert resident.read() not in (None, 90000 * 1024)  # of the real process, by the cheaper file
    assert read == [f"/proc/{os.getpid()}/status"]
    resident.close()


def test_a_real_process_without_huge_pages_is_read_the_same_in_both_ways() -> None:
    resident = ResidentMemory(os.getpid())
    first, second = resident.read(), resident.read()
    assert first is not None
    assert second is not None
    assert abs(first - second) < first // 10
    resident.close()


def test_only_writable_mappings_count() -> None:
    maps = (
        "7f0000000000-7f0000100000 rw-p 00000000 00:00 0 \n"
        "7f0000100000-7f0000300000 rw-s 00000000 00:01 5 /memfd:ram (deleted)\n"
        "c000000000-c040000000 ---p 00000000 00:00 0 \n"
        "400000-500000 r-xp 00000000 08:01 7 /usr/bin/socat\n"
    )
    assert mapped_writable(maps) == 3 * MIB


RESERVES = """
import mmap, sys
memory = mmap.mmap(-1, 1 << 32, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000, prot=int(sys.argv[1]))
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(("protection", "held"), [(mmap.PROT_READ | mmap.PROT_WRITE, True), (0, False)])
def test_reserved_address_space_holds_no_guest(protection: int, held: bool) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", RESERVES, str(protection)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"mapped\n"
        assert procfs.status_of(process.pid)["VmSize"] > 1 << 32
        assert can_hold(process.pid, 1 << 32) is held
        process.stdin.close()


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert not can_hold(2**22, 4096)
