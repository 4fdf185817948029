"""A real QEMU whose guest is the test: it plays the balloon driver over QEMU's qtest protocol.

Its processor halts at the first instruction. The driver is a legacy one: virtio 1.0, section 4.1.4.8.
Sources: QEMU system/qtest.c; Linux include/uapi/linux/virtio_balloon.h and virtio_ring.h.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from qmpballoon.lab.guest import QEMU
from qmpballoon.lab.process import Program
from qmpballoon.lab.waiting import eventually

STATISTICS: Final = 1 << 1  # features
DEFLATE_ON_OOM: Final = 1 << 2
REPORTING: Final = 1 << 5

FIGURE: Final = struct.pack("<HQ", 4, 100 * 1024**2)  # a sample of one figure: free memory

PATIENCE_S: Final = 60.0  # for what takes less than a second on an idle machine
_SLOT: Final = 5
_PORTS: Final = 0xC000
_RING: Final = 0x100000  # where the queue of statistics is in the guest's memory
_BUFFER: Final = 0x200000
_STATISTICS_QUEUE: Final = 2
_ALIVE: Final = 3  # acknowledged, and there is a driver
_DRIVER_OK: Final = 7
_HALT: Final = b"\xfa\xf4"  # cli, hlt: nothing wakes it
_ROM_BYTES: Final = 65536


class PlayedDriver:
    """The driver; ``path`` is the monitor of its QEMU."""

    def __init__(self, path: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.path = path
        self._reader = reader
        self._writer = writer

    async def load(self, features: int) -> None:
        """Come up with these features of those that are offered."""
        await self._configure(0x10, "outl", _PORTS | 1)
        await self._configure(0x04, "outw", 5)  # answers ports, reads and writes memory
        await self._do("outb", _PORTS + 18, 0)
        await self._do("outb", _PORTS + 18, _ALIVE)
        await self._do("outl", _PORTS + 4, features)
        if features & STATISTICS:
            await self._do("outw", _PORTS + 14, _STATISTICS_QUEUE)
            await self._do("outl", _PORTS + 8, _RING >> 12)
        await self._do("outb", _PORTS + 18, _DRIVER_OK)

    async def send_statistics(self, packed: bytes) -> None:
        """Send one sample; less than ten bytes have no figure."""
        entries = int(await self._do("inw", _PORTS + 12), 16)
        await self._write(_BUFFER, packed)
        await self._write(_RING, struct.pack("<QIHH", _BUFFER, len(packed), 0, 0))
        await self._write(_RING + 16 * entries, struct.pack("<HHH", 0, 1, 0))
        await self._do("outw", _PORTS + 16, _STATISTICS_QUEUE)

    async def _configure(self, register: int, write: str, value: int) -> None:
        await self._do("outl", 0xCF8, 0x80000000 | _SLOT << 11 | register)
        await self._do(write, 0xCFC, value)

    async def _write(self, address: int, content: bytes) -> None:
        await self._ask(f"write {address:#x} {len(content):#x} 0x{content.hex()}")

    async def _do(self, command: str, *numbers: int) -> str:
        return await self._ask(" ".join((command, *(f"{number:#x}" for number in numbers))))

    async def _ask(self, line: str) -> str:
        self._writer.write(f"{line}\n".encode())
        async with asyncio.timeout(PATIENCE_S):
            answer = (await self._reader.readline()).decode().split()
        assert answer[:1] == ["OK"], (line, answer)
        return answer[1] if len(answer) > 1 else ""


@asynccontextmanager
async def played_driver(directory: Path, *arguments: str) -> AsyncIterator[PlayedDriver]:
    """Start such a QEMU with a balloon that offers everything; its monitor is ``played.qmp``."""
    monitor, protocol = directory / "played.qmp", directory / "played.qtest"
    device = f"virtio-balloon-pci,id=balloon0,addr={_SLOT},disable-modern=on"
    firmware = directory / "played.rom"
    firmware.write_bytes(_HALT * (_ROM_BYTES // len(_HALT)))
    command = [
        QEMU,
        "-accel",
        "tcg,tb-size=16",
        "-bios",
        str(firmware),
        "-m",
        "64",
        "-nodefaults",
        "-display",
        "none",
        "-name",
        "played",
    ]
    command += ["-device", f"{device},deflate-on-oom=on,free-page-reporting=on"]
    command += ["-qtest", f"unix:{protocol},server=on,wait=off", "-qtest-log", "none"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off", *arguments]
    program = Program(command, log=directory / "played.log")
    try:

        async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
            assert program.exit_status is None, program.failure("did not start")
            if not monitor.exists():
                return None
            try:
                return await asyncio.open_unix_connection(protocol)
            except (FileNotFoundError, ConnectionRefusedError):  # not yet
                return None

        streams = await eventually(
            connected, bool, timeout_s=PATIENCE_S, what="QEMU listens", interval_s=0.01
        )
        assert streams is not None
        reader, writer = streams
        try:
            yield PlayedDriver(monitor, reader, writer)
        finally:
            writer.close()
    finally:
        program.destroy()
