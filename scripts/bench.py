"""The agent's cost as ratios: ``make bench``, or ``scripts/bench.py --help``.

Each figure is compared with a minimal counterpart on the same machine in alternating turns. Absolute figures
differ between machines; the ratios are comparable.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Final

from bench_figures import Latency, Scene, idle_memory, latency, scene, start_times
from bench_processes import INTERVAL_S, BenchError, Memory

from qmpballoon.lab.require import LabError
from qmpballoon.units import MIB

MOST_TIMES_BARE: Final = 4.0
MOST_ADDED_S: Final = 0.005
MOST_HELP_S: Final = 0.3
MEMORY: Final = "/dev/shm"


@dataclass(frozen=True, slots=True)
class Extent:
    """The number and duration of measurements."""

    vms: tuple[int, ...]
    rounds: int
    window_s: float
    requests: int
    starts: int


FULL: Final = Extent(vms=(10, 100), rounds=2, window_s=20 * INTERVAL_S, requests=200, starts=15)
QUICK: Final = Extent(vms=(100,), rounds=1, window_s=2 * INTERVAL_S, requests=40, starts=5)


@dataclass(frozen=True, slots=True)
class Figures:
    """All measurements of one run."""

    machine: str
    extent: Extent
    scenes: list[Scene]
    idle: Memory
    latency: Latency
    latency_in_memory: Latency | None  # with the agent's state_dir in memory; None: there is no /dev/shm
    help_s: list[float]
    python_s: list[float]


def machine() -> str:
    """Return one line about this machine and the versions used."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("qemu.qmp", "aiomqtt", "paho-mqtt", "uvloop"))
    load = os.getloadavg()[0]
    return (
        f"{len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {versions}; load before: {load:.1f}"
    )


async def measured(extent: Extent) -> Figures:
    """Run every scene.

    Raises:
        BenchError, LabError: a measurement failed.
    """
    line = machine()
    help_s, python_s = start_times(extent.starts)
    with tempfile.TemporaryDirectory(prefix="qmpballoon-bench-") as name:
        directory = Path(name)
        scenes = []
        for count in extent.vms:
            _report(f"{count} simulated VMs: the bare client, the agent, the agent with MQTT, in turns ...")
            scenes.append(await scene(directory, count, rounds=extent.rounds, window_s=extent.window_s))
        _report("an agent without VMs; targets over MQTT and over QMP, in turns ...")
        idle = await idle_memory(directory)
        answers = await latency(directory, extent.requests)
    in_memory = None
    if os.access(MEMORY, os.W_OK):
        with tempfile.TemporaryDirectory(prefix="qmpballoon-bench-", dir=MEMORY) as name:
            in_memory = await latency(Path(name), extent.requests)
    return Figures(line, extent, scenes, idle, answers, in_memory, help_s, python_s)


def table(figures: Figures) -> str:
    """Return the figures as text, each with its counterpart."""
    lines = [figures.machine, ""]
    lines.append(f"processor time per sample of a VM, one a second ({figures.extent.window_s:g} s per turn)")
    lines.append(f"  {'VMs':>5}  {'bare client':>12}  {'agent':>16}  {'agent with MQTT':>18}")
    for seen in figures.scenes:
        sampling = seen.sampling
        bare = median(sampling.bare_us)
        agent, mqtt = median(sampling.agent_us), median(sampling.agent_mqtt_us)
        lines.append(
            f"  {sampling.vms:>5}  {bare:>9.0f} µs  {agent:>7.0f} µs {agent / bare:>4.1f} x"
            f"  {mqtt:>9.0f} µs {mqtt / bare:>4.1f} x   {_verdict(mqtt / bare <= MOST_TIMES_BARE, '4 x')}"
        )
    lines += ["", "memory of the agent with MQTT"]
    lines.append(f"  {'VMs':>5}  {'RSS':>9}  {'PSS':>9}  {'per VM':>9}")
    lines.append(_memory_line(0, figures.idle, None))
    lines += [
        _memory_line(seen.sampling.vms, seen.memory_mqtt, (seen.memory_mqtt.rss - figures.idle.rss))
        for seen in figures.scenes
    ]
    lines += ["", "from the agent's start until every VM is online on MQTT"]
    lines.append(f"  {'VMs':>5}  {'start-up':>9}  {'attaching':>9}  {'of it processor':>15}")
    for seen in figures.scenes:
        best = min(seen.attaching, key=lambda attaching: attaching.online_s)
        attach_s = best.online_s - best.started_s
        lines.append(f"  {best.vms:>5}  {best.started_s:>7.2f} s  {attach_s:>7.2f} s  {best.cpu_s:>13.2f} s")
    lines += ["", f"one target, median of {figures.extent.requests} in turns"]
    lines += _latency_lines("on disk", figures.latency)  # a target is saved to disk before it is confirmed
    if figures.latency_in_memory is not None:
        lines += _latency_lines("in memory", figures.latency_in_memory)
    lines += [
        "",
        f"qmpballoon --help {median(figures.help_s):.3f} s, python -c pass {median(figures.python_s):.3f} s: "
        f"{median(figures.help_s) / median(figures.python_s):.1f} x"
        f"   {_verdict(median(figures.help_s) <= MOST_HELP_S, '0.3 s')}",
    ]
    return "\n".join(lines)


def added_latency_s(seen: Latency) -> float:
    """Return the median over all rounds of the time that MQTT adds, in seconds."""
    return median(over - straight for over, straight in zip(seen.mqtt_s, seen.direct_s, strict=True))


def _latency_lines(where: str, seen: Latency) -> list[str]:
    added_s = added_latency_s(seen)
    return [
        f"  state_dir {where}: over QMP {_ms(seen.direct_s)}, over MQTT {_ms(seen.mqtt_s)}, "
        f"{added_s * 1e3:.2f} ms added   {_verdict(added_s <= MOST_ADDED_S, '5 ms')}",
        f"  (a message to the same client over this broker: {_ms(seen.echo_s)})",
    ]


def _memory_line(vms: int, memory: Memory, grown: int | None) -> str:
    per_vm = "" if grown is None else f"{grown / vms / 1024:>5.0f} KiB"
    return f"  {vms:>5}  {memory.rss / MIB:>5.1f} MiB  {memory.pss / MIB:>5.1f} MiB  {per_vm:>9}".rstrip()


def _ms(seconds: Sequence[float]) -> str:
    return f"{median(seconds) * 1e3:.2f} ms"


def _verdict(reached: bool, aim: str) -> str:
    return f"aim {aim}: {'reached' if reached else 'MISSED'}"


def _report(sentence: str) -> None:
    print(sentence, file=sys.stderr, flush=True)


def main() -> int:
    """Run the benchmark; return its exit code: 1 if it could not be run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under 30 s, 100 VMs only, one short turn each")
    parser.add_argument("--json", action="store_true", help="all values, as one JSON document")
    options = parser.parse_args()
    try:
        figures = asyncio.run(measured(QUICK if options.quick else FULL))
    except (BenchError, LabError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(figures), indent=2) if options.json else table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
