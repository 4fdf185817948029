"""``proportional``: the host ballooning of XenServer.

Follows xapi-project/xen-api, ``ocaml/squeezed/lib/squeeze.ml`` (commit 033f5d0) and its design document: all
free memory is divided so that every VM is at the same part of its range, floor + part x (ceiling - floor);
what guests need is ignored. Shrinks come first, and grows only when all shrinks are complete. A VM that makes
no progress towards its target for 5 s is left out and pinned at its size until the next round. Free memory
is checked every 10 s, and every second during a round.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.units import KIB, MIB

CHECK_S: Final = 10.0
ITERATION_S: Final = 1.0
STUCK_AFTER_S: Final = 5.0
INACCURACY: Final = 4 * KIB  # a VM this near to its target has reached it
KEPT_FREE: Final = 10 * MIB  # of the host: 9 MiB of low memory and 1 MiB against rounding


@dataclass(frozen=True, slots=True)
class Domain:
    """The input of the computation about a VM, in bytes."""

    minimum: int
    maximum: int
    actual: int
    target: int

    @property
    def freeable(self) -> int:
        """The least that it frees at its minimum, in bytes."""
        return max(0, self.actual - self.minimum - 2 * INACCURACY)

    @property
    def range(self) -> int:
        """The distance between its limits, in bytes."""
        return max(0, self.maximum - self.minimum)

    @property
    def has_hit_target(self) -> bool:
        """Tell whether it has reached its target."""
        return abs(self.actual - self.target) <= INACCURACY


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a VM during a round."""

    actual: int
    at_s: float  # when actual last came nearer to the target
    is_stuck: bool = False


@dataclass(frozen=True, slots=True)
class ProportionalState:
    """``progress`` is None between rounds."""

    next_step_s: float = float("-inf")
    progress: Mapping[VmId, Progress] | None = field(default=None)


@dataclass(frozen=True, slots=True)
class Proportional:
    """The policy."""

    @property
    def name(self) -> str:
        """The stable name."""
        return "proportional"

    def start(self) -> ProportionalState:
        """Return the state before the first tick."""
        return ProportionalState()

    def step(self, state: ProportionalState, snapshot: Snapshot) -> tuple[ProportionalState, Decisions]:
        """Do one iteration of a round, or check whether one is needed, when that is due."""
        now_s = snapshot.now_s
        if now_s < state.next_step_s:
            return state, {}
        known = {guest.id: _domain(guest) for guest in snapshot.guests if _can_balloon(guest)}
        before = state.progress or {}
        progress = {vm: followed(before.get(vm), domain, now_s) for vm, domain in known.items()}
        active = {vm: domain for vm, domain in known.items() if not progress[vm].is_stuck}
        held = sum(known[guest.id].actual if guest.id in known else guest.charge for guest in snapshot.guests)
        free = snapshot.budget - snapshot.held_back - held
        wanted = one_phase(active, proportional_targets(list(active.values()), free - KEPT_FREE))
        changes = {vm: target for vm, target in wanted.items() if target != known[vm].target}
        moving = any(not domain.has_hit_target for domain in active.values())
        if not changes and (not moving or state.progress is None):
            return ProportionalState(now_s + CHECK_S), {}
        decisions = {
            vm: SetTarget(target, "equal-part-of-range" if target > known[vm].actual else "free-first")
            for vm, target in changes.items()
        }
        for vm in known:
            if progress[vm].is_stuck and not (vm in before and before[vm].is_stuck):
                decisions[vm] = SetTarget(pinned(known[vm]), "pinned-stuck")
        return ProportionalState(now_s + ITERATION_S, progress), decisions


def proportional_targets(domains: Sequence[Domain], free: int) -> list[int]:
    """Return the target of each domain, in order, if the ``free`` bytes of the host are divided too."""
    surplus = max(0, free + sum(domain.freeable for domain in domains))
    whole = sum(domain.range for domain in domains)
    part = min(1.0, surplus / whole) if whole else 0.0
    return [domain.minimum + int(part * domain.range) for domain in domains]


def one_phase(domains: Mapping[VmId, Domain], targets: Sequence[int]) -> dict[VmId, int]:
    """Return the targets to set now: those that free memory, or all others if no VM has to free any."""
    freeing: dict[VmId, int] = {}
    allocating: dict[VmId, int] = {}
    for (vm, domain), target in zip(domains.items(), targets, strict=True):
        frees = target < domain.actual - INACCURACY
        (freeing if frees else allocating)[vm] = target
    return freeing or allocating


def followed(before: Progress | None, domain: Domain, now_s: float) -> Progress:
    """Return the progress of a VM after another check."""
    if before is None:
        return Progress(domain.actual, now_s)
    moved, missing = domain.actual - before.actual, domain.target - domain.actual
    if not domain.has_hit_target and moved * missing > 0:
        return Progress(domain.actual, now_s)
    is_stuck = before.is_stuck or (not domain.has_hit_target and now_s - before.at_s > STUCK_AFTER_S)
    return Progress(domain.actual, before.at_s, is_stuck)


def pinned(domain: Domain) -> int:
    """Return the target that pins a stuck VM, so that it does not grow when it responds again."""
    return min(domain.maximum, max(domain.minimum, min(domain.target, domain.actual)))


def _can_balloon(guest: GuestSnapshot) -> bool:
    return guest.mode == "auto" and guest.answers and guest.driver_up and guest.run_state == "running"


def _domain(guest: GuestSnapshot) -> Domain:
    target = guest.actual if guest.target is None else guest.target
    return Domain(guest.floor, guest.ceiling, guest.actual, target)
