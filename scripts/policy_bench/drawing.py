"""Draws a recording of real guests as a run of the simulator. Pure."""

from __future__ import annotations

from typing import Final

from policy_bench.figures import figures
from policy_bench.recording import Recording
from policy_bench.workload import BASE_MIB
from qmpballoon.model.names import VmId
from qmpballoon.sim.drawing import draw
from qmpballoon.sim.figures import Figures
from qmpballoon.sim.host import Point, Run, Step
from qmpballoon.sim.trace import Trace
from qmpballoon.units import MIB

_GRID_S: Final = 0.2


def drawing(recording: Recording) -> str:
    """Return the SVG document of a run."""
    found = figures(recording)
    vms = max(1, len(recording.samples))
    return draw(
        Run(
            trace=Trace(
                name=f"{vms} real guests{' with deflate-on-oom' if recording.deflate_on_oom else ''}",
                about=f"{found.work_percent:g} % of the wanted memory was held, over time",
                duration_s=recording.seconds,
                mem_total=recording.budget,
                budget=recording.budget,
                vms=(),
            ),
            policy=recording.policy,
            figures=Figures(
                trace="real guests",
                policy=recording.policy,
                oom_kills=found.kills,
                vms_killed=found.vms_killed,
                starved_vm_s=found.starved_s,
                over_budget_mib_s=found.over_budget_mib_s,
                shortfall_percent=100 - found.work_percent,
                lent_mib=_lent_mib(recording),
                regret_mib=0,
                moves_per_vm_h=found.commands / vms / recording.seconds * 3600,
                reversals_per_vm_h=0,
                relief_p50_s=None,
                relief_max_s=None,
            ),
            violations=[],
            steps=[
                Step(one.at_s, VmId(one.vm), one.was or 0, one.now, one.why, None, None, None)
                for one in recording.decisions
                if one.at_s >= 0
            ],
            kills={
                VmId(name): [at_s for at_s, vm in recording.kills_at if vm == name]
                for name in recording.samples
            },
            points={VmId(name): _points(recording, name) for name in recording.samples},
        )
    )


def _points(recording: Recording, vm: str) -> list[Point]:
    base = BASE_MIB * MIB
    points: list[Point] = []
    for index in range(1, int(recording.seconds / _GRID_S) + 1):
        sample = recording.at(vm, index * _GRID_S)
        if sample is not None:
            actual = recording.size if sample.booting else sample.actual
            held = sample.used if sample.used is not None else points[-1].held if points else 0
            points.append(
                Point(index * _GRID_S, recording.size, actual, held, base + sample.wanted, sample.target)
            )
    return points


def _lent_mib(recording: Recording) -> float:
    """Return the mean of memory that guests had beyond an equal split."""
    share = recording.budget / max(1, len(recording.samples))
    points = [_points(recording, vm) for vm in recording.samples]
    moments = max(1, max(map(len, points), default=1))
    return sum(max(0.0, point.actual - share) for each in points for point in each) / moments / MIB
