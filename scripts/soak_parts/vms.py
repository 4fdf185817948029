"""The VMs of a soak: simulated ones, all served by this process, and real ones."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from qmpballoon.lab.guest import LabGuest
from qmpballoon.lab.require import LabError
from qmpballoon.sim.guest import GuestSpec
from qmpballoon.sim.qemu.faults import Faults
from qmpballoon.sim.qemu.machine import Json, MachineSpec
from qmpballoon.sim.qemu.process import listen_in_child
from qmpballoon.sim.qemu.server import SimulatedQemu
from qmpballoon.units import MIB

SIMULATED_SIZE: Final = 128 * MIB
REAL_SIZE: Final = 160 * MIB
_BASE: Final = 24 * MIB  # of its kernel
_DEMAND_MIB: Final = (0, 24)  # of a simulated guest
_CACHE_MIB: Final = (0, 12)
_HOLD_MIB: Final = (0, 24)  # of a real guest: its kernel holds 60 MiB, a third of its size stays free
_HOLD_RATE_MIB: Final = 8  # per second: less than the agent gives back while it answers
_COMMAND_S: Final = 20.0
_TERMINATED_S: Final = 10.0
_KEPT_COMMANDS: Final = 400

# Forked into the process of each simulated QEMU, where it counts as RSS: with less than its guest holds, the
# agent would refute what the guest reports.
_BALLAST: Final = b"." * (32 * MIB)

MUTE: Final = ("silent-greeting", "silent-to=*")
FAULTS: Final = (
    ("reply-delay-s=0.3",),
    ("reply-delay-s=3",),
    ("cut-after-bytes=3000",),
    ("half-reply-to=query-balloon",),
    ("silent-to=qom-get",),
    ("refuse=balloon",),
    ("babble=random-bytes",),
    ("babble=id-twice",),
    ("babble=unknown-id",),
    ("event-flood=20",),
    ("reply-padding=20000",),
)


@dataclass(frozen=True, slots=True)
class Moved:
    """A `balloon` command that a simulated QEMU received, on the monotonic clock."""

    vm: str
    at_s: float
    target: int


@dataclass(frozen=True, slots=True)
class Truth:
    """What a second monitor says of a VM."""

    actual: int
    run_state: str
    target: Moved | None  # the last that QEMU received in this life; None: none, or not known


class SoakVm(Protocol):
    """What the actions need of a VM. ``busy``: an action has it, or its process does not run."""

    name: str
    busy: bool

    async def kill(self) -> None:
        """End it by SIGKILL: its socket file stays."""

    async def terminate(self) -> None:
        """End it by SIGTERM."""

    async def start(self) -> None:
        """Start it at the same path."""

    def stop(self) -> None:
        """Stop its process: SIGSTOP."""

    def cont(self) -> None:
        """Continue its process: SIGCONT."""

    async def close(self) -> None:
        """End it and remove its files."""

    async def truth(self) -> Truth:
        """Return what it says itself.

        Raises:
            LabError: it does not answer.
        """

    async def work(self, rng: random.Random) -> None:
        """Change what its workload holds."""


class RecordedQemu(SimulatedQemu):
    """A simulated QEMU that records its `balloon` commands."""

    def __init__(self, path: Path, child: int, moves: deque[Moved], **settings: object) -> None:
        super().__init__(path, **settings)  # type: ignore[arg-type]
        self.child = child
        self.moves = moves
        self.target: Moved | None = None

    def execute(self, command: str, arguments: Mapping[str, object]) -> Json:
        """Execute a command; record it if it moves the balloon."""
        result = super().execute(command, arguments)
        value = arguments.get("value")
        if command == "balloon" and isinstance(value, int):
            self.target = Moved(self.path.stem, time.monotonic(), value)
            self.moves.append(self.target)
        return result


class SimulatedVm:
    """A simulated QEMU at a path, and those that follow it there."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.path = directory / f"{name}.qmp"
        self.busy = False
        self.moves: deque[Moved] = deque(maxlen=_KEPT_COMMANDS)  # not yet judged
        self._qemu: RecordedQemu | None = None

    @property
    def qemu(self) -> RecordedQemu:
        """The QEMU that listens at the path."""
        if self._qemu is None:
            raise LabError(f"{self.name} is not started")
        return self._qemu

    async def start(self, *, booted: bool = False) -> None:
        """Start a QEMU; its guest boots unless ``booted``."""
        child, listeners = listen_in_child([self.path], SIMULATED_SIZE)
        self._qemu = RecordedQemu(
            self.path,
            child,
            self.moves,
            listeners=listeners,
            guest=GuestSpec(size=SIMULATED_SIZE, base=_BASE),
            machine=MachineSpec(name=self.name),
            booted=booted,
        )
        await self._qemu.__aenter__()

    async def kill(self) -> None:
        """End it as by SIGKILL."""
        if self._qemu is not None:
            self._end(self._qemu)
            self._qemu = None

    async def terminate(self) -> None:
        """End it as by SIGTERM: SHUTDOWN is sent, the socket file is removed."""
        if self._qemu is not None:
            self._qemu.terminate()
        await self.kill()

    async def replace(self, after_s: float) -> None:
        """Let another QEMU take the path while this one runs; end this one ``after_s`` later."""
        before = self.qemu
        await self.start()
        await asyncio.sleep(after_s)
        self._end(before)

    def stop(self) -> None:
        """Answer nothing any more, and show a stopped process."""
        self.qemu.faults = Faults.parse(MUTE)
        os.kill(self.qemu.child, signal.SIGSTOP)

    def cont(self) -> None:
        """Answer again; clients that were accepted without a greeting are disconnected."""
        os.kill(self.qemu.child, signal.SIGCONT)
        self.qemu.faults = Faults()
        self.qemu.drop_clients()

    def set_faults(self, words: tuple[str, ...]) -> None:
        """Put other faults in force; none without words."""
        self.qemu.faults = Faults.parse(words)

    async def close(self) -> None:
        """End it and remove its socket."""
        await self.kill()
        self.path.unlink(missing_ok=True)

    async def truth(self) -> Truth:
        """Return the state of its machine."""
        machine = self.qemu.machine
        return Truth(machine.guest.actual, machine.run_state, self.qemu.target)

    async def work(self, rng: random.Random) -> None:
        """Change the guest's demand."""
        demand, cache = rng.randint(*_DEMAND_MIB) * MIB, rng.randint(*_CACHE_MIB) * MIB
        if self._qemu is not None:
            self._qemu.set_demand(demand, cache)

    @staticmethod
    def _end(qemu: RecordedQemu) -> None:
        qemu.die()
        with suppress(ProcessLookupError):
            os.kill(qemu.child, signal.SIGKILL)
        os.waitpid(qemu.child, 0)


