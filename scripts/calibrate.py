"""Comparison of real guests with simulated ones: ``scripts/calibrate.py [--json]``.

The same scripts run on a real guest and on a `qmpballoon.sim.guest.SimulatedGuest`: growth until the kernel
kills, a target below what can be given, a shrink and its release, a reset. If simulated guests survive longer
than real ones, unsafe policies look safe, so run this script after every change of the simulator.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from typing import Final, Protocol

from qmpballoon.lab.guest import BalloonDevice, LabGuest
from qmpballoon.lab.image import guest_image
from qmpballoon.lab.lab import Lab
from qmpballoon.lab.require import LabError
from qmpballoon.sim.guest import GuestSpec, SimulatedGuest
from qmpballoon.sim.kernels import kernel_like
from qmpballoon.units import MIB

SIZE: Final = 224 * MIB
SQUEEZED: Final = 128 * MIB  # actual at the start of growth
RATES_MIB_PER_S: Final = (8, 20, 40)
RELEASED: Final = 100 * MIB
LATER_S: Final = 5.0
SAMPLE_EVERY_S: Final = 0.01
PARALLEL_GUESTS: Final = 3  # real ones
_SIMULATED_STEP_S: Final = 0.002
_TIMEOUT_S: Final = 40.0  # of any scene
_SETTLED_S: Final = 3.0  # without progress; guests are slow on a busy machine


@dataclass(frozen=True, slots=True)
class Look:
    """A guest's figures at one moment, in bytes."""

    actual: int
    total: int
    available: int
    held: int
    kills: int


class Subject(Protocol):
    """A guest, real or simulated, on its own clock."""

    async def look(self) -> Look:
        """Return its figures now."""
        ...

    def now_s(self) -> float:
        """Return the time on its clock."""
        ...

    async def pause(self, seconds: float) -> None:
        """Let time pass."""
        ...

    async def set_target(self, target: int) -> None:
        """Ask for an ``actual`` in bytes."""
        ...

    async def grow(self, mib: int, mib_per_s: int) -> None:
        """Let the workload grow to a size, from now on."""
        ...

    def held_at_kill(self) -> int:
        """Return the bytes that the workload held at its last kill; 0 if only samples show it."""
        ...

    async def reset_until_driver(self) -> float:
        """Reset it; return the seconds until its driver is up again."""
        ...


class Real:
    """A lab guest."""

    def __init__(self, guest: LabGuest) -> None:
        self.guest = guest

    async def look(self) -> Look:
        """Return its figures now; ``actual`` is read later and may not match while the balloon moves."""
        memory, sample = await self.guest.guest_memory(), await self.guest.figures()
        return Look(
            await self.guest.monitor.actual(),
            memory.total,
            sample.available,
            sample.held,
            sample.kills,
        )

    def now_s(self) -> float:
        """Return the monotonic time."""
        return time.monotonic()

    async def pause(self, seconds: float) -> None:
        """Sleep."""
        await asyncio.sleep(seconds)

    async def set_target(self, target: int) -> None:
        """Ask for an ``actual`` in bytes."""
        await self.guest.monitor.set_target(target)

    async def grow(self, mib: int, mib_per_s: int) -> None:
        """Let the workload grow to a size, from now on."""
        await self.guest.command(f"grow {mib} {mib_per_s}")

    def held_at_kill(self) -> int:
        """Return the size of the process that the guest's kernel logged as killed."""
        killed = re.findall(r"Killed process .* anon-rss:([0-9]+)kB", self.guest.console.read_text())
        return int(killed[-1]) * 1024 if killed else 0

    async def reset_until_driver(self) -> float:
        """Reset it by QEMU; return the seconds until it takes commands, with its driver loaded."""
        begun_s, boots = time.monotonic(), self.guest.boots
        await self.guest.monitor.execute("system_reset")
        await self.guest.booted(boots=max(1, boots) + 1)
        return time.monotonic() - begun_s


class Simulated:
    """A simulated guest; its workload grows in small steps."""

    def __init__(self, guest: SimulatedGuest) -> None:
        self.guest = guest
        self._clock_s = guest.now_s
        self._growth: tuple[float, int, int, int] | None = None  # since, from, to, bytes per second

    async def look(self) -> Look:
        """Return its figures now."""
        guest = self.guest
        total = guest.size - guest.spec.unseen - (0 if guest.spec.deflate_on_oom else guest.balloon)
        return Look(guest.actual, total, guest.available, guest.anonymous, guest.oom_kills)

    def now_s(self) -> float:
        """Return the virtual time."""
        return self._clock_s

    async def pause(self, seconds: float) -> None:
        """Let virtual time pass."""
        until_s = self._clock_s + seconds
        while self._clock_s < until_s:
            self._clock_s = min(until_s, self._clock_s + _SIMULATED_STEP_S)
            self.guest.advance(self._clock_s)
            if self._growth is not None and not self.guest.oom_kills:
                since_s, start, end, rate = self._growth
                self.guest.set_demand(min(end, start + int((self._clock_s - since_s) * rate)))

    async def set_target(self, target: int) -> None:
        """Ask for an ``actual`` in bytes."""
        self.guest.set_target(target)

    async def grow(self, mib: int, mib_per_s: int) -> None:
        """Let the workload grow to a size, from now on."""
        self._growth = (self._clock_s, self.guest.anonymous, mib * MIB, mib_per_s * MIB)

    def held_at_kill(self) -> int:
        """Return 0: on a virtual clock samples are dense enough."""
        return 0

    async def reset_until_driver(self) -> float:
        """Reset it; return the seconds until its driver is loaded."""
        begun_s = self._clock_s
        self.guest.reset()
        while not self.guest.driver_loaded and self._clock_s < begun_s + _TIMEOUT_S:
            await self.pause(0.05)
        return self._clock_s - begun_s


