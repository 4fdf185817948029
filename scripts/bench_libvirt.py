"""The agent beside libvirt: ``make bench-libvirt``, or ``scripts/bench_libvirt.py --help``.

A private libvirtd (no system service, no network) starts real guests, each with a second monitor. libvirt's
memory statistics, the bare client and the agent are then measured in turns on the same QEMUs, each with one
poll per guest and second. The processor time of QEMU and of the guest is not counted.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import ctypes.util
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from bench_mqtt import wait_online
from bench_processes import (
    INTERVAL_S,
    TIMEOUT_S,
    BenchError,
    Process,
    agent,
    bare_client,
    end_on_sigterm,
    running,
)

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.guest import QEMU
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.require import LabError, find_program
from qmpballoon.lab.waiting import eventually

PACKAGES: Final = "libvirt-daemon libvirt-daemon-driver-qemu"

_NOBODY: Final = "65534"  # libvirtd has a private session only as another user than root
_SETTLE_S: Final = 2.5 * INTERVAL_S
_BOOT_S: Final = 180.0
_DESTROY_WITH_CONNECTION: Final = 2  # VIR_DOMAIN_START_AUTODESTROY, libvirt-domain.h
_MOST_STATISTICS: Final = 20
_REPORTED: Final = 7  # of them, if the guest's driver is up; otherwise there are three

_DOMAIN: Final = """<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
<name>{name}</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64'>hvm</type><kernel>{kernel}</kernel><initrd>{initramfs}</initrd>
<cmdline>console=ttyS0 panic=-1</cmdline></os>
<devices><emulator>{qemu}</emulator><controller type='usb' model='none'/>
<serial type='null'/><serial type='null'/>
<memballoon model='virtio'><stats period='{interval_s}'/></memballoon></devices>
<qemu:commandline><qemu:arg value='-qmp'/><qemu:arg value='unix:{socket},server=on,wait=off'/>
</qemu:commandline></domain>
"""


# ---- libvirt's client library; in a process of its own ----


class _Statistic(ctypes.Structure):
    _fields_ = (("tag", ctypes.c_int), ("value", ctypes.c_ulonglong))


class Connection:
    """A connection of libvirt's client library to a daemon."""

    def __init__(self, uri: str) -> None:
        self._library = ctypes.CDLL(ctypes.util.find_library("virt") or "libvirt.so.0")
        for name in ("virConnectOpen", "virDomainLookupByName", "virDomainCreateXML"):
            getattr(self._library, name).restype = ctypes.c_void_p
        self._connection = ctypes.c_void_p(self._library.virConnectOpen(uri.encode()))
        if self._connection.value is None:
            raise BenchError(f"libvirt does not connect to {uri}")

    def create(self, xml: str) -> ctypes.c_void_p:
        """Start a domain that ends with this connection."""
        return ctypes.c_void_p(
            self._library.virDomainCreateXML(self._connection, xml.encode(), _DESTROY_WITH_CONNECTION)
        )

    def find(self, name: str) -> ctypes.c_void_p:
        """Return a domain."""
        return ctypes.c_void_p(self._library.virDomainLookupByName(self._connection, name.encode()))

    def statistics(self, domain: ctypes.c_void_p) -> dict[int, int]:
        """Return the memory statistics of a domain by their tag; empty after an error."""
        statistics = (_Statistic * _MOST_STATISTICS)()
        count = self._library.virDomainMemoryStats(domain, statistics, _MOST_STATISTICS, 0)
        return {each.tag: each.value for each in statistics[: max(0, count)]}


def keep(uri: str, files: Sequence[str]) -> None:
    """Start the domains, print ``ready`` when all report statistics, and keep them until SIGTERM."""
    connection = Connection(uri)
    domains = [connection.create(Path(file).read_text()) for file in files]
    ends_s = time.monotonic() + _BOOT_S
    while any(len(connection.statistics(domain)) < _REPORTED for domain in domains):
        if any(domain.value is None for domain in domains) or time.monotonic() > ends_s:
            sys.exit("a domain did not start, or does not report statistics")
        time.sleep(0.5)
    print("ready", flush=True)
    signal.pause()


