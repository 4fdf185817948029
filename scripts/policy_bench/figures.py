"""The figures of a recording. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from policy_bench.recording import Recording, Sample
from qmpballoon.units import MIB

STARVED: Final = 0.06  # of actual available, or less
QEMU_OVERHEAD: Final = 44 * MIB  # resident beside a guest's memory; measured with lab guests
LONGEST_GAP_S: Final = 1.0  # between two samples; longer gaps are not counted
REST_BEGINS_S: Final = 8.0  # after the last change of a demand, while memory is still moving
_GRID_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one run."""

    policy: str
    deflate_on_oom: bool
    kills: int
    oom_kills: int
    crashes: int
    vms_killed: int
    work_mib_s: int  # wanted memory that was held, over time
    work_percent: float  # of what was wanted
    starved_s: float
    over_budget_mib_s: int
    over_budget_longest_s: float  # the longest period more than 1 % over
    over_budget_rss_mib_s: int
    used_percent: float  # of the budget, on average
    commands: int
    commands_per_vm_min: float  # while demands change
    commands_at_rest: int
    samples_per_s: float  # of each guest


def figures(recording: Recording) -> Figures:
    """Return the figures of a recording."""
    work = wanted = starved_s = 0.0
    count = 0
    for samples in recording.samples.values():
        count += len(samples)
        for sample, after in pairwise(samples):
            passed_s = min(LONGEST_GAP_S, after.at_s - sample.at_s)
            work += min(sample.held, sample.wanted) * passed_s
            wanted += sample.wanted * passed_s
            if not sample.booting and sample.available < STARVED * sample.actual:
                starved_s += passed_s
    sums = _sums(recording)
    over = [max(0, actual - recording.budget) for actual, _ in sums]
    over_rss = [max(0, rss - recording.budget) for _, rss in sums]
    rest_s = recording.rests_from_s + REST_BEGINS_S
    sent = [one for one in recording.decisions if 0 <= one.at_s <= recording.seconds]
    busy = [one for one in sent if one.at_s < recording.rests_from_s]
    vms = max(1, len(recording.samples))
    return Figures(
        policy=recording.policy,
        deflate_on_oom=recording.deflate_on_oom,
        kills=len(recording.kills_at),
        oom_kills=recording.oom_kills,
        crashes=recording.crashes,
        vms_killed=len({vm for _, vm in recording.kills_at}),
        work_mib_s=round(work / MIB),
        work_percent=round(100 * work / wanted, 1) if wanted else 0.0,
        starved_s=round(starved_s, 1),
        over_budget_mib_s=round(sum(over) * _GRID_S / MIB),
        over_budget_longest_s=round(_longest(over, recording.budget // 100) * _GRID_S, 1),
        over_budget_rss_mib_s=round(sum(over_rss) * _GRID_S / MIB),
        used_percent=round(100 * sum(actual for actual, _ in sums) / max(1, len(sums)) / recording.budget, 1),
        commands=len(sent),
        commands_per_vm_min=round(len(busy) / vms / recording.rests_from_s * 60, 1),
        commands_at_rest=len([one for one in sent if one.at_s >= rest_s]),
        samples_per_s=round(count / vms / recording.seconds, 1),
    )


def _sums(recording: Recording) -> Sequence[tuple[int, int]]:
    """Return the sums of usable memory and of the QEMUs' resident memory, over time."""
    moments = [index * _GRID_S for index in range(1, int(recording.seconds / _GRID_S) + 1)]
    seen = [[recording.at(vm, moment) for vm in recording.samples] for moment in moments]
    return [
        (
            sum(_may_use(sample, recording.size) for sample in samples if sample is not None),
            sum(max(0, sample.rss - QEMU_OVERHEAD) for sample in samples if sample is not None),
        )
        for samples in seen
    ]


def _may_use(sample: Sample, size: int) -> int:
    return size if sample.booting else sample.actual


def _longest(over: Sequence[int], more_than: int) -> int:
    longest = now = 0
    for one in over:
        now = now + 1 if one > more_than else 0
        longest = max(longest, now)
    return longest
