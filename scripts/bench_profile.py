"""Profiles the agent in a scene of ``make bench``: ``scripts/profile --help``.

``--sampling`` records the stack every four milliseconds of processor time, which costs little; it needs
hundreds of VMs or a long time. cProfile traces each call, which makes small functions look slower than they
are, and counts the calls.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import runpy
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final, Protocol

INSIDE: Final = "--inside"
SAMPLE_S: Final = 0.004  # a tick of most kernels; they do not sample more often
WRITTEN: Final = "the profile is written"
_SETTLE_S: Final = 2.5
_SCRIPTS: Final = str(Path(__file__).resolve().parent)


# ---- inside the agent's process ----


class Profiler(Protocol):
    """Records from ``start`` on, and writes a file."""

    def start(self) -> None:
        """Start recording."""

    def finish(self, output: str) -> None:
        """Stop, and write what was recorded."""


class Tracer:
    """Each call, by cProfile."""

    def __init__(self) -> None:
        self._profile = cProfile.Profile()

    def start(self) -> None:
        """Start recording."""
        self._profile.enable()

    def finish(self, output: str) -> None:
        """Stop, and write a file for pstats."""
        self._profile.disable()
        self._profile.dump_stats(output)


class Sampler:
    """The stack at intervals of processor time."""

    def __init__(self) -> None:
        self._self: Counter[str] = Counter()
        self._total: Counter[str] = Counter()

    def start(self) -> None:
        """Start recording."""
        signal.signal(signal.SIGPROF, self._record)
        signal.setitimer(signal.ITIMER_PROF, SAMPLE_S, SAMPLE_S)

    def finish(self, output: str) -> None:
        """Stop, and write the number of samples per function as JSON: on top of the stack, and anywhere."""
        signal.setitimer(signal.ITIMER_PROF, 0)
        Path(output).write_text(json.dumps({"self": self._self, "total": self._total}))

    def _record(self, _: int, frame: FrameType | None) -> None:
        names = []
        while frame is not None:
            code = frame.f_code
            names.append(f"{code.co_filename}:{code.co_firstlineno}({code.co_qualname})")
            frame = frame.f_back
        if names:
            self._self[names[0]] += 1
            self._total.update(set(names))


def inside(output: str, kind: str, arguments: list[str]) -> None:
    """Run the agent; it is profiled from SIGUSR1 to SIGUSR2, which writes the file."""
    profiler: Profiler = Sampler() if kind.startswith("sampling") else Tracer()

    def finish(_: int, __: object) -> None:
        profiler.finish(output)
        print(WRITTEN, flush=True)

    signal.signal(signal.SIGUSR1, lambda *_: profiler.start())
    signal.signal(signal.SIGUSR2, finish)
    if kind.endswith("-attach"):
        profiler.start()
    sys.argv = ["qmpballoon", *arguments]
    sys.path.remove(_SCRIPTS)
    runpy.run_module("qmpballoon", run_name="__main__")


# ---- outside ----


async def profiled(options: argparse.Namespace, output: Path) -> str:
    """Run the agent in the scene; return a line about it. The profile is in ``output``.

    Raises:
        BenchError, LabError: a process could not be started, or ended.
    """
    from bench_figures import attached, measure
    from bench_processes import agent, simulated_qemus

    from qmpballoon.lab.broker import LabBroker

    directory = output.parent
    kind = ("sampling" if options.sampling else "tracing") + ("-attach" if options.attach else "")
    program = (__file__, INSIDE, str(output), kind)
    async with (
        simulated_qemus(directory, options.vms) as fleet,
        LabBroker(directory, name="profile") as broker,
        agent(directory, fleet.paths, broker.url, program=program) as process,
    ):
        fleet.set_busy(options.busy)
        attach = await attached(process, broker, options.vms, options.online_s)
        line = f"{attach.online} of {options.vms} VMs online"
        if not options.attach:
            await asyncio.sleep(_SETTLE_S)
            os.kill(process.pid, signal.SIGUSR1)
            window = await measure(process, fleet, options.seconds)
            cost = "no sample" if window.cost_us is None else f"{window.cost_us:.0f} µs per sample"
            line += (
                f", {'busy' if options.busy else 'quiet'}: {cost} with the profiler, {window.rate:.0%} taken"
            )
        os.kill(process.pid, signal.SIGUSR2)
        await process.logged(lambda line: line == WRITTEN)
    return line


def print_traced(output: Path, options: argparse.Namespace) -> None:
    """Print the functions of a profile by cProfile."""
    statistics = pstats.Stats(str(output))
    statistics.sort_stats("cumulative" if options.cumulative else "tottime").print_stats(options.limit)


def print_sampled(output: Path, options: argparse.Namespace) -> None:
    """Print the functions of a profile by samples, in percent of them."""
    counts = json.loads(output.read_text())
    samples = sum(counts["self"].values())
    print(f"{samples} samples, at most one every {SAMPLE_S * 1e3:g} ms of processor time")
    print("   self   total  function")
    wanted = counts["total" if options.cumulative else "self"]
    for name, _ in sorted(wanted.items(), key=lambda item: -item[1])[: options.limit]:
        own, total = (counts[which].get(name, 0) / samples for which in ("self", "total"))
        print(f"  {own:>5.1%}  {total:>6.1%}  {name}")


def main() -> int:
    """Profile; return the exit code: 1 if it could not be done."""
    if sys.argv[1:2] == [INSIDE]:
        inside(sys.argv[2], sys.argv[3], sys.argv[4:])
        return 0
    from bench_processes import BenchError

    from qmpballoon.lab.require import LabError

    parser = argparse.ArgumentParser(prog="scripts/profile", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--vms", type=int, default=100, help="number of simulated QEMUs (100)")
    parser.add_argument("--busy", action="store_true", help="all figures change at each sample")
    parser.add_argument("--attach", action="store_true", help="profile from the start until all are online")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of the profile (10)")
    parser.add_argument("--online-s", type=float, default=90.0, help="limit of attaching (90)")
    parser.add_argument("--sampling", action="store_true", help="stack samples, not cProfile")
    parser.add_argument("--cumulative", action="store_true", help="order by time with callees")
    parser.add_argument("--limit", type=int, default=40, help="number of functions (40)")
    parser.add_argument("--output", type=Path, help="keep the profile in this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qmpballoon-profile-") as name:
        output = Path(name) / "profile"
        try:
            line = asyncio.run(profiled(options, output))
        except (BenchError, LabError) as error:
            print(f"profile: {error}", file=sys.stderr)
            return 1
        print(line)
        (print_sampled if options.sampling else print_traced)(output, options)
        if options.output is not None:
            options.output.write_bytes(output.read_bytes())
    return 0


if __name__ == "__main__":
    sys.exit(main())
