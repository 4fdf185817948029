"""The figures of a simulator run.

oom_kills, vms_killed      kills by the guests' kernels, and how many VMs had one
starved_vm_s               VM-seconds with less than 6 % of what the guest has available, or with a
                           workload that waits to come back after a kill
over_budget_mib_s          what the guests could hold together beyond the budget, times how long
shortfall_percent          part of the workloads' demand, page cache included, that they did not get
lent_mib                   mean of what guests use beyond their part of an equal split of the budget
regret_mib                 mean of what a clairvoyant policy would have given beyond that to guests in need
moves_per_vm_h             commands that changed a target
reversals_per_vm_h         of these: against the VM's move before, within 120 s
relief_p50_s, relief_max_s how long a starvation lasted; None if there was none

Means are over the time of the trace. The clairvoyant policy knows every present demand. It fills anonymous
memory first, then page cache, by shares within the budget; the equal split is by shares within floors and
ceilings among the VMs that are there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from qmpballoon.policy.sharing import Claim, filled_in_tiers, split
from qmpballoon.sim.trace import TraceVm
from qmpballoon.units import MIB

STARVED: Final = 0.06  # of what the guest has, available
REVERSAL_S: Final = 120.0


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of one policy on one trace; MIB and seconds as the names say."""

    trace: str
    policy: str
    oom_kills: int
    vms_killed: int
    starved_vm_s: float
    over_budget_mib_s: float
    shortfall_percent: float
    lent_mib: float
    regret_mib: float
    moves_per_vm_h: float
    reversals_per_vm_h: float
    relief_p50_s: float | None
    relief_max_s: float | None

    def document(self) -> dict[str, object]:
        """Return the figures as the JSON result has them, rounded to milli-units."""
        return {
            key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(self).items()
        }


@dataclass(slots=True)
class VmTally:
    """What is counted of one VM; bytes and seconds."""

    there_s: float = 0.0
    kills: int = 0
    starved_s: float = 0.0
    asked_byte_s: float = 0.0
    lacked_byte_s: float = 0.0
    moves: int = 0
    reversals: int = 0
    reliefs_s: list[float] = field(default_factory=list)
    _starved_since_s: float | None = None
    _last_move: tuple[float, bool] | None = None

    def pass_time(self, passed_s: float, *, starved: bool, asked: int, lacked: int) -> None:
        """Count a stretch of time during which nothing changed."""
        self.there_s += passed_s
        self.asked_byte_s += asked * passed_s
        self.lacked_byte_s += lacked * passed_s
        if starved:
            self.starved_s += passed_s

    def starve(self, now_s: float, *, starved: bool) -> None:
        """Record whether the guest starves from now on."""
        if starved and self._starved_since_s is None:
            self._starved_since_s = now_s
        elif not starved and self._starved_since_s is not None:
            self.reliefs_s.append(now_s - self._starved_since_s)
            self._starved_since_s = None

    def move(self, now_s: float, *, up: bool) -> None:
        """Record a command that changed the target."""
        self.moves += 1
        if self._last_move is not None:
            last_s, last_up = self._last_move
            self.reversals += last_up != up and now_s - last_s <= REVERSAL_S
        self._last_move = (now_s, up)


@dataclass(slots=True)
class HostTally:
    """What is counted of the host; byte-seconds."""

    passed_s: float = 0.0
    over_budget_byte_s: float = 0.0
    measured_s: float = 0.0
    lent_byte_s: float = 0.0
    regret_byte_s: float = 0.0

    def pass_time(self, passed_s: float, *, over: int) -> None:
        """Count a stretch of time; at its end guests could hold ``over`` bytes beyond the budget."""
        self.passed_s += passed_s
        self.over_budget_byte_s += max(0, over) * passed_s

    def measure(self, passed_s: float, budget: int, needs: Sequence[Need]) -> None:
        """Count lent memory and regret for a stretch of time, as of its end."""
        self.measured_s += passed_s
        equal = split(budget, [Claim(need.vm.floor, need.vm.ceiling, need.vm.shares) for need in needs])
        lent = sum(max(0, need.used - part) for need, part in zip(needs, equal, strict=True))
        self.lent_byte_s += lent * passed_s
        first = {at: min(need.held, need.vm.ceiling) for at, need in enumerate(needs)}
        whole = {at: min(need.held + need.cache, need.vm.ceiling) for at, need in enumerate(needs)}
        if sum(whole.values()) > budget:
            shares = {at: need.vm.shares for at, need in enumerate(needs)}
            whole = dict(filled_in_tiers((first, whole), shares, budget))
        self.regret_byte_s += passed_s * sum(max(0, whole[at] - need.has) for at, need in enumerate(needs))


@dataclass(frozen=True, slots=True)
class Need:
    """What a guest asks for and has at one moment, in bytes."""

    vm: TraceVm
    held: int  # kernel and anonymous memory that it asks for
    cache: int  # page cache that it would like
    has: int  # size less balloon
    used: int  # the part of it that is used


def figures(trace: str, policy: str, host: HostTally, vms: Sequence[VmTally], end_s: float) -> Figures:
    """Return the figures of a run that ended at ``end_s``."""
    for vm in vms:
        vm.starve(end_s, starved=False)
    reliefs_s = sorted(round(relief_s, 3) for vm in vms for relief_s in vm.reliefs_s)
    vm_hours = sum(vm.there_s for vm in vms) / 3600 or 1.0
    asked = sum(vm.asked_byte_s for vm in vms)
    return Figures(
        trace=trace,
        policy=policy,
        oom_kills=sum(vm.kills for vm in vms),
        vms_killed=sum(vm.kills > 0 for vm in vms),
        starved_vm_s=sum(vm.starved_s for vm in vms),
        over_budget_mib_s=host.over_budget_byte_s / MIB,
        shortfall_percent=100 * sum(vm.lacked_byte_s for vm in vms) / asked if asked else 0.0,
        lent_mib=host.lent_byte_s / (host.measured_s or 1.0) / MIB,
        regret_mib=host.regret_byte_s / (host.measured_s or 1.0) / MIB,
        moves_per_vm_h=sum(vm.moves for vm in vms) / vm_hours,
        reversals_per_vm_h=sum(vm.reversals for vm in vms) / vm_hours,
        relief_p50_s=reliefs_s[(len(reliefs_s) - 1) // 2] if reliefs_s else None,
        relief_max_s=reliefs_s[-1] if reliefs_s else None,
    )