def poll(uri: str, names: Sequence[str]) -> None:
    """Read the statistics of each domain once per interval, spread over it, until SIGTERM."""
    connection = Connection(uri)
    domains = [connection.find(name) for name in names]
    print("polling", flush=True)
    due_s = time.monotonic()
    while True:
        for domain in domains:
            due_s += INTERVAL_S / len(domains)
            time.sleep(max(0.0, due_s - time.monotonic()))
            if len(connection.statistics(domain)) < _REPORTED:
                sys.exit("libvirt reports no statistics")


# ---- the benchmark ----


@dataclass(slots=True)
class Figures:
    """Processor time per poll of a guest in microseconds, one value per turn."""

    guests: int
    daemon_us: list[float] = field(default_factory=list)  # libvirtd
    client_us: list[float] = field(default_factory=list)  # of libvirt
    bare_us: list[float] = field(default_factory=list)
    agent_us: list[float] = field(default_factory=list)
    agent_requests: list[float] = field(default_factory=list)  # QMP requests, where libvirt polls once


@dataclass(frozen=True, slots=True)
class Place:
    """The files of a private libvirtd and its domains."""

    environment: dict[str, str]
    runtime: Path
    definitions: list[str]  # a file of XML for each domain
    sockets: list[str]  # of the monitors

    @property
    def listening(self) -> Path:
        """The socket of libvirtd."""
        return self.runtime / "libvirt" / "libvirt-sock"

    @property
    def uri(self) -> str:
        """What libvirt's client connects to."""
        return f"qemu+unix:///session?socket={self.listening}"


