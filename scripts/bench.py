"""The agent's cost from ten VMs to a thousand: ``make bench``, or ``scripts/bench.py --help``.

Processor time is compared with a minimal client on the same simulated QEMUs, in alternating turns. Absolute
figures differ between machines; the ratios are comparable. The whole run takes at most five minutes: what is
left by then is listed as not measured.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final, TypeAlias

from bench_figures import busy_start, neighbours, scene, start_times, tenth_of_a_core
from bench_mqtt import idle_memory, latency
from bench_processes import HERE, BenchError, end_on_sigterm
from bench_table import Figures, table

from qmpballoon.lab.require import LabError

LONGEST_S: Final = 290.0
LEAST_S: Final = 5.0  # with less time left, a scene is not started
INTERRUPTED: Final = 130
SCENES: Final = ("start", "latency", "sizes", "neighbours", "tenth", "busy-start")

Step: TypeAlias = tuple[str, Callable[[Path], Awaitable[None]]]


@dataclass(frozen=True, slots=True)
class Extent:
    """The number and duration of measurements."""

    vms: tuple[int, ...]
    neighbours: int
    tenth: int
    busy_start: int
    rounds: int
    window_s: float
    online_s: float  # how long the VMs may take to be online
    requests: int
    requests_s: float
    starts: int


FULL: Final = Extent(
    vms=(10, 100, 500, 1000),
    neighbours=400,
    tenth=200,
    busy_start=1000,
    rounds=2,
    window_s=2.5,
    online_s=30.0,
    requests=100,
    requests_s=4.0,
    starts=9,
)
QUICK: Final = Extent(
    vms=(20,),
    neighbours=20,
    tenth=10,
    busy_start=20,
    rounds=1,
    window_s=1.0,
    online_s=60.0,
    requests=20,
    requests_s=2.0,
    starts=3,
)


def machine() -> str:
    """Return one line about this machine and the versions used."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("qemu.qmp", "aiomqtt", "paho-mqtt", "uvloop"))
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {versions}; load before: {load:.1f}"
    )


async def measured(extent: Extent, only: frozenset[str]) -> Figures:
    """Run every scene; one that fails, or for which there is no time, is listed in ``failed``."""
    began_s = time.monotonic()
    figures = Figures(machine(), extent.window_s)
    compileall.compile_dir(HERE / "qmpballoon", quiet=2)  # no start compiles
    if "start" in only:
        figures.help_s, figures.python_s = start_times(extent.starts)
    with tempfile.TemporaryDirectory(prefix="qmpballoon-bench-") as name:
        for title, run in steps(figures, extent, only):
            left_s = LONGEST_S - (time.monotonic() - began_s)
            if left_s < LEAST_S:
                figures.failed.append(f"{title}: no time is left")
                continue
            print(f"{title} ...", file=sys.stderr, flush=True)
            try:
                async with asyncio.timeout(left_s):
                    await run(Path(name))
            except TimeoutError:
                figures.failed.append(f"{title}: not within the {LONGEST_S:g} s of this benchmark")
            except (BenchError, LabError) as error:
                figures.failed.append(f"{title}: {error}")
    figures.lasted_s = time.monotonic() - began_s
    return figures


def steps(figures: Figures, extent: Extent, only: frozenset[str]) -> list[Step]:
    """Return the scenes in their order; each stores its result in ``figures``."""

    async def memory(directory: Path) -> None:
        figures.idle = await idle_memory(directory)

    def requests(nodelay: bool) -> Callable[[Path], Awaitable[None]]:
        async def run(directory: Path) -> None:
            seen = await latency(
                directory, requests=extent.requests, longest_s=extent.requests_s, nodelay=nodelay
            )
            figures.latency.append(seen)

        return run

    def size(vms: int) -> Callable[[Path], Awaitable[None]]:
        async def run(directory: Path) -> None:
            seen = await scene(
                directory, vms, rounds=extent.rounds, window_s=extent.window_s, online_s=extent.online_s
            )
            figures.scenes.append(seen)

        return run

    async def beside(directory: Path) -> None:
        figures.neighbours = await neighbours(
            directory, extent.neighbours, window_s=2 * extent.window_s, online_s=extent.online_s
        )

    async def tenth(directory: Path) -> None:
        figures.tenth = await tenth_of_a_core(
            directory, extent.tenth, window_s=2 * extent.window_s, online_s=extent.online_s
        )

    async def busy_at_once(directory: Path) -> None:
        figures.busy_start = await busy_start(
            directory, extent.busy_start, window_s=extent.window_s, online_s=extent.online_s
        )

    named: dict[str, list[Step]] = {
        "start": [("an agent without VMs", memory)],
        "latency": [
            ("requests through mosquitto with its default settings", requests(False)),
            ("requests through mosquitto with set_tcp_nodelay", requests(True)),
        ],
        "sizes": [(f"{vms} VMs: the bare client and the agent with MQTT", size(vms)) for vms in extent.vms],
        "neighbours": [(f"{extent.neighbours} VMs, a quarter mute or stopped", beside)],
        "tenth": [(f"{extent.tenth} VMs with a tenth of a core", tenth)],
        "busy-start": [(f"{extent.busy_start} VMs, busy from the start", busy_at_once)],
    }
    return [step for name in SCENES if name in only for step in named[name]]


def main() -> int:
    """Run the benchmark; return its exit code: 1 if a scene could not be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every scene with 20 VMs at most: a minute")
    parser.add_argument("--json", action="store_true", help="all values, as one JSON document")
    parser.add_argument("--only", action="append", choices=SCENES, help="this scene; may be repeated")
    parser.add_argument("--vms", type=int, action="append", help="this size; may be repeated")
    options = parser.parse_args()
    end_on_sigterm()
    extent = QUICK if options.quick else FULL
    if options.vms:
        extent = Extent(**{**asdict(extent), "vms": tuple(options.vms)})
    try:
        figures = asyncio.run(measured(extent, frozenset(options.only or SCENES)))
    except KeyboardInterrupt:
        return INTERRUPTED
    print(json.dumps(asdict(figures), indent=2) if options.json else table(figures))
    return 1 if figures.failed else 0


if __name__ == "__main__":
    sys.exit(main())
