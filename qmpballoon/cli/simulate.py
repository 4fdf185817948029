"""``simulate``: runs policies on workload traces in the simulator; figures, reasons, a drawing."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Final

from qmpballoon import terminal
from qmpballoon.cli.program import DONE
from qmpballoon.errors import ConfigurationError, OutOfRange, Problem, QmpBalloonError
from qmpballoon.model.names import VmId
from qmpballoon.policy.registry import BARE, SIMULATED, simulated
from qmpballoon.sim.drawing import draw
from qmpballoon.sim.host import Host, Run, Step, play
from qmpballoon.sim.kernels import HARSHEST, KERNELS
from qmpballoon.sim.trace import Trace, read_trace
from qmpballoon.sim.traces import BUILT_IN, built_in
from qmpballoon.units import format_size

EXAMPLES: Final = f"""\
examples:
  qmpballoon simulate bursts               every policy on a built-in trace
  qmpballoon simulate my.json --policy fairshare --policy qubes
  qmpballoon simulate equilibrium --policy fairshare --why starving
  qmpballoon simulate bursts --policy fairshare --plot bursts.svg
  qmpballoon simulate all --seed 1 --seed 2 --seed 3 --json > figures.json

built-in traces: {", ".join(BUILT_IN)}; all plays each

policies: {", ".join(SIMULATED)}; policies of other programs run bare, guarded-NAME adds the guard

A trace file is JSON: a host with its budget, VMs, and rows of [time, anonymous bytes, page cache bytes].
The columns: kills by the guests' own kernels (and VMs that had one), VM-seconds starved, MiB·s over
budget, demanded memory that was not had, memory lent beyond an equal split, regret against a clairvoyant
division (means), moves per VM and hour and of these reversals within 120 s, seconds a starvation lasted,
and decisions against the rules (below a floor, over a ceiling, shrunk on stale figures).
"""
_PROGRESS_AFTER_S: Final = 1.0
_ENDING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SEEDS: Final = (1, 2, 3)
_LARGEST_SEED: Final = 2**31
_NOT_IN_A_FILE_NAME: Final = re.compile(r"[^\w.-]")
_LONGEST_PART: Final = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's arguments."""
    parser.add_argument("traces", metavar="TRACE", nargs="+", help="a trace FILE, a built-in name, or all")
    parser.add_argument(
        "--policy",
        metavar="NAME",
        action="append",
        type=_policy,
        help="play this policy; repeatable; default: all",
    )
    parser.add_argument(
        "--seed",
        metavar="N",
        action="append",
        type=_seed,
        help="of built-in traces and sampling; repeatable; default 1 2 3, with --why or --plot 1",
    )
    parser.add_argument(
        "--why", metavar="VM", help="print the decisions about this VM and their reasons, line by line"
    )
    parser.add_argument(
        "--plot",
        metavar="FILE.svg",
        type=_drawing,
        help="draw each run; with several, the file names contain trace and policy",
    )
    parser.add_argument(
        "--kernel",
        choices=tuple(KERNELS),
        default=HARSHEST.release,
        help="kernel of the guests, for its behaviour when memory is short; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one list")


def run(arguments: argparse.Namespace) -> int:
    """Run the verb and return the exit code."""
    closely = arguments.why is not None or arguments.plot is not None
    seeds = arguments.seed or (_SEEDS[:1] if closely else _SEEDS)
    traces = list(_traces(arguments.traces, seeds))
    for trace, _ in traces:
        for problem in trace.unknown:
            terminal.print_error(terminal.clean(f"warning: {trace.name}: {problem}"))
    if arguments.why is not None:
        _check_vm(arguments.why, [trace for trace, _ in traces])
    jobs = [
        _Job(trace, Host(seed=seed, kernel=KERNELS[arguments.kernel]), policy, closely)
        for trace, seed in traces
        for policy in dict.fromkeys(arguments.policy or SIMULATED)
    ]
    runs = _played(jobs)
    if arguments.plot is not None:
        _plot(Path(arguments.plot), runs)
    if arguments.json:
        terminal.print_json([one.figures.document() for one in runs])
        return DONE
    if arguments.why is not None:
        for one in runs:
            for line in why(one, VmId(arguments.why)):
                print(terminal.clean(line))
    for line in _table(runs):
        print(line)
    return DONE


