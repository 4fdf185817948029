"""The scenes of ``make bench``: each function runs one and returns its figures."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Final

from bench_limit import limited
from bench_mqtt import wait_online
from bench_processes import (
    HERE,
    INTERVAL_S,
    TIMEOUT_S,
    Fleet,
    Memory,
    Process,
    agent,
    bare_client,
    is_started,
    simulated_qemus,
)

from qmpballoon.lab.broker import LabBroker

TENTH: Final = 0.1  # of a core

# The first samples and messages of a VM are part of attaching. The half second puts the ends of the window
# between two polls of VMs that were attached together; otherwise the number of polls may vary by one.
_SETTLE_S: Final = 2.5 * INTERVAL_S
_TURN_S: Final = 1.5 * INTERVAL_S  # from quiet to busy, and for the bare client
# After 2 s a stopped QEMU has not answered, after 2 s more it has not greeted: then all of them are noticed.
_NOTICED_S: Final = 6.0


@dataclass(frozen=True, slots=True)
class Window:
    """The samples during some seconds, and their cost."""

    cost_us: float | None  # processor time per sample; None: there was no sample
    rate: float  # samples per VM and interval
    late_p99_s: float | None  # how much longer than the interval the gap between two samples of a VM is
    longest_gap_s: float | None
    simulation: float  # processor cores that the simulated QEMUs used


@dataclass(frozen=True, slots=True)
class Attach:
    """Seconds from the agent's start until it runs, and until every VM is online on MQTT; and its cost."""

    vms: int
    online: int  # VMs, when the wait ended
    limit_s: float
    started_s: float
    online_s: float | None  # None: not within the limit
    cpu_s: float  # processor time between the two, in seconds


@dataclass(frozen=True, slots=True)
class Turns:
    """The windows of one load, one value per turn."""

    bare: list[Window] = field(default_factory=list)
    agent: list[Window] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Scene:
    """All measurements with this number of VMs. Without ``attach.online_s`` the agent has no windows."""

    vms: int
    quiet: Turns
    busy: Turns
    burst: Window  # the bare client that polls all at once
    attach: Attach
    memory: Memory


@dataclass(frozen=True, slots=True)
class Case:
    """Quiet samples of the VMs that work, in one case."""

    name: str
    vms: int
    attach: Attach
    windows: list[Window]


def cost_us(windows: Sequence[Window]) -> float | None:
    """Return the median cost of a sample, None without samples."""
    costs = [window.cost_us for window in windows if window.cost_us is not None]
    return median(costs) if costs else None


def spread(windows: Sequence[Window]) -> float:
    """Return the difference of the costs of turns, as a part of their median; 0 for a single turn."""
    costs = [window.cost_us for window in windows if window.cost_us is not None]
    return (max(costs) - min(costs)) / median(costs) if len(costs) > 1 else 0.0


async def scene(directory: Path, count: int, *, rounds: int, window_s: float, online_s: float) -> Scene:
    """Measure the bare client, the agent with MQTT, and the bare client again, on the same VMs.

    ``rounds`` is the number of windows of the agent, with each load. ``online_s`` is the limit of attaching.

    Raises:
        BenchError: a process ended or does not answer.
    """
    quiet, busy = Turns(), Turns()
    async with simulated_qemus(directory, count) as fleet:
        await _bare_turn(fleet, quiet.bare, busy.bare, window_s)
        async with bare_client(fleet.paths, burst=True) as process:
            await asyncio.sleep(_TURN_S)
            burst = await measure(process, fleet, window_s)
        async with LabBroker(directory, name=f"scene{count}") as broker:
            attach, memory = await agent_turn(
                directory, fleet, broker, quiet.agent, busy.agent, rounds, window_s, online_s
            )
        await _bare_turn(fleet, quiet.bare, busy.bare, window_s)
    return Scene(count, quiet, busy, burst, attach, memory)


async def _bare_turn(fleet: Fleet, quiet: list[Window], busy: list[Window], window_s: float) -> None:
    async with bare_client(fleet.paths) as process:
        await asyncio.sleep(_TURN_S)
        quiet.append(await measure(process, fleet, window_s))
        fleet.set_busy(True)
        await asyncio.sleep(_TURN_S)
        busy.append(await measure(process, fleet, window_s))
        fleet.set_busy(False)


async def agent_turn(
    directory: Path,
    fleet: Fleet,
    broker: LabBroker,
    quiet: list[Window],
    busy: list[Window],
    rounds: int,
    window_s: float,
    online_s: float,
    tree: Path = HERE,
) -> tuple[Attach, Memory]:
    """Start the agent, append the windows of both loads if all VMs are online in time, and end it."""
    async with agent(directory, fleet.paths, broker.url, tree=tree) as process:
        attach = await attached(process, broker, len(fleet.paths), online_s)
        memory = process.memory()
        if attach.online_s is not None:
            await asyncio.sleep(_SETTLE_S)
            quiet += [await measure(process, fleet, window_s) for _ in range(rounds)]
            memory = process.memory()
            fleet.set_busy(True)
            await asyncio.sleep(_TURN_S)
            busy += [await measure(process, fleet, window_s) for _ in range(rounds)]
            fleet.set_busy(False)
    return attach, memory


