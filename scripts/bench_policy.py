"""Comparison of policies on real guests: ``make bench-policy``, or ``scripts/bench_policy.py --help``.

Eight real QEMUs run the same script under each policy, one after another. The budget is 61 % of the sum of
their sizes, which is enough at every moment for a clairvoyant policy. ``static`` runs without an
agent: each guest gets the same size once. The other policies run in the agent with its guard, so emergencies
are relieved under each of them, even if the original lacks that function.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from policy_bench.drawing import drawing
from policy_bench.execution import STATIC, run_scenario
from policy_bench.figures import Figures, figures
from policy_bench.recording import Recording
from policy_bench.workload import Scenario, scenario

from qmpballoon.lab.require import LabError

POLICIES: Final = ("fixed", "proportional", "proxmox", "mom", "fairshare")
DEFLATE: Final = {"both": (False, True), "on": (True,), "off": (False,)}

_COLUMNS: Final = (
    ("policy", 13),
    ("deflate", 7),
    ("kills", 5),
    ("work", 6),
    ("work%", 5),
    (f"x{STATIC}", 7),
    ("starved s", 9),
    ("over MiB·s", 10),
    ("longest s", 9),
    ("used%", 5),
    ("cmd/VM·min", 10),
    ("at rest", 7),
)


def main() -> int:
    """Run the comparison, print a table, and return the exit code."""
    arguments = _parser().parse_args()
    policies = [*([STATIC] if not arguments.no_static else []), *arguments.policies.split(",")]
    planned = scenario(arguments.seed, arguments.seconds, arguments.rate)
    print(_heading(planned))
    recordings: list[Recording] = []
    with asyncio.Runner() as runner:
        for deflate_on_oom in DEFLATE[arguments.deflate_on_oom]:
            for policy in dict.fromkeys(policies):
                try:
                    recordings.append(
                        runner.run(
                            run_scenario(
                                planned,
                                policy,
                                deflate_on_oom=deflate_on_oom,
                                tables=arguments.tables,
                                log=arguments.log,
                            )
                        )
                    )
                except LabError as error:
                    print(f"{policy}: {error}", file=sys.stderr)
                    return 1
                print(_row(figures(recordings[-1]), _static_of(recordings)), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(_document(planned, recordings, traces=arguments.traces)))
    if arguments.plot:
        for one in recordings:
            _plot_file(arguments.plot, one).write_text(drawing(one))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--policies", default=",".join(POLICIES), help="comma-separated (default: %(default)s)"
    )
    parser.add_argument(
        "--no-static", action="store_true", help="omit the run without an agent; there are no ratios then"
    )
    parser.add_argument("--deflate-on-oom", choices=DEFLATE, default="both")
    parser.add_argument("--rate", type=int, default=20, metavar="MIB_PER_S", help="growth (default: 20)")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each run (default: 120)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="figures, and the samples before each kill")
    parser.add_argument("--traces", action="store_true", help="with --json: all samples, 10 a second")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.svg", help="drawings: FILE-POLICY.svg, or FILE-POLICY-deflate.svg"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="the agent's log of the last run")
    parser.add_argument("--tables", default="", metavar="TOML", help="appended to the agent's configuration")
    return parser


def _heading(planned: Scenario) -> str:
    return (
        f"{len(planned.scripts)} guests, budget {planned.budget_mib} MiB, "
        f"growth {planned.rate_mib_per_s} MiB/s, {planned.seconds:g} s each, seed {planned.seed}; "
        f"at most {planned.most_wanted:.0%} of the budget is needed at once\n"
        f"{os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}\n\n"
        + " ".join(f"{name:>{width}}" for name, width in _COLUMNS)
    )


def _static_of(recordings: Sequence[Recording]) -> Figures | None:
    """Return the figures of the static split to compare the last recording with."""
    for one in recordings:
        if one.policy == STATIC and one.deflate_on_oom == recordings[-1].deflate_on_oom:
            return figures(one)
    return None


def _row(found: Figures, static: Figures | None) -> str:
    ratio = f"{found.work_mib_s / static.work_mib_s:.2f}" if static and static.work_mib_s else "-"
    cells = (
        found.policy,
        "on" if found.deflate_on_oom else "off",
        found.kills,
        found.work_mib_s,
        found.work_percent,
        ratio,
        found.starved_s,
        found.over_budget_mib_s,
        found.over_budget_longest_s,
        found.used_percent,
        found.commands_per_vm_min,
        found.commands_at_rest,
    )
    row = " ".join(f"{cell:>{width}}" for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
    notes = [f"{found.crashes} guests crashed"] if found.crashes else []
    notes += [f"the kernels count {found.oom_kills} kills"] if found.oom_kills != found.kills else []
    return row + "".join(f"  ({note})" for note in notes)


def _plot_file(file: Path, recording: Recording) -> Path:
    deflate = "-deflate" if recording.deflate_on_oom else ""
    return file.with_name(f"{file.stem}-{recording.policy}{deflate}{file.suffix}")


def _document(planned: Scenario, recordings: Sequence[Recording], *, traces: bool) -> object:
    runs = []
    for one in recordings:
        run: dict[str, object] = {
            "figures": asdict(figures(one)),
            "kills": [asdict(kill) for kill in one.kills],
        }
        if traces:
            run["recording"] = asdict(one)
        runs.append(run)
    return {"schema": 2, "scenario": asdict(planned), "runs": runs}


if __name__ == "__main__":
    sys.exit(main())
