"""A real QEMU without a guest OS and the simulated one, behind the same methods, and a bare QMP client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.machine import MachineSpec
from qmpballoon.units import MIB

Version = tuple[int, int, int]

QEMU = os.environ.get("QMPBALLOON_QEMU") or "qemu-system-x86_64"
PATIENCE_S = 60.0  # for what takes less than a second on an idle machine
SIZE = 256 * MIB


@dataclass(frozen=True, kw_only=True)
class Start:
    """How a QEMU is started; the balloon is a PCI device."""

    name: str | None = None
    device: str | None = "virtio-balloon-pci"
    device_id: str | None = "balloon0"
    deflate_on_oom: bool = False
    free_page_reporting: bool = False
    stopped: bool = False
    no_reboot: bool = False
    dimm: bool = False
    nvdimm: bool = False

    def arguments(self, path: Path) -> list[str]:
        """Return QEMU's command line."""
        words = ["-accel", "tcg,tb-size=16", "-nodefaults", "-display", "none"]
        words += ["-qmp", f"unix:{path},server=on,wait=off"]
        words += ["-m", "256,slots=4,maxmem=1G" if self.dimm or self.nvdimm else "256"]
        words += ["-M", "pc,nvdimm=on"] * self.nvdimm
        if self.name is not None:
            words += ["-name", self.name]
        if self.device is not None:
            if self.device_id is None:
                words += ["-device", "virtio-serial-pci"]
            device = self.device + (f",id={self.device_id}" if self.device_id else "")
            device += ",deflate-on-oom=on" * self.deflate_on_oom
            words += ["-device", device + ",free-page-reporting=on" * self.free_page_reporting]
        if self.dimm:
            words += ["-object", "memory-backend-ram,id=m0,size=128M"]
            words += ["-device", "pc-dimm,id=dimm0,memdev=m0"]
        if self.nvdimm:
            words += ["-object", "memory-backend-ram,id=m1,size=128M"]
            words += ["-device", "nvdimm,id=nvdimm1,memdev=m1,unarmed=on"]
        words += ["-S"] * self.stopped
        return words + ["-no-reboot"] * self.no_reboot

    def specs(self, version: Version) -> tuple[GuestSpec, MachineSpec]:
        """Return the same for a simulated QEMU of this version, without a balloon driver in its guest."""
        guest = GuestSpec(
            size=SIZE + 128 * MIB * self.dimm,
            driver=False,
            deflate_on_oom=self.deflate_on_oom,
            free_page_reporting=self.free_page_reporting,
        )
        machine = MachineSpec(
            name=self.name,
            device=self.device,
            device_id=self.device_id,
            dimms=(128 * MIB,) * self.dimm,
            nvdimms=(128 * MIB,) * self.nvdimm,
            version=version,
            stopped=self.stopped,
            no_reboot=self.no_reboot,
        )
        return guest, machine


class Qemu(Protocol):
    """One QEMU of either kind, running in a process of its own."""

    path: Path
    pid: int

    async def kill(self, number: int) -> None:
        """Send a signal and wait for the end."""

    async def ended(self) -> int:
        """Wait for it to end by itself; return its exit code."""


@functools.cache
def installed_version() -> Version:
    """Return the version of the QEMU that is first on the PATH."""
    printed = subprocess.run(
        [QEMU, "--version"], capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    found = re.search(r"version (\d+)\.(\d+)\.(\d+)", printed.stdout)
    assert found is not None, printed.stdout
    return int(found[1]), int(found[2]), int(found[3])


class QemuProcess:
    """The methods over a process."""

    def __init__(self, path: Path, process: asyncio.subprocess.Process) -> None:
        self.path = path
        self.pid = process.pid
        self._process = process

    async def kill(self, number: int) -> None:
        """Send a signal and wait for the end."""
        self._process.send_signal(number)
        await self.ended()

    async def ended(self) -> int:
        """Wait for it to end by itself; return its exit code."""
        async with asyncio.timeout(PATIENCE_S):
            return await self._process.wait()


@contextlib.asynccontextmanager
async def running(kind: str, path: Path, start: Start) -> AsyncIterator[Qemu]:
    """Run a QEMU of a kind (``real`` or ``simulated``) that listens on ``path``; end it afterwards.

    The simulated one uses the dialect of the installed version.
    """
    if kind == "real":
        command = [QEMU, *start.arguments(path)]
    else:
        program = str(Path(__file__).with_name("run_simulated.py"))
        command = [sys.executable, program, str(path), repr(start), repr(installed_version())]
    process = await asyncio.create_subprocess_exec(*command, stderr=asyncio.subprocess.DEVNULL)
    try:
        async with asyncio.timeout(PATIENCE_S):
            while not await _listens(path):
                assert process.returncode is None, f"{command[0]} ended with {process.returncode}"
                await asyncio.sleep(0.01)
        yield QemuProcess(path, process)
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()


async def _listens(path: Path) -> bool:
    # from /proc, as a connection would wait in the backlog
    listing = await asyncio.to_thread(Path("/proc/net/unix").read_text)
    return any(line.endswith(f" {os.fspath(path)}") and " 00010000 " in line for line in listing.splitlines())


class Wire:
    """A bare QMP client: bytes out, lines in."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    @contextlib.asynccontextmanager
    async def connected(cls, path: Path) -> AsyncIterator[Wire]:
        """Connect and read nothing yet."""
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_unix_connection(path, limit=2**27)
        wire = cls(reader, writer)
        try:
            yield wire
        finally:
            await wire.close()

    async def close(self) -> None:
        """Close the connection."""
        self._writer.close()
        with contextlib.suppress(ConnectionError):
            await self._writer.wait_closed()

    def send(self, raw: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(raw)

    async def line(self, timeout_s: float = PATIENCE_S) -> bytes:
        """Return the next line, b"" when the other side closed.

        Raises:
            TimeoutError: none was received.
        """
        async with asyncio.timeout(timeout_s):
            return await self._reader.readline()

    async def message(self, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """Return the next message as an object."""
        message = json.loads(await self.line(timeout_s))
        assert isinstance(message, dict)
        return message

    async def negotiate(self) -> dict[str, Any]:
        """Read the greeting and negotiate; return the greeting.

        A real QEMU that reset its guest a moment ago may send events first.
        """
        while "event" in (greeting := await self.message()):
            pass
        assert await self.execute("qmp_capabilities") == {"return": {}}
        return greeting

    async def execute(self, command: str, **arguments: object) -> dict[str, Any]:
        """Send a command; return its reply without the id, and without the events in front of it."""
        reply, _ = await self.execute_with_events(command, **arguments)
        return reply

    async def execute_with_events(
        self, command: str, **arguments: object
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Send a command; return its reply and the events in front of it."""
        self.send(json.dumps({"execute": command, "arguments": arguments, "id": command}).encode())
        events = []
        while "event" in (message := await self.message()):
            events.append(message)
        assert message.pop("id") == command
        return message, events
