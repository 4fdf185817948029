"""Facts as they are gathered: over a session with a simulated QEMU, and from files of /proc and /sys."""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_peer import Line, peer, session_with

from qmpballoon.doctor.facts import Backend, ExaminedVm, Feature, Process, Swap
from qmpballoon.doctor.host import examine_host, parse_arc_size, parse_swaps, read_clock, wall_offset_s
from qmpballoon.doctor.host_rules import host_findings
from qmpballoon.doctor.vm import examine, file_system_of, holding_processes, processes_with
from qmpballoon.doctor.vm_rules import vm_findings
from qmpballoon.errors import ConnectionLost, NoBalloon
from qmpballoon.qmp.balloon import find_balloon
from qmpballoon.qmp.monitor import holders_of
from qmpballoon.qmp.statistics import Sampler
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import GIB, MIB

MEMINFO = "MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\nShmem: 307200 kB\n"


def words_of(vm: ExaminedVm) -> list[str]:
    return [finding.word for finding in vm_findings(vm)]


def files_under(root: Path, **files: str) -> str:
    """Write files, ``__`` in a name standing for ``/``; return the directory."""
    for name, text in files.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="ascii")
    return str(root)


# ---- a VM ----


@asynccontextmanager
async def examined(
    directory: Path, *, is_fresh: bool = True, proc: str = "/proc", pid: int | None = None, **how: Any
) -> AsyncIterator[ExaminedVm]:
    async with (
        SimulatedQemu(directory / "a.qmp", **how) as qemu,
        session_with(qemu.path) as session,
    ):
        with suppress(NoBalloon):
            sampler = Sampler(session, await find_balloon(session))
            await sampler.start(1)
            await sampler.refresh(timeout_s=1.0 if is_fresh else 0.0)
        yield await examine(session, name="web", pid=pid, is_fresh=is_fresh, proc=proc)


def machine(**spec: Any) -> MachineSpec:
    return MachineSpec(**spec)


GUEST = GuestSpec(deflate_on_oom=True, free_page_reporting=True)


async def test_a_good_guest_has_everything(sockets_dir: Path) -> None:
    async with examined(sockets_dir, guest=GUEST) as vm:
        assert (vm.size, vm.run_state, vm.qemu, vm.is_pretty) == (256 * MIB, "running", "7.2.22", False)
        assert vm.balloon is not None
        assert vm.balloon.driver is True
        assert vm.balloon.deflate_on_oom == vm.balloon.free_page_reporting == Feature(True, True)
        assert vm.balloon.has_reported
        assert vm.balloon.has_figures
        assert vm.backends == (Backend("pc.ram", 256 * MIB, shared=False),)
        assert words_of(replace(vm, pid=1)) == []


@pytest.mark.parametrize(
    ("guest", "spec", "word"),
    [
        (GUEST, machine(device=None), "no-balloon"),
        (replace(GUEST, driver=False), machine(), "no-driver"),
        (replace(GUEST, service=False), machine(), "no-service"),
        (replace(GUEST, deflate_on_oom=False), machine(), "deflate-on-oom-off"),
        (replace(GUEST, free_page_reporting=False), machine(), "free-page-reporting-off"),
        (GUEST, machine(devices=(("gpu", "vfio-pci"),)), "vfio"),
        (GUEST, machine(devices=(("net", "vhost-vdpa-device-pci"),)), "vfio"),
        (GUEST, machine(devices=(("crypto", "vfio-ap"),), shared=True), "shared-memory"),
        (GUEST, machine(preallocated=True), "preallocated"),
        (GUEST, machine(stopped=True), "paused"),
    ],
)
async def test_each_trouble_of_a_vm_is_found(
    sockets_dir: Path, guest: GuestSpec, spec: MachineSpec, word: str
) -> None:
    async with examined(sockets_dir, guest=guest, machine=spec) as vm:
        assert words_of(replace(vm, pid=1))[0] == word


async def test_a_driver_without_statistics_is_found(sockets_dir: Path) -> None:
    guest = replace(GUEST, statistics=False)
    async with examined(sockets_dir, is_fresh=False, guest=guest) as vm:
        assert words_of(replace(vm, pid=1)) == ["no-statistics"]


