"""The figures of a simulator run.

oom_kills, vms_killed      kills by the guests' kernels, and how many VMs had one
starved_vm_s               VM-seconds with less than 6 % of actual available, or with a workload that
                           was killed and has not restarted
over_budget_mib_s          memory that the guests could use beyond the budget, times its duration
shortfall_percent          part of the workloads' demand, page cache included, that was not met
lent_mib                   mean of what guests use beyond their part of an equal split of the budget
regret_mib                 mean of what a clairvoyant policy would have granted beyond that to guests in need
moves_per_vm_h             commands that changed a target
reversals_per_vm_h         of these: against the VM's move before, within 120 s
relief_p50_s, relief_max_s duration of a starvation; None if there was none

Means are over the time of the trace. The clairvoyant policy knows every present demand. It fills anonymous
memory first, then page cache, by shares within the budget; the equal split is by shares within floors and
ceilings among the VMs that have booted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

from qmpballoon.policy.sharing import Claim, filled_in_tiers, split
from qmpballoon.sim.trace import TraceVm
from qmpballoon.units import MIB

STARVED: Final = 0.06  # of actual: with less available the guest starves
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
    """The sums of one VM, in bytes and seconds."""

    present_s: float = 0.0
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
        """Count an interval without a change."""
        self.present_s += passed_s
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
    """The sums of the host, in byte-seconds."""

    passed_s: float = 0.0
    over_budget_byte_s: float = 0.0
    measured_s: float = 0.0
    lent_byte_s: float = 0.0
    regret_byte_s: float = 0.0

    def pass_time(self, passed_s: float, *, over: int) -> None:
        """Count an interval; at its end the guests could use ``over`` bytes beyond the budget."""
        self.passed_s += passed_s
        self.over_budget_byte_s += max(0, over) * passed_s

    def measure(self, passed_s: float, budget: int, needs: Sequence[Need]) -> None:
        """Count lent memory and regret of an interval, as of its end."""
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
    """The demand and the memory of a guest at one moment, in bytes."""

    vm: TraceVm
    held: int  # demand for kernel and anonymous memory
    cache: int  # demand for page cache
    has: int  # size less balloon
    used: int  # the part of it that is used


def figures(trace: str, policy: str, host: HostTally, vms: Sequence[VmTally], end_s: float) -> Figures:
    """Return the figures of a run that ended at ``end_s``."""
    for vm in vms:
        vm.starve(end_s, starved=False)
    reliefs_s = sorted(round(relief_s, 3) for vm in vms for relief_s in vm.reliefs_s)
    vm_hours = sum(vm.present_s for vm in vms) / 3600 or 1.0
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
