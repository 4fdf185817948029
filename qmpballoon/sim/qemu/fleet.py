"""Many simulated QEMUs that one process serves: the time of each sample, and commands to all of them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import Json, MachineSpec
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

# Anonymous memory and page cache; more than 2 % of any of them changes, so each sample is published.
_BUSY_DEMANDS: Final = ((48 * MIB, 24 * MIB), (56 * MIB, 28 * MIB), (52 * MIB, 32 * MIB))


class Meter:
    """Records the time between two reads of the statistics of each guest."""

    def __init__(self) -> None:
        self.busy = False  # all figures of each guest change from sample to sample
        self._samples = 0
        self._gaps_s: list[float] = []

    def record(self, gap_s: float | None) -> None:
        """Record one sample; None: it is the first of its guest."""
        self._samples += 1
        if gap_s is not None:
            self._gaps_s.append(gap_s)

    def take(self) -> dict[str, object]:
        """Return the number of samples and the gaps in seconds since the last call."""
        taken = {"samples": self._samples, "gaps_s": self._gaps_s}
        self._samples, self._gaps_s = 0, []
        return taken


class MeteredQemu(SimulatedQemu):
    """A simulated QEMU that records each read of its guest's statistics."""

    def __init__(
        self,
        *paths: Path,
        meter: Meter,
        listeners: Sequence[socket.socket],
        guest: GuestSpec,
        machine: MachineSpec,
        faults: Faults,
        booted: bool,
    ) -> None:
        super().__init__(
            *paths, guest=guest, machine=machine, faults=faults, booted=booted, listeners=listeners
        )
        self._meter = meter
        self._sampled_at_s: float | None = None
        self._sampled = 0

    def execute(self, command: str, arguments: Mapping[str, object]) -> Json:
        """Execute a command; count it if it reads the statistics."""
        result = super().execute(command, arguments)
        if command == "qom-get" and arguments.get("property") == "guest-stats":
            now_s = time.monotonic()
            self._meter.record(None if self._sampled_at_s is None else now_s - self._sampled_at_s)
            self._sampled_at_s = now_s
            self._sampled += 1
            if self._meter.busy:
                self.guest.set_demand(*_BUSY_DEMANDS[self._sampled % len(_BUSY_DEMANDS)])
        return result


def obey(meter: Meter, write: Callable[[str], object]) -> None:
    """Execute the commands ``busy``, ``quiet`` and ``report`` from stdin, one per line.

    ``report`` writes what `Meter.take` returns as one line of JSON.
    """
    loop = asyncio.get_running_loop()

    def read() -> None:
        received = os.read(0, 4096)
        if not received:
            loop.remove_reader(0)
        for word in received.decode(errors="replace").split():
            if word == "report":
                write(json.dumps(meter.take()) + "\n")
            else:
                meter.busy = word == "busy"

    with suppress(PermissionError):  # a file, or /dev/null: nobody writes words
        loop.add_reader(0, read)


def event_loop() -> asyncio.AbstractEventLoop:
    """Return a new event loop: uvloop's, which is faster, where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()