@pytest.mark.parametrize("version", [(5, 2, 0), (11, 1, 3)])
async def test_a_qemu_that_may_not_be_asked_for_its_driver_survives(
    sockets_dir: Path, version: tuple[int, int, int]
) -> None:
    async with examined(sockets_dir, guest=GUEST, machine=machine(version=version)) as vm:
        assert vm.balloon is not None
        assert (vm.balloon.driver, vm.balloon.deflate_on_oom) == (None, Feature(True))
        assert vm.backends[0].shared == (None if version < (6, 1, 0) else False)
        assert words_of(replace(vm, pid=1)) == []


async def test_what_the_kernel_tells_of_the_process_is_found(sockets_dir: Path, tmp_path: Path) -> None:
    proc = files_under(
        tmp_path,
        meminfo="MemTotal: 131072 kB\n",
        **{"47__status": "VmLck: 262144 kB\nVmSwap: 9216 kB\nRssShmem: 4 kB\n"},
    )
    async with examined(sockets_dir, proc=proc, pid=47, guest=GUEST) as vm:
        assert (vm.locked, vm.swapped, vm.shared_resident) == (256 * MIB, 9 * MIB, 4096)
        assert words_of(vm) == ["locked-memory", "larger-than-host", "qemu-swapped"]


async def test_a_qemu_that_answers_nonsense_is_examined_as_far_as_it_goes(
    sockets_dir: Path,
) -> None:
    answers: dict[str, object] = {
        "query-status": {"status": "running"},
        "query-memory-size-summary": {"base-memory": 256 * MIB, "plugged-memory": 0},
        "query-memdev": [
            None,
            1,
            {"id": 3},
            {"id": "x", "size": -1},
            {"id": "y", "size": 4096, "share": "?"},
        ],
        "qom-list": [{"name": "b", "type": "child<virtio-balloon-pci>"}, {"name": 7}],
        "x-query-virtio-status": 3,
        "qom-get": {"stats": {}, "last-update": 0},
    }

    async def talk(line: Line) -> None:
        await line.negotiate()
        while True:
            request = await line.request()
            await line.answer(request, answers[str(request["execute"])])

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        vm = await examine(session, name="web", pid=None, is_fresh=False)
    assert vm.backends == (Backend("y", 4096),)
    assert words_of(vm)[0] == "no-driver"


async def test_a_qemu_that_ends_meanwhile_is_a_lost_connection(sockets_dir: Path) -> None:
    async def talk(line: Line) -> None:
        await line.negotiate()
        await line.request()

    async with peer(sockets_dir / "a.qmp", talk), session_with(sockets_dir / "a.qmp") as session:
        with pytest.raises(ConnectionLost):
            await examine(session, name="web", pid=None, is_fresh=False)


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/dev/hugepages", "hugetlbfs"),
        ("/dev/hugepages/web", "hugetlbfs"),
        ("/dev/hugepages2", "ext4"),
        ("/mnt/over/web", "tmpfs"),  # the later mount hides the earlier one
        ("relative", None),
        (None, None),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_mount(path: str | None, kind: str | None) -> None:
    mounts = (
        "/dev/sda / ext4 rw 0 0\nhugetlbfs /dev/hugepages hugetlbfs rw 0 0\n"
        "hugetlbfs /mnt/over hugetlbfs rw 0 0\ntmpfs /mnt/over tmpfs rw 0 0\nshort\n"
    )
    assert file_system_of(path, mounts) == kind
    assert file_system_of(path, "") is None


# ---- who holds a monitor ----


@pytest.fixture
def listener(sockets_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], socket.socket]:
    """Listen at ``a.qmp``, bound by a relative path, as a QEMU may be; the sockets are closed at the end."""
    monkeypatch.chdir(sockets_dir)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind("a.qmp")
    server.listen(1)
    return lambda: server


def test_only_the_accepted_client_of_a_socket_holds_it(
    sockets_dir: Path, listener: Callable[[], socket.socket]
) -> None:
    path = str(sockets_dir / "a.qmp")
    with listener() as server, socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as next_:
        first.connect(path)
        assert holders_of(path) == frozenset()
        served, _ = server.accept()
        with served:
            next_.connect(path)
            assert holders_of(path) == {os.fstat(first.fileno()).st_ino}
    assert holders_of(path) == frozenset()
    assert holders_of(str(sockets_dir / "absent")) == frozenset()


