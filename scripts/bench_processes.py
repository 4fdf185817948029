"""The processes of the benchmarks and their meters: simulated QEMUs, the agent, the bare client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from qmpballoon.lab.require import find_program
from qmpballoon.sim.qemu.command import numbered

AGENT_HOST: Final = "bench"
INTERVAL_S: Final = 1  # QEMU's minimum, for many samples in a short time
TIMEOUT_S: Final = 60.0
HERE: Final = Path(__file__).resolve().parents[1]  # the root of this source tree

_BARE: Final = Path(__file__).with_name("bench_bare.py")
_END_S: Final = 15.0
_MANY_LINES: Final = 100_000
_LONGEST_LINE: Final = 2**26  # bytes; a report of samples


class BenchError(Exception):
    """The benchmark could not be run; the message says why."""


class Process:
    """A child process; it records each line of stdout and stderr with its time."""

    def __init__(self, process: asyncio.subprocess.Process, started_s: float) -> None:
        self.pid = process.pid
        self.started_s = started_s
        self.lines: list[tuple[float, str]] = []
        self._process = process
        self._more = asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name=f"lines of {process.pid}")

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            if len(self.lines) < _MANY_LINES:
                self.lines.append((time.monotonic(), line.decode(errors="replace").rstrip()))
            self._more.set()

    def write(self, line: str) -> None:
        """Write a line to its stdin."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")

    def signal_all(self, number: int) -> None:
        """Send a signal to it and to its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    @property
    def ended(self) -> bool:
        """Whether it has ended, or closed its output."""
        return self._reader.done()

    async def logged(
        self, condition: Callable[[str], bool], *, times: int = 1, timeout_s: float = TIMEOUT_S
    ) -> float:
        """Wait until this many lines match; return the monotonic time of the last one.

        Raises:
            BenchError: the process ended, or the time-out passed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    matching = [moment_s for moment_s, line in self.lines if condition(line)]
                    if len(matching) >= times:
                        return matching[times - 1]
                    if self.ended:
                        raise BenchError(f"{self.pid} ended too early{self._tail()}")
                    self._more.clear()
                    more = asyncio.create_task(self._more.wait(), name=f"more lines of {self.pid}")
                    await asyncio.wait((more, self._reader), return_when=asyncio.FIRST_COMPLETED)
                    more.cancel()
        except TimeoutError:
            raise BenchError(f"{self.pid} did not log the line in {timeout_s:g} s{self._tail()}") from None

    async def terminate(self) -> None:
        """End it by SIGTERM, and read the rest of its output."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_END_S):
                await self._process.wait()
        except TimeoutError:
            raise BenchError(f"{self.pid} did not end in {_END_S:g} s{self._tail()}") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            await self._reader

    def _tail(self) -> str:
        return "".join(f"\n    {line}" for _, line in self.lines[-15:])

    # ---- meters ----

    def cpu_s(self) -> float:
        """Return the processor time it has used, user and system, all threads.

        The resolution is a nanosecond; /proc/PID/stat has hundredths of a second. The clock is that of
        clock_getcpuclockid(3); Linux computes its number from the pid (include/linux/posix-timers_types.h).
        """
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> Memory:
        """Return its resident memory now."""
        sizes = {}
        for line in Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()[1:]:
            key, _, rest = line.partition(":")
            sizes[key] = int(rest.split()[0]) * 1024
        return Memory(rss=sizes["Rss"], pss=sizes["Pss"])

    def writes(self) -> int:
        """Return its number of write calls: one for each QMP request; MQTT uses send instead."""
        fields = dict(line.split(": ") for line in Path(f"/proc/{self.pid}/io").read_text().splitlines())
        return int(fields["syscw"])


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident bytes (RSS), and with each shared page divided by its users (PSS)."""

    rss: int
    pss: int


@dataclass(frozen=True, slots=True)
class Samples:
    """Reads of the guests' statistics: their number, and the seconds between two of the same guest."""

    count: int
    gaps_s: list[float]