class RealVm:
    """A real QEMU with a Linux guest."""

    def __init__(self, guest: LabGuest) -> None:
        self.name = guest.name
        self.busy = False
        self.guest = guest
        self.kills = 0  # in the guest's present life

    async def kill(self) -> None:
        """End it by SIGKILL."""
        await self.guest.kill()

    async def terminate(self) -> None:
        """End it by SIGTERM; by SIGKILL if it hangs.

        QEMU 7.2 was seen to hang in its clean-up when its client had just left.
        """
        program = self.guest.program
        program.signal(signal.SIGTERM)
        with suppress(LabError):
            await program.ended(timeout_s=_TERMINATED_S)
        await self.guest.kill()

    async def start(self) -> None:
        """Start it again: it resumes the saved state of a booted guest."""
        self.kills = 0
        await self.guest.start()
        await self.guest.booted()

    def stop(self) -> None:
        """Stop its process."""
        self.guest.stop()

    def cont(self) -> None:
        """Continue its process."""
        self.guest.cont()

    async def close(self) -> None:
        """End it; `Lab` removes its files."""
        await self.guest.close()

    async def truth(self) -> Truth:
        """Return what its second monitor says."""
        return Truth(await self.guest.monitor.actual(), await self.guest.monitor.status(), None)

    async def work(self, rng: random.Random) -> None:
        """Let its workload grow or shrink."""
        await self.guest.command(f"grow {rng.randint(*_HOLD_MIB)} {_HOLD_RATE_MIB}", timeout_s=_COMMAND_S)

    async def new_kills(self) -> int:
        """Return how often the guest's kernel killed the workload since the last call."""
        kills = (await self.guest.figures(timeout_s=_COMMAND_S)).kills
        new, self.kills = kills - self.kills, kills
        return max(0, new)