async def attached(process: Process, broker: LabBroker, count: int, limit_s: float) -> Attach:
    """Wait until all VMs are online on MQTT, or the limit."""
    began_s = process.started_s
    running_s, cpu_at_start_s = await process.logged(is_started), process.cpu_s()
    online = await wait_online(broker, count, max(0.1, began_s + limit_s - time.monotonic()))
    return Attach(
        vms=count,
        online=online.count,
        limit_s=limit_s,
        started_s=running_s - began_s,
        online_s=None if online.all_at_s is None else online.all_at_s - began_s,
        cpu_s=process.cpu_s() - cpu_at_start_s,
    )


async def measure(process: Process, fleet: Fleet, window_s: float) -> Window:
    """Measure the samples that this process takes of these VMs."""
    await fleet.take_samples()
    before_s, simulated_s, began_s = process.cpu_s(), fleet.process.cpu_s(), time.monotonic()
    await asyncio.sleep(window_s)
    spent_s, lasted_s = process.cpu_s() - before_s, time.monotonic() - began_s
    simulated_s = fleet.process.cpu_s() - simulated_s
    samples = await fleet.take_samples()
    late_s = [max(0.0, gap_s - INTERVAL_S) for gap_s in samples.gaps_s]
    return Window(
        cost_us=spent_s / samples.count * 1e6 if samples.count else None,
        rate=samples.count / (len(fleet.paths) * lasted_s / INTERVAL_S),
        late_p99_s=quantiles(late_s, n=100)[-1] if len(late_s) > 1 else None,
        longest_gap_s=max(samples.gaps_s, default=None),
        simulation=simulated_s / lasted_s,
    )


async def neighbours(directory: Path, count: int, *, window_s: float, online_s: float) -> list[Case]:
    """Measure three quarters of the VMs: alone, then with the last quarter mute, then with it stopped.

    A mute QEMU listens and never accepts a client; a stopped one was online before SIGSTOP.

    Raises:
        BenchError: a process ended or does not answer.
    """
    quarter = count // 4
    cases = []
    async with (
        simulated_qemus(directory, count - quarter) as working,
        simulated_qemus(directory, quarter, name="mute") as mute,
        simulated_qemus(directory, quarter, name="stopped") as stopped,
    ):
        mute.stop_serving()
        for name, others in (("alone", None), (f"{quarter} mute", mute), (f"{quarter} stopped", stopped)):
            paths = working.paths + (others.paths if others else [])
            due = len(paths) - (quarter if others is mute else 0)
            async with (
                LabBroker(directory, name="neighbours") as broker,
                agent(directory, paths, broker.url) as process,
            ):
                attach = await attached(process, broker, due, online_s)
                await asyncio.sleep(_SETTLE_S)
                if others is stopped:
                    stopped.stop()
                await asyncio.sleep(_NOTICED_S)  # alone, too: the looks at everything fall into the same time
                windows = [await measure(process, working, window_s)]
                stopped.cont()
            cases.append(Case(name, len(working.paths), attach, windows))
    return cases


async def tenth_of_a_core(directory: Path, count: int, *, window_s: float, online_s: float) -> Case:
    """Measure an agent that has a tenth of a core: until all VMs are online, and two windows.

    Raises:
        BenchError: a process ended or does not answer.
    """
    async with (
        simulated_qemus(directory, count) as fleet,
        LabBroker(directory, name="tenth") as broker,
        limited(TENTH) as limit,
        agent(directory, fleet.paths, broker.url, before=limit.before) as process,
    ):
        try:
            limit.apply(process.pid)
            attach = await attached(process, broker, count, online_s)
            await asyncio.sleep(_SETTLE_S)
            windows = [await measure(process, fleet, window_s) for _ in range(2)]
        finally:
            await limit.lift(process.pid)
    return Case(limit.means, count, attach, windows)


async def busy_start(directory: Path, count: int, *, window_s: float, online_s: float) -> Case:
    """Measure an agent that starts while all figures of all VMs change.

    Raises:
        BenchError: a process ended or does not answer.
    """
    async with (
        simulated_qemus(directory, count) as fleet,
        LabBroker(directory, name="start") as broker,
        agent(directory, fleet.paths, broker.url) as process,
    ):
        fleet.set_busy(True)
        attach = await attached(process, broker, count, online_s)
        await asyncio.sleep(_SETTLE_S)
        windows = [await measure(process, fleet, window_s)]
    return Case("busy from the start", count, attach, windows)


def start_times(count: int) -> tuple[list[float], list[float]]:
    """Return the seconds that ``qmpballoon --help`` and ``python -c pass`` take, in turns."""
    help_s, pass_s = [], []
    for _ in range(count):
        help_s.append(_seconds_of([sys.executable, "-m", "qmpballoon", "--help"]))
        pass_s.append(_seconds_of([sys.executable, "-c", "pass"]))
    return help_s, pass_s


def _seconds_of(command: list[str]) -> float:
    began_s = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=TIMEOUT_S, cwd=HERE)
    return time.perf_counter() - began_s