# ── the scenes: each returns figures, in MiB, MiB/s and seconds ──────────────────────────────────────


async def at_rest(subject: Subject) -> dict[str, float]:
    """A guest with an empty balloon and no workload."""
    look = await subject.look()  # the balloon does not move, so ``actual`` fits the rest
    return {"base": (look.actual - look.available) / MIB, "unseen": (look.actual - look.total) / MIB}


async def squeezed(subject: Subject) -> dict[str, float]:
    """A shrink, a grow, and a target that it cannot reach: its rates, and where inflation stops."""
    inflate_s = await _moved(subject, SQUEEZED)
    inflated = SIZE - SQUEEZED
    deflate_s = await _moved(subject, SIZE)
    await subject.set_target(40 * MIB)
    stopped = await _still(subject)
    return {
        "inflates at": inflated / MIB / max(inflate_s, 1e-3),
        "deflates at": inflated / MIB / max(deflate_s, 1e-3),
        "available where inflation stops": stopped.available / MIB,
        "actual where inflation stops": stopped.actual / MIB,
    }


def starved(mib_per_s: int) -> Callable[[Subject], Awaitable[dict[str, float]]]:
    """Return a scene: growth from a squeezed balloon until the kernel kills."""

    async def scene(subject: Subject) -> dict[str, float]:
        looks = await _grown_until_killed(subject, mib_per_s)
        thinnest, held = min(looks, key=lambda look: look.available), _most_held(subject, looks)
        available = thinnest.available - (held - thinnest.held)  # what was held after that sample
        return {
            f"available before the kill at {mib_per_s} MiB/s": available / MIB,
            f"held before the kill at {mib_per_s} MiB/s": held / MIB,
        }

    return scene


async def starved_with_deflate_on_oom(subject: Subject) -> dict[str, float]:
    """The same with deflate-on-oom: the kernel kills only when the balloon is empty."""
    looks = await _grown_until_killed(subject, 20)
    return {
        "held before the kill with deflate-on-oom": _most_held(subject, looks) / MIB,
        "balloon at the kill with deflate-on-oom": (SIZE - max(one.actual for one in looks)) / MIB,
    }


async def kept_by_deflate_on_oom(subject: Subject) -> dict[str, float]:
    """Available memory that deflate-on-oom keeps during growth."""
    await _moved(subject, SQUEEZED)
    await subject.grow(100, 20)
    least, end_s = SIZE, subject.now_s() + 12
    while (look := await subject.look()).held < 100 * MIB and subject.now_s() < end_s:
        least = min(least, look.available)
        await subject.pause(SAMPLE_EVERY_S)
    return {"available kept by deflate-on-oom": least / MIB, "kills with deflate-on-oom": float(look.kills)}