def prepare(directory: Path, count: int) -> Place:
    """Write the files of a private libvirtd with this many domains.

    Raises:
        LabError: the guest image cannot be built.
    """
    image = guest_image()
    directory.chmod(0o755)  # QEMU runs as another user
    environment: dict[str, str] = {}
    for name, variables in (
        ("run", ("XDG_RUNTIME_DIR",)),
        ("home", ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME")),
    ):
        path = directory / name
        path.mkdir()
        if os.geteuid() == 0:
            os.chown(path, int(_NOBODY), int(_NOBODY))
        environment |= dict.fromkeys(variables, str(path))
    kernel, initramfs = directory / "kernel", directory / "initramfs"
    for source, copy in ((image.kernel, kernel), (image.initramfs, initramfs)):
        shutil.copyfile(source, copy)
        copy.chmod(0o644)
    place = Place(environment, directory / "run", [], [])
    for number in range(count):
        socket, definition = place.runtime / f"guest{number}.qmp", directory / f"guest{number}.xml"
        definition.write_text(
            _DOMAIN.format(
                name=socket.stem,
                kernel=kernel,
                initramfs=initramfs,
                qemu=find_program(QEMU),
                socket=socket,
                interval_s=INTERVAL_S,
            )
        )
        place.definitions.append(str(definition))
        place.sockets.append(str(socket))
    return place


@asynccontextmanager
async def domains(place: Place) -> AsyncGenerator[Process, None]:
    """Run a private libvirtd with its guests; yield its process.

    Raises:
        BenchError: libvirt is not installed, or a domain did not start.
    """
    daemon = shutil.which("libvirtd", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if daemon is None:
        raise BenchError(f"libvirtd is not installed; apt-get install --no-install-recommends {PACKAGES}")
    user = ["setpriv", "--reuid", _NOBODY, "--regid", _NOBODY, "--clear-groups"] if os.geteuid() == 0 else []
    ending = ["setpriv", "--pdeathsig", "KILL"]  # a change of the user clears it
    try:
        async with running(*user, *ending, daemon, env=place.environment) as process:
            await eventually(
                lambda: _listens(process, place.listening), bool, timeout_s=TIMEOUT_S, what="libvirtd listens"
            )
            async with running(sys.executable, __file__, "--keep", place.uri, *place.definitions) as keeper:
                await keeper.logged(lambda line: line == "ready", timeout_s=_BOOT_S)
                yield process
    finally:
        _kill_left(place.runtime)


async def _listens(process: Process, path: Path) -> bool:
    if process.ended:
        raise BenchError("libvirtd ended" + "".join(f"\n    {line}" for _, line in process.lines))
    return await asyncio.to_thread(path.exists)


def _kill_left(runtime: Path) -> None:
    """Kill QEMUs that libvirtd left when it ended too early."""
    for file in runtime.glob("libvirt/qemu/run/*.pid"):
        with suppress(OSError, ValueError):
            pid = int(file.read_text())
            if str(runtime).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)


async def measured(count: int, rounds: int, window_s: float) -> Figures:
    """Measure all three in turns.

    Raises:
        BenchError, LabError: a program is missing, or ended.
    """
    figures = Figures(count)
    polls = count * window_s / INTERVAL_S
    with tempfile.TemporaryDirectory(prefix="qb-", dir="/tmp") as name:
        directory = Path(name)
        print("booting the guests ...", file=sys.stderr, flush=True)
        place = await asyncio.to_thread(prepare, directory, count)
        sockets = place.sockets
        async with domains(place) as daemon:
            for turn in range(rounds):
                print(f"turn {turn + 1} of {rounds} ...", file=sys.stderr, flush=True)
                names = [Path(socket).stem for socket in sockets]
                async with running(sys.executable, __file__, "--poll", place.uri, *names) as client:
                    await client.logged(lambda line: line == "polling")
                    await asyncio.sleep(_SETTLE_S)
                    daemon_s, client_s = await _spent_s((daemon, client), window_s)
                    if client.ended:
                        raise BenchError("the client of libvirt ended: " + client.lines[-1][1])
                figures.daemon_us.append(daemon_s / polls * 1e6)
                figures.client_us.append(client_s / polls * 1e6)
                async with bare_client(sockets) as bare:
                    await asyncio.sleep(_SETTLE_S)
                    (spent_s,) = await _spent_s((bare,), window_s)
                figures.bare_us.append(spent_s / polls * 1e6)
                async with (
                    LabBroker(directory, name="libvirt") as broker,
                    agent(directory, sockets, broker.url) as process,
                ):
                    online = await wait_online(broker, count, TIMEOUT_S)
                    if online.all_at_s is None:
                        raise BenchError(f"{online.count} of {count} VMs are online after {TIMEOUT_S:g} s")
                    await asyncio.sleep(_SETTLE_S)
                    writes = process.writes()
                    (spent_s,) = await _spent_s((process,), window_s)
                    writes = process.writes() - writes
                figures.agent_requests.append(writes / polls)
                figures.agent_us.append(spent_s / polls * 1e6)
    return figures


async def _spent_s(processes: Sequence[Process], window_s: float) -> list[float]:
    before_s = [process.cpu_s() for process in processes]
    await asyncio.sleep(window_s)
    return [process.cpu_s() - before for process, before in zip(processes, before_s, strict=True)]


def table(figures: Figures) -> str:
    """Return the figures as text."""
    daemon, client = median(figures.daemon_us), median(figures.client_us)
    bare, agent_us = median(figures.bare_us), median(figures.agent_us)
    return "\n".join(
        [
            f"{figures.guests} real guests, one poll a second: processor time per guest and second",
            f"  libvirt      {daemon + client:>5.0f} µs: {daemon:.0f} libvirtd, {client:.0f} its client",
            f"  bare client  {bare:>5.0f} µs",
            f"  agent, MQTT  {agent_us:>5.0f} µs: {agent_us / (daemon + client):.2f} x libvirt, "
            f"{agent_us / bare:.1f} x the bare client; {median(figures.agent_requests):.1f} requests",
        ]
    )


def main() -> int:
    """Run the benchmark; return its exit code: 1 if it could not be run."""
    if sys.argv[1:2] == ["--keep"]:
        keep(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--poll"]:
        poll(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--guests", type=int, default=6, help="real guests of 256 MiB (6)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (3)")
    parser.add_argument("--window-s", type=float, default=8.0, help="seconds of each measurement (8)")
    parser.add_argument("--json", action="store_true", help="all values, as one JSON document")
    options = parser.parse_args()
    end_on_sigterm()
    try:
        figures = asyncio.run(measured(options.guests, options.rounds, options.window_s))
    except (BenchError, LabError) as error:
        print(f"bench-libvirt: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(figures), indent=2) if options.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