async def test_the_process_that_holds_a_monitor_is_named(
    sockets_dir: Path, listener: Callable[[], socket.socket]
) -> None:
    path = str(sockets_dir / "a.qmp")
    program = (
        f"import socket as s; c = s.socket(s.AF_UNIX); c.connect({path!r}); print(1, flush=True); input()"
    )
    with (
        listener() as server,
        subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as client,
    ):
        assert client.stdout is not None
        client.stdout.readline()
        served, _ = server.accept()
        with served:
            name = Path(f"/proc/{client.pid}/comm").read_text(encoding="ascii").strip()
            assert await holding_processes(path) == (Process(client.pid, name),)
        client.communicate(b"\n")
    assert processes_with(()) == ()


# ---- the host ----


def test_a_host_is_read_from_its_files(tmp_path: Path) -> None:
    root = files_under(
        tmp_path,
        proc__meminfo=MEMINFO,
        proc__swaps="Filename Type Size Used Priority\n/dev/zram0 partition 1024 4 100\n",
        proc__pressure__memory="some avg10=0.00\n",
        proc__spl__kstat__zfs__arcstats="1 2\nname type data\nsize 4 1000000\nc_min 4 5\n",
        sys__kernel__mm__ksm__run="1\n",
        sys__kernel__mm__ksm__pages_sharing="10\n",
    )
    host = examine_host(root=root, vms_size=GIB, shared_by_guests=100 * MIB)
    assert (host.mem_total, host.mem_available, host.tmpfs) == (2 * GIB, GIB, 200 * MIB)
    assert (host.arc, host.merged) == (1000000, 10 * os.sysconf("SC_PAGE_SIZE"))
    assert host.swaps == (Swap("/dev/zram0", 1024**2, 4096),)
    assert host.swaps[0].is_zram
    assert host.has_psi
    assert host.vms_size == GIB


def test_a_host_that_tells_nothing_is_not_known(tmp_path: Path) -> None:
    host = examine_host(root=str(tmp_path))
    assert (host.mem_total, host.tmpfs, host.arc, host.merged, host.swaps) == (None, None, None, None, ())
    assert not host.has_psi


GOOD_HOST = {"proc__meminfo": MEMINFO, "proc__pressure__memory": "some avg10=0.00\n"}


@pytest.mark.parametrize(
    ("word", "files"),
    [
        (None, {}),
        ("arc-large", {"proc__spl__kstat__zfs__arcstats": "size 4 300000000\n"}),
        ("tmpfs-large", {"proc__meminfo": MEMINFO.replace("307200", "512000")}),
        ("psi-off", {"proc__pressure__memory": ""}),
        ("host-swap", {"proc__swaps": "Filename\n/dev/sda2 partition 1024 0 -2\n"}),
        ("host-zram", {"proc__swaps": "Filename\n/dev/zram0 partition 1024 0 100\n"}),
        ("ksm-on", {"sys__kernel__mm__ksm__run": "1\n"}),
        ("overcommitted", {"proc__meminfo": MEMINFO.replace("2097152", "1048570")}),
    ],
)
def test_each_trouble_of_a_host_is_found_in_its_files(
    tmp_path: Path, word: str | None, files: dict[str, str]
) -> None:
    root = files_under(tmp_path, **{**GOOD_HOST, **files})
    host = examine_host(root=root, vms_size=GIB, shared_by_guests=250 * MIB, clock_is_synchronised=True)
    assert [finding.word for finding in host_findings(host)] == ([] if word is None else [word])


@pytest.mark.parametrize("run", ["0\n", "2\n", ""])
def test_ksm_counts_while_it_merges(tmp_path: Path, run: str) -> None:
    root = files_under(tmp_path, sys__kernel__mm__ksm__run=run, sys__kernel__mm__ksm__pages_sharing="10\n")
    assert examine_host(root=root).merged is None


@pytest.mark.parametrize("text", ["", "Filename\n", "Filename\n/x partition many 4 1\n", "a\nb c\n"])
def test_a_table_of_swap_without_areas_has_none(text: str) -> None:
    assert parse_swaps(text) == ()


def test_arcstats_without_a_size_has_none() -> None:
    assert parse_arc_size("name type data\nsize 4 many\n") is None


def test_the_clock_is_as_the_kernel_tells_it_elsewhere() -> None:
    state = ctypes.CDLL(None).ntp_gettime(ctypes.create_string_buffer(512))
    assert read_clock() == (None if state < 0 else state != 5)  # TIME_ERROR


def test_the_wall_clock_is_ahead_by_the_time_of_boot() -> None:
    booted = [line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")]
    assert abs(wall_offset_s() - int(booted[0].split()[1])) < 2.0


def test_this_host_is_read() -> None:
    host = examine_host()
    assert host.mem_total is not None
    assert host.mem_total > 64 * MIB