class _Job:
    """One trace under one policy; can be called in another process and returns a run."""

    def __init__(self, trace: Trace, host: Host, policy: str, record: bool) -> None:
        self.trace, self.host, self.policy, self.record = trace, host, policy, record

    def __call__(self, progress: Callable[[float], None] | None = None) -> Run:
        return play(
            self.trace,
            simulated(self.policy),
            host=self.host,
            name=self.policy,
            record=self.record,
            progress=progress,
        )


def why(run: Run, vm: VmId) -> Iterator[str]:
    """Yield a line of text for each event of a VM: moves, holds, kills."""
    kills = [(at_s, "killed: the guest's kernel ran out of memory") for at_s in run.kills[vm]]
    moves = [(step.at_s, _step_line(step)) for step in run.steps if step.vm == vm]
    yield f"{vm} in {run.trace.name} under {run.policy}"
    if not kills and not moves:
        yield "  nothing was decided about it"
    for at_s, text in sorted([*kills, *moves]):
        yield f"  {at_s:8.1f} s  {text}"


def _step_line(step: Step) -> str:
    figures = "no figures"
    if step.held is not None and step.available is not None:
        figures = (
            f"held {format_size(step.held)}, {format_size(step.available)} available "
            f"{max(0.0, step.sample_age_s or 0.0):.1f} s before"
        )
    if step.target is None:
        return f"stays at {format_size(step.actual)}  {step.why}  ({figures})"
    verb = "grow" if step.target > step.actual else "shrink"
    return f"{verb} {format_size(step.actual)} -> {format_size(step.target)}  {step.why}  ({figures})"


def _traces(names: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[Trace, int]]:
    for name in dict.fromkeys(names):
        if name == "all" or name in BUILT_IN:
            for kind in BUILT_IN if name == "all" else (name,):
                for seed in dict.fromkeys(seeds):
                    yield built_in(kind, seed), seed
        elif os.sep not in name and "." not in name and not os.path.exists(name):
            reason = f"no file, and no built-in trace: these are {', '.join(BUILT_IN)}, all"
            raise ConfigurationError(name, [Problem(None, "", reason)])
        else:
            yield read_trace(name), seeds[0]


def _check_vm(name: str, traces: Sequence[Trace]) -> None:
    for trace in traces:
        names = [vm.name for vm in trace.vms]
        if name not in names:
            shown = ", ".join(names[:12]) + (" ..." if len(names) > 12 else "")
            raise OutOfRange(f"{trace.name} has no VM {name!r}; it has {shown}")


def _played(jobs: Sequence[_Job]) -> list[Run]:
    """Play all, in parallel if there are several; progress goes to stderr."""
    progress = _Progress()
    if len(jobs) == 1:
        run = jobs[0](lambda at_s: progress.show(f"{at_s:.0f} of {jobs[0].trace.duration_s:.0f} s played"))
        progress.show("")
        return [run]
    done: dict[int, Run] = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, initializer=_leave_signals_to_parent) as pool:
        try:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # until each process is set up
            try:
                futures = {pool.submit(job): place for place, job in enumerate(jobs)}
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
            for future in as_completed(futures):
                done[futures[future]] = future.result()
                progress.show(f"{len(done)} of {len(jobs)} runs")
        except BaseException:  # the end of the pool waits for the runs that its processes play
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            progress.show("")
    return [done[place] for place in range(len(jobs))]


def _leave_signals_to_parent() -> None:
    """Set up a process of the pool: Ctrl-C reaches it, too, and its parent ends it then."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)


class _Progress:
    """One line on a terminal's stderr, after the first second."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()

    def show(self, text: str) -> None:
        passed_s = time.monotonic() - self.began_s
        if sys.stderr.isatty() and passed_s >= _PROGRESS_AFTER_S:
            line = f"{text}, {passed_s:.0f} s" if text else ""
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)


