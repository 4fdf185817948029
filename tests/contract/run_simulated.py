"""Runs one pretended QEMU for the contract tests: PATH and the `Start` as Python writes it."""

from __future__ import annotations

import asyncio
import signal
import sys

from both_qemus import Start

from qmpballoon.sim.qemu.server import SimulatedQemu


async def main(path: str, start: Start) -> None:
    """Serve until quit, reset with -no-reboot, or SIGTERM."""
    guest, machine = start.specs()
    async with SimulatedQemu(path, guest=guest, machine=machine) as qemu:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, qemu.terminate)
        await qemu.exited.wait()


asyncio.run(main(sys.argv[1], eval(sys.argv[2], {"Start": Start})))
