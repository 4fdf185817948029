"""This source tree against another commit: ``make bench-compare BASE=<ref>``.

The package of the commit is checked out into a temporary git worktree. Its agent and this one run in turns on
the same simulated QEMUs, under the same Python with the same dependencies. A ratio below 1 means that this
tree needs less.
"""

from __future__ import annotations

import argparse
import asyncio
import compileall
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Final

from bench_figures import Attach, Window, agent_turn, cost_us, spread
from bench_mqtt import Latency, latency
from bench_processes import HERE, BenchError, Memory, end_on_sigterm, simulated_qemus

from qmpballoon.lab.broker import LabBroker
from qmpballoon.lab.require import LabError
from qmpballoon.units import MIB

SIZES: Final = (10, 100, 500)
_GIT_S: Final = 60.0


@dataclass(slots=True)
class Side:
    """The figures of one source tree with one number of VMs; a value per turn."""

    quiet: list[Window] = field(default_factory=list)
    busy: list[Window] = field(default_factory=list)
    attach: list[Attach] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)


@dataclass(slots=True)
class Comparison:
    """The figures of both trees: by the number of VMs, and for requests."""

    base: str
    sizes: dict[int, tuple[Side, Side]] = field(default_factory=dict)  # base, this tree
    latency: list[tuple[Latency, Latency]] = field(default_factory=list)


@contextmanager
def worktree(ref: str) -> Generator[Path, None, None]:
    """Check out a commit into a temporary directory; it is removed at the end, also after a failure.

    Raises:
        BenchError: git does not know the commit, or failed.
    """
    with tempfile.TemporaryDirectory(prefix="qmpballoon-base-") as name:
        path = Path(name) / "base"
        try:
            _git("worktree", "add", "--detach", "--quiet", str(path), ref)
            for tree in (path, HERE):
                compileall.compile_dir(tree / "qmpballoon", quiet=2)
            yield path
        finally:
            if path.exists():
                _git("worktree", "remove", "--force", str(path))
            _git("worktree", "prune")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(HERE), *arguments], capture_output=True, text=True, timeout=_GIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"git {arguments[0]}: {error}") from error
    if done.returncode:
        raise BenchError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


async def compared(
    base: Path, title: str, sizes: Sequence[int], *, rounds: int, window_s: float, online_s: float
) -> Comparison:
    """Run both agents in turns, ``rounds`` times with each number of VMs; each is first in every second one.

    Raises:
        BenchError, LabError: a process could not be started, or ended.
    """
    comparison = Comparison(title)
    with tempfile.TemporaryDirectory(prefix="qmpballoon-bench-") as name:
        directory = Path(name)
        for vms in sizes:
            sides = comparison.sizes[vms] = (Side(), Side())
            async with simulated_qemus(directory, vms) as fleet:
                for turn in range(rounds):
                    order = list(zip((base, HERE), sides, strict=True))
                    for tree, side in order if turn % 2 == 0 else order[::-1]:
                        print(f"{vms} VMs, turn {turn + 1}: {tree.name} ...", file=sys.stderr, flush=True)
                        async with LabBroker(directory, name="turn") as broker:
                            attach, memory = await agent_turn(
                                directory, fleet, broker, side.quiet, side.busy, 1, window_s, online_s, tree
                            )
                        side.attach.append(attach)
                        side.memory.append(memory)
        for nodelay in (False, True):
            print("requests ...", file=sys.stderr, flush=True)
            before, now = [
                await latency(directory, requests=60, longest_s=4.0, nodelay=nodelay, tree=tree)
                for tree in (base, HERE)
            ]
            comparison.latency.append((before, now))
    return comparison


def table(comparison: Comparison) -> str:
    """Return the figures of both trees and their ratios as text."""
    lines = [f"  {'':32}  {comparison.base:>12}  {'this tree':>12}  {'ratio':>6}  turns differ by"]
    for vms, (base, this) in comparison.sizes.items():
        lines.append(f"{vms} VMs")
        rows: tuple[tuple[str, str, Callable[[Side], float | None], Callable[[Side], float]], ...] = (
            ("a quiet sample", "µs", lambda side: cost_us(side.quiet), lambda side: spread(side.quiet)),
            ("a busy sample", "µs", lambda side: cost_us(side.busy), lambda side: spread(side.busy)),
            ("quiet samples taken", "%", lambda side: _rate(side.quiet), lambda _: 0.0),
            ("busy samples taken", "%", lambda side: _rate(side.busy), lambda _: 0.0),
            ("quiet samples late, p99", "ms", lambda side: _late_ms(side.quiet), lambda _: 0.0),
            ("busy samples late, p99", "ms", lambda side: _late_ms(side.busy), lambda _: 0.0),
            ("online on MQTT", "s", _online_s, lambda _: 0.0),
            ("RSS", "MiB", lambda side: median(each.rss for each in side.memory) / MIB, lambda _: 0.0),
        )
        for title, unit, value, differ in rows:
            lines.append(
                _row(title, unit, value(base), value(this)) + _differ(max(differ(base), differ(this)))
            )
        for side, name in ((base, comparison.base), (this, "this tree")):
            lines += [
                f"  {name}: not online within {each.limit_s:g} s: {each.online} of {each.vms}"
                for each in side.attach
                if each.online_s is None
            ]
    for before, now in comparison.latency:
        lines.append(f"requests through mosquitto with {before.broker}, medians")
        lines += [
            _row("added by MQTT to a target", "ms", before.added_s * 1e3, now.added_s * 1e3),
            _row("get of a calm VM", "ms", median(before.get_s) * 1e3, median(now.get_s) * 1e3),
        ]
    return "\n".join(lines)


def _rate(windows: Sequence[Window]) -> float | None:
    return median(window.rate for window in windows) * 100 if windows else None


def _late_ms(windows: Sequence[Window]) -> float | None:
    late = [window.late_p99_s * 1e3 for window in windows if window.late_p99_s is not None]
    return median(late) if late else None


def _online_s(side: Side) -> float | None:
    reached = [each.online_s for each in side.attach if each.online_s is not None]
    return median(reached) if reached else None


def _row(title: str, unit: str, before: float | None, now: float | None) -> str:
    ratio = f"{now / before:.2f}" if now is not None and before else "-"
    shown = ["-" if value is None else f"{value:.3g} {unit}" for value in (before, now)]
    return f"  {title:32}  {shown[0]:>12}  {shown[1]:>12}  {ratio:>6}"


def _differ(part: float) -> str:
    return f"  {part:.0%}" if part else ""


def main() -> int:
    """Compare; return the exit code: 1 if it could not be done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("base", help="a commit, branch or tag")
    parser.add_argument("--vms", type=int, action="append", help=f"this size; may be repeated {SIZES}")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each agent (3)")
    parser.add_argument("--window-s", type=float, default=3.0, help="seconds of each measurement (3)")
    parser.add_argument("--online-s", type=float, default=30.0, help="limit of attaching (30)")
    parser.add_argument("--json", action="store_true", help="all values, as one JSON document")
    options = parser.parse_args()
    end_on_sigterm()
    try:
        with worktree(options.base) as base:
            title = _git("rev-parse", "--short", f"{options.base}^{{commit}}")
            comparison = asyncio.run(
                compared(
                    base,
                    title,
                    options.vms or SIZES,
                    rounds=options.rounds,
                    window_s=options.window_s,
                    online_s=options.online_s,
                )
            )
    except (BenchError, LabError) as error:
        print(f"bench-compare: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(asdict(comparison), indent=2) if options.json else table(comparison))
    return 0


if __name__ == "__main__":
    sys.exit(main())