async def released(subject: Subject) -> dict[str, float]:
    """A workload that frees its memory: the part that is not counted as available, at once and later."""
    before = await subject.look()
    await _held(subject, RELEASED // MIB)
    await _held(subject, 0)
    at_once = await subject.look()
    await subject.pause(LATER_S)
    later = await subject.look()
    return {
        f"not counted of {RELEASED // MIB} MiB released": (before.available - at_once.available) / MIB,
        f"not counted {LATER_S:g} s later": (before.available - later.available) / MIB,
    }


async def reset(subject: Subject) -> dict[str, float]:
    """A reset: the time until its driver is up."""
    return {"boots in": await subject.reset_until_driver()}


async def _held(subject: Subject, mib: int) -> None:
    """Let the workload hold this much as fast as possible."""
    await subject.grow(mib, 1000)
    end_s = subject.now_s() + _TIMEOUT_S
    while (await subject.look()).held != mib * MIB:
        if subject.now_s() > end_s:
            raise LabError(f"the workload does not hold {mib} MiB")
        await subject.pause(SAMPLE_EVERY_S)


async def _moved(subject: Subject, target: int) -> float:
    """Move the balloon; return the duration in seconds."""
    begun_s = subject.now_s()
    await subject.set_target(target)
    while abs((await subject.look()).actual - target) > MIB:
        if subject.now_s() > begun_s + _TIMEOUT_S:
            raise LabError(f"the balloon did not reach {target // MIB} MiB")
        await subject.pause(SAMPLE_EVERY_S / 5)
    return subject.now_s() - begun_s


async def _still(subject: Subject) -> Look:
    """Wait until the balloon makes no progress; return the last sample."""
    look, since_s = await subject.look(), subject.now_s()
    while subject.now_s() < since_s + _SETTLED_S:
        await subject.pause(SAMPLE_EVERY_S)
        before, look = look, await subject.look()
        if abs(look.actual - before.actual) >= MIB // 4:
            since_s = subject.now_s()
    return look


def _most_held(subject: Subject, looks: list[Look]) -> int:
    """Return the largest held memory; samples of a real guest are sparse on a busy machine."""
    return max(subject.held_at_kill(), *(look.held for look in looks))


async def _grown_until_killed(subject: Subject, mib_per_s: int) -> list[Look]:
    """Let the workload grow until it is killed; return the samples before the kill is reported.

    In the last one the workload has ended already, because its parent is notified slightly later.
    """
    await _moved(subject, SQUEEZED)
    looks = [await subject.look()]
    await subject.grow(SIZE // MIB, mib_per_s)
    end_s = subject.now_s() + _TIMEOUT_S
    while not (look := await subject.look()).kills:
        looks.append(look)
        if subject.now_s() > end_s:
            raise LabError(f"no process was killed; the last sample is {look}")
        await subject.pause(SAMPLE_EVERY_S)
    return looks


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Compared:
    """One figure of both guests. ``tolerance`` is in its unit; None: a time, which depends on the machine."""

    figure: str
    real: float
    simulated: float
    tolerance: float | None

    @property
    def agrees(self) -> bool:
        """Whether the simulated guest matches the real one."""
        return self.tolerance is None or abs(self.real - self.simulated) <= self.tolerance


Scene = Callable[[Subject], Awaitable[dict[str, float]]]

SCENES: Final[tuple[tuple[Scene, bool], ...]] = (
    (at_rest, False),
    (squeezed, False),
    *((starved(rate), False) for rate in RATES_MIB_PER_S),
    (starved_with_deflate_on_oom, True),
    (kept_by_deflate_on_oom, True),
    (released, False),
    (reset, False),
)
"""Each scene, and whether its guest has deflate-on-oom."""

_TIMED: Final = ("inflates at", "deflates at", "boots in")
_TOLERANCES_MIB: Final = {
    "base": 6.0,
    "unseen": 4.0,
    "available where": 3.0,
    "actual where": 8.0,
    "available before": 2.5,
    "held before": 8.0,
    "balloon at": 8.0,
    "available kept": 4.0,
    "kills with": 0.0,
    "not counted": 6.0,
}


async def compared() -> list[Compared]:
    """Run all scenes on both and return the figures.

    Raises:
        LabError: the real guests cannot be started or do not follow the script.
    """
    image = await asyncio.to_thread(guest_image, _report)
    kernel = kernel_like(image.release)
    _report(f"guests of Linux {image.release} beside simulated ones of {kernel.release}")
    async with Lab(progress=_report) as lab:
        slots = asyncio.Semaphore(PARALLEL_GUESTS)

        async def played(scene: Scene, balloon: BalloonDevice) -> dict[str, float]:
            guest = await lab.guest(memory=SIZE, balloon=balloon)
            try:
                return await scene(Real(guest))
            finally:
                await guest.close()

        async def play(scene: Scene, deflate_on_oom: bool) -> list[Compared]:
            balloon = BalloonDevice(deflate_on_oom=deflate_on_oom)
            async with slots:
                try:
                    real = await played(scene, balloon)
                except LabError as error:  # a guest that reclaims without end may answer nothing any more
                    _report(f"once more, with a new guest: {error}")
                    real = await played(scene, balloon)
            spec = GuestSpec(
                size=SIZE, kernel=kernel, base=kernel.base, deflate_on_oom=deflate_on_oom, restart_s=1e6
            )
            simulated = await scene(Simulated(SimulatedGuest(spec, booted=True)))
            return [Compared(name, real[name], simulated[name], _tolerance(name)) for name in real]

        async with asyncio.TaskGroup() as scenes:
            plays = [scenes.create_task(play(*scene), name=str(scene)) for scene in SCENES]
    return [one for done in plays for one in done.result()]


def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _tolerance(figure: str) -> float | None:
    if figure in _TIMED:
        return None
    return next(size for start, size in _TOLERANCES_MIB.items() if figure.startswith(start))


def main() -> int:
    """Compare, print, and return the exit code: 1 if a figure exceeds its tolerance."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON document")
    arguments = parser.parse_args()
    try:
        figures = asyncio.run(compared())
    except* LabError as errors:
        print(*errors.exceptions, sep="\n", file=sys.stderr)
        sys.exit(1)
    if arguments.json:
        print(json.dumps([{**asdict(one), "agrees": one.agrees} for one in figures]))
    else:
        print(f"{'MiB, MiB/s, s':44}{'real':>9}{'simulated':>11}{'tolerance':>11}")
        for one in figures:
            tolerance = "a time" if one.tolerance is None else f"{one.tolerance:g}"
            mark = "" if one.agrees else "  off"
            print(f"{one.figure:44}{one.real:9.1f}{one.simulated:11.1f}{tolerance:>11}{mark}")
    return 0 if all(one.agrees for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