class Fleet:
    """Simulated QEMUs that one process serves; each has a pid of its own."""

    def __init__(self, process: Process, paths: list[str]) -> None:
        self.process = process
        self.paths = paths

    def set_busy(self, busy: bool) -> None:
        """Let all figures of each guest change from sample to sample, or none."""
        self.process.write("busy" if busy else "quiet")

    async def take_samples(self) -> Samples:
        """Return the samples since the last call."""
        before = sum(1 for _, line in self.process.lines if line.startswith("{"))
        self.process.write("report")
        await self.process.logged(lambda line: line.startswith("{"), times=before + 1)
        reports = [line for _, line in self.process.lines if line.startswith("{")]
        report = json.loads(reports[before])
        return Samples(report["samples"], report["gaps_s"])

    def stop_serving(self) -> None:
        """Stop only the process that serves: its QEMUs run and listen, and accept no client."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def stop(self) -> None:
        """Stop all of its QEMUs: SIGSTOP."""
        self.process.signal_all(signal.SIGSTOP)

    def cont(self) -> None:
        """Continue them: SIGCONT."""
        self.process.signal_all(signal.SIGCONT)


@asynccontextmanager
async def running(
    *command: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> AsyncGenerator[Process, None]:
    """Run a command in a session of its own; end it at the end of the block.

    Raises:
        BenchError: it does not end.
    """
    started_s = time.monotonic()
    child = await asyncio.create_subprocess_exec(
        find_program("setpriv"),
        "--pdeathsig",
        "KILL",
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        limit=_LONGEST_LINE,
        start_new_session=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )
    process = Process(child, started_s)
    try:
        yield process
    finally:
        await process.terminate()


@asynccontextmanager
async def simulated_qemus(
    directory: Path, count: int, *options: str, name: str = "vm"
) -> AsyncGenerator[Fleet, None]:
    """Run this many simulated QEMUs, each with a pid of its own; ``options`` are those of the command."""
    path = directory / f"{name}{count}.qmp"
    command: list[str | Path] = [sys.executable, "-m", "qmpballoon.sim.qemu", path]
    command += ["--count", str(count), "--fleet", *options]
    async with running(*command, cwd=HERE, env={"PYTHONPATH": str(HERE)}) as process:
        await process.logged(lambda line: line == "ready")
        try:
            yield Fleet(process, [str(numbered(path, number, count)) for number in range(count)])
        finally:
            process.signal_all(signal.SIGKILL)  # also while stopped


@asynccontextmanager
async def bare_client(paths: Sequence[str], *, burst: bool = False) -> AsyncGenerator[Process, None]:
    """Run the bare client; yield it when it polls all sockets, spread over the interval or in a burst."""
    order = "burst" if burst else "spread"
    async with running(sys.executable, _BARE, order, str(INTERVAL_S), *paths) as process:
        await process.logged(lambda line: line == "polling")
        yield process


@asynccontextmanager
async def agent(
    directory: Path,
    paths: Sequence[str],
    broker_url: str | None,
    *,
    tree: Path = HERE,
    before: Sequence[str | Path] = (),
    program: Sequence[str | Path] = ("-m", "qmpballoon"),
) -> AsyncGenerator[Process, None]:
    """Run the agent of a source tree for these sockets; yield it before it has attached.

    Its configuration is the default except for the interval, a budget that is enough for all, and no grace
    time, so that the VMs are calm after their first sample. The command ``before`` executes Python with the
    arguments ``program``.
    """
    state_dir = directory / "state"
    for old in state_dir.glob("*"):
        old.unlink()
    configuration = directory / "bench.toml"
    configuration.write_text(
        f"[agent]\nhost = '{AGENT_HOST}'\nstate_dir = '{state_dir}'\n"
        f"[discovery]\nsockets = {[*paths] or [str(directory / 'none' / '*.qmp')]!r}\n"
        f"[host]\nbudget = '1TiB'\nreserve = '1MiB'\n[vm]\nstats_interval_s = {INTERVAL_S}\ngrace_s = 0\n"
    )
    options = () if broker_url is None else ("--broker", broker_url)
    command: list[str | Path] = [*before, sys.executable, *program, "agent", "-c", configuration, *options]
    async with running(*command, cwd=tree, env={"PYTHONPATH": str(tree)}) as process:
        yield process


def end_on_sigterm() -> None:
    """Let SIGTERM raise KeyboardInterrupt: a benchmark cleans up as after Ctrl-C."""

    def interrupt(_: int, __: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def is_started(line: str) -> bool:
    """Tell whether this log line reports that the agent is imported and configured."""
    return " agent-started " in line
