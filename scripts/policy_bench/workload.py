"""The workload of all policies: the demand of each guest over time, generated from a seed. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

SIZE_MIB: Final = 224  # of each guest
BUDGET: Final = 0.61  # of the sum of sizes
IDLE_MIB: Final = 8  # that a workload holds between bursts
PEAKS_MIB: Final = (90, 110, 130)  # all more than an equal split allows: 72
HOLDS_S: Final = (10.0, 18.0)
IDLES_S: Final = (8.0, 16.0)
BASE_MIB: Final = 59  # that the kernel of a lab guest never gives; measured
MARGIN_MIB: Final = 12  # kept beside what is held when bursts are placed
MOST_DEMAND: Final = 0.93  # of the budget, at any moment
WORKERS: Final = 5
BOOT_S: Final = 8.0  # counted for a reboot
REST: Final = 0.2  # of the run, at its end, without a change of demand
LEAST_REST_S: Final = 16.0
_GRID_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Step:
    """From ``at_s`` on the demand is ``mib``, reached at ``mib_per_s``."""

    at_s: float
    mib: int
    mib_per_s: int

    def wanted(self, before_mib: int, now_s: float) -> float:
        """Return the demand at a moment of this step, in MiB; a decrease is immediate."""
        if self.mib <= before_mib:
            return self.mib
        return min(self.mib, before_mib + (now_s - self.at_s) * self.mib_per_s)


@dataclass(frozen=True, slots=True)
class Script:
    """The workload of one guest. Times are seconds since the start of the measured run."""

    name: str
    steps: tuple[Step, ...]
    reads_mib: int = 0  # of the disk, through the page cache, every few seconds
    driver_gone_s: tuple[float, float] | None = None  # from and until
    reboots_at_s: float | None = None

    def wanted(self, now_s: float) -> float:
        """Return the demand of the workload at a moment, in MiB."""
        wanted = 0.0
        for step, after in itertools.zip_longest(self.steps, self.steps[1:]):
            if now_s < step.at_s:
                break
            wanted = step.wanted(int(wanted), min(now_s, after.at_s if after else now_s))
        return wanted

    def step_at(self, now_s: float) -> int | None:
        """Return the index of the step in force."""
        begun = [index for index, step in enumerate(self.steps) if step.at_s <= now_s]
        return begun[-1] if begun else None


@dataclass(frozen=True, slots=True)
class Scenario:
    """One run of the bench: the same for every policy."""

    seed: int
    seconds: float
    rate_mib_per_s: int
    scripts: tuple[Script, ...]
    rests_from_s: float
    most_wanted: float = field(default=0.0)  # of the budget, at the worst moment

    @property
    def budget_mib(self) -> int:
        """The most that all guests together may hold."""
        return int(BUDGET * SIZE_MIB * len(self.scripts))


def scenario(seed: int, seconds: float, rate_mib_per_s: int) -> Scenario:
    """Return the scenario of a run, with as many bursts as the budget allows."""
    random_ = random.Random(seed)
    rests_from_s = seconds - max(LEAST_REST_S, REST * seconds)
    others = [
        Script("reader", (Step(0, 20, rate_mib_per_s),), reads_mib=48),
        Script("refuser", (Step(0, IDLE_MIB, rate_mib_per_s),), driver_gone_s=(0.3 * seconds, 0.5 * seconds)),
        Script("rebooter", (Step(0, 40, rate_mib_per_s),), reboots_at_s=0.6 * seconds),
    ]
    budget_mib = int(BUDGET * SIZE_MIB * (len(others) + WORKERS))
    needed = [
        sum(_needed(script, index * _GRID_S) for script in others)
        + WORKERS * (BASE_MIB + IDLE_MIB + MARGIN_MIB)
        for index in range(int(seconds / _GRID_S) + 1)
    ]
    workers = _bursts(random_, needed, MOST_DEMAND * budget_mib, rests_from_s, rate_mib_per_s)
    return Scenario(
        seed, seconds, rate_mib_per_s, (*workers, *others), rests_from_s, max(needed) / budget_mib
    )


def _needed(script: Script, now_s: float) -> float:
    """Return what a guest needs at a moment, in MiB."""
    unloaded_s, boots = script.driver_gone_s, script.reboots_at_s
    if unloaded_s is not None and unloaded_s[0] - 1 <= now_s <= unloaded_s[1] + 1:
        return SIZE_MIB
    if boots is not None and boots <= now_s <= boots + BOOT_S:
        return SIZE_MIB
    return BASE_MIB + MARGIN_MIB + script.wanted(now_s)


def _bursts(
    random_: random.Random, needed: list[float], most: float, until_s: float, rate: int
) -> Sequence[Script]:
    """Place bursts where they fit; each adds to ``needed`` (MiB on the grid)."""
    steps: list[list[Step]] = [[Step(0, IDLE_MIB, rate)] for _ in range(WORKERS)]
    free_from_s = [random_.uniform(1, IDLES_S[1]) for _ in range(WORKERS)]
    while min(free_from_s) < until_s:
        worker = free_from_s.index(min(free_from_s))
        start_s, peak = free_from_s[worker], random_.choice(PEAKS_MIB)
        end_s = start_s + (peak - IDLE_MIB) / rate + random_.uniform(*HOLDS_S)
        if start_s + (peak - IDLE_MIB) / rate + 2 > until_s:
            break
        if end_s > until_s:  # held through the rest at the end
            end_s = len(needed) * _GRID_S
        span = range(int(start_s / _GRID_S), min(len(needed), int(end_s / _GRID_S) + 2))
        if any(needed[index] + peak - IDLE_MIB > most for index in span):
            free_from_s[worker] += 0.7
            continue
        for index in span:
            needed[index] += peak - IDLE_MIB
        steps[worker] += [Step(start_s, peak, rate)]
        if end_s < until_s:
            steps[worker] += [Step(end_s, IDLE_MIB, rate)]
        free_from_s[worker] = end_s + random_.uniform(*IDLES_S)
    return [Script(f"worker{number}", tuple(one)) for number, one in enumerate(steps, 1)]
