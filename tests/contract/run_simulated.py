"""Runs one simulated QEMU for the contract tests: PATH, the `Start` and the version as Python writes them."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

from both_qemus import Start, Version

from qmpballoon.sim.qemu.server import SimulatedQemu


async def main(path: str, start: Start, version: Version) -> None:
    """Serve until quit, reset with -no-reboot, SIGTERM, or a command on which it aborts."""
    guest, machine = start.specs(version)
    async with SimulatedQemu(path, guest=guest, machine=machine) as qemu:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, qemu.terminate)
        await qemu.exited.wait()
        if qemu.aborted:
            os.abort()


asyncio.run(main(sys.argv[1], eval(sys.argv[2], {"Start": Start}), eval(sys.argv[3], {})))