def _plot(path: Path, runs: Sequence[Run]) -> None:
    for one in runs:
        name = _NOT_IN_A_FILE_NAME.sub("_", one.trace.name)[:_LONGEST_PART]
        here = path if len(runs) == 1 else path.parent / f"{path.stem}-{name}-{one.policy}{path.suffix}"
        try:
            here.write_text(draw(one), encoding="utf-8")
        except OSError as error:
            raise QmpBalloonError(f"cannot write {here}: {error.strerror}") from None
        print(f"drawn: {terminal.clean(here)}", file=sys.stderr)


def _table(runs: Sequence[Run]) -> list[str]:
    header = (
        *("trace", "policy", "kills", "VMs", "starved", "over budget", "shortfall", "lent", "regret"),
        *("moves", "reversals", "relief p50", "max", "against rules"),
    )
    units = ("", "", "", "hit", "VM·s", "MiB·s", "%", "MiB", "MiB", "/VM·h", "/VM·h", "s", "s", "")
    rows: list[Sequence[str]] = [units]
    groups = list(_grouped(runs))
    for trace, policy, group in groups:
        rows.append((terminal.clean(trace), policy, *_cells(group)))
    if len({trace for trace, _, _ in groups}) > 1:
        policies = dict.fromkeys(one.policy for one in runs)
        rows += [("all", name, *_cells([one for one in runs if one.policy == name])) for name in policies]
    lines = terminal.table(header, rows, left=(0, 1))
    return [terminal.coloured(lines[0], "bold"), *lines[1:]]


def _grouped(runs: Sequence[Run]) -> Iterator[tuple[str, str, list[Run]]]:
    """Yield the runs of one kind of trace and one policy together, all seeds in one group."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for one in runs:
        kind, _, seed = one.trace.name.rpartition("-")
        name = kind if kind in BUILT_IN and seed.isdigit() else one.trace.name
        groups.setdefault((name, one.policy), []).append(one)
    for (name, policy), group in groups.items():
        yield name, policy, group


def _cells(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the cells of one row: counts are added up, means and rates averaged over the runs."""
    found = [one.figures for one in runs]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    medians = [one.relief_p50_s for one in found if one.relief_p50_s is not None]
    longest = [one.relief_max_s for one in found if one.relief_max_s is not None]
    return (
        str(sum(one.oom_kills for one in found)),
        str(sum(one.vms_killed for one in found)),
        f"{sum(one.starved_vm_s for one in found):.1f}",
        f"{sum(one.over_budget_mib_s for one in found):.0f}",
        f"{mean([one.shortfall_percent for one in found]):.2f}",
        f"{mean([one.lent_mib for one in found]):.0f}",
        f"{mean([one.regret_mib for one in found]):.0f}",
        f"{mean([one.moves_per_vm_h for one in found]):.0f}",
        f"{mean([one.reversals_per_vm_h for one in found]):.0f}",
        f"{mean(medians):.1f}" if medians else "-",
        f"{max(longest):.1f}" if longest else "-",
        str(sum(len(one.violations) for one in runs)),
    )


def _policy(text: str) -> str:
    known = (*SIMULATED, *(f"guarded-{name}" for name in BARE))
    if text not in known:
        raise argparse.ArgumentTypeError(f"there is no policy {text!r}; there are {', '.join(known)}")
    return text


def _drawing(text: str) -> str:
    if Path(text).suffix.lower() != ".svg":
        raise argparse.ArgumentTypeError(f"a drawing is SVG: write FILE.svg, not {text!r}")
    return text


def _seed(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 11 and int(text) <= _LARGEST_SEED):
        raise argparse.ArgumentTypeError(f"{text!r} is no seed; write a whole number from 0 to 2**31")
    return int(text)
