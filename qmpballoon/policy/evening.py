"""Brings guests at rest to equal headroom, by shares, while no guest lacks memory. Pure.

Donors are chosen when a guest lacks memory, and what they gave does not return afterwards: equal guests would
stay at different sizes. When no guest was moved for a minute and a half, they divide what they have together
anew. Those with too much give first, and the others grow when that memory is free. The free memory of the
budget stays free. The plan ends when it is carried out, when any guest lacks memory, or after half a minute.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from qmpballoon.model.names import VmId
from qmpballoon.policy.sharing import Claim, split, water_fill
from qmpballoon.policy.snapshot import Decision, Estimate, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.units import MIB

REST_S: Final = 90.0  # since the last move of any guest
PLAN_FOR_S: Final = 30.0
KEPT: Final = 0.75  # of the headroom that it is entitled to; it grows when it has less than half
WORTH: Final = 2  # times the usual dead band: the difference of a guest that is worth a plan


class Movable(Protocol):
    """A guest that the policy may move."""

    @property
    def guest(self) -> GuestSnapshot:
        """The guest."""
        ...

    @property
    def estimate(self) -> Estimate:
        """What it has and needs."""
        ...

    @property
    def lowest(self) -> int:
        """The smaller of actual and target, in bytes."""
        ...

    @property
    def least_shrink(self) -> int:
        """The dead band, in bytes."""
        ...

    def can_give(self, *, over: bool) -> int:
        """Return what can be taken at once, in bytes."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes of some guests when their headroom is equal, and the free memory that is not used for it."""

    goals: Mapping[VmId, int]
    kept_free: int
    until_s: float


def planned(
    known: Mapping[VmId, Movable], entitled: Mapping[VmId, int], snapshot: Snapshot, pool: int
) -> Plan | None:
    """Return a plan for the guests at rest, or None if no guest's difference is worth a command."""
    now_s = snapshot.now_s
    if any(now_s - entry.guest.guard.asked_at_s < REST_S for entry in known.values()):
        return None
    resting = {vm: entry for vm, entry in known.items() if _is_at_rest(entry, now_s)}
    if len(resting) < 2:
        return None
    entries = resting.values()
    claims = [_claim(entry, entitled[vm]) for vm, entry in resting.items()]
    headroom = sum(entry.lowest - entry.estimate.held for entry in entries)
    if sum(claim.least for claim in claims) >= headroom:
        return None
    goals = {
        vm: entry.estimate.held + part
        for (vm, entry), part in zip(resting.items(), split(headroom, claims), strict=True)
    }
    off = {vm: abs(goal - resting[vm].lowest) for vm, goal in goals.items()}
    if all(size < WORTH * resting[vm].least_shrink for vm, size in off.items()):
        return None
    moved = {vm: goal for vm, goal in goals.items() if off[vm] >= resting[vm].least_shrink}
    if not any(goal < resting[vm].lowest for vm, goal in moved.items()):
        return None
    return Plan(moved, max(0, min(pool, snapshot.free)), now_s + PLAN_FOR_S)


def carried_out(
    plan: Plan, known: Mapping[VmId, Movable], snapshot: Snapshot
) -> tuple[Plan | None, dict[VmId, Decision]]:
    """Return the moves that the plan asks for now, and the plan, or None when it is over."""
    if snapshot.now_s >= plan.until_s or not plan.goals.keys() <= known.keys():
        return None, {}
    donors = {
        vm: goal for vm, goal in plan.goals.items() if known[vm].guest.highest - goal >= _least(known[vm])
    }
    if donors:
        return plan, {
            vm: SetTarget(goal, "even-out") for vm, goal in donors.items() if known[vm].lowest > goal
        }
    lacking = {
        vm: more
        for vm, goal in plan.goals.items()
        if (more := goal - known[vm].guest.highest) >= _least(known[vm])
    }
    shares = {vm: known[vm].guest.shares for vm in lacking}
    parts = water_fill(lacking, shares, snapshot.free - plan.kept_free)
    return None, {
        vm: SetTarget(known[vm].guest.highest + part, "even-out")
        for vm, part in parts.items()
        if part >= _least(known[vm])
    }


def is_needed(decisions: Iterable[Decision]) -> bool:
    """Tell whether any guest is to be moved for another reason."""
    return any(isinstance(decision, SetTarget) for decision in decisions)


def _least(entry: Movable) -> int:
    """Return the smallest move within a plan."""
    return max(4 * MIB, entry.least_shrink // 2)


def _claim(entry: Movable, entitled: int) -> Claim:
    """Return the least and the most headroom that a guest may have.

    It keeps what it uses, and enough of what it is entitled to that it does not grow again for that.
    """
    held, guest = entry.estimate.held, entry.guest
    most_given = entry.lowest - entry.can_give(over=False)
    least = max(max(entry.estimate.uses, guest.floor, most_given) - held, int(KEPT * (entitled - held)))
    return Claim(least, max(least, guest.ceiling - held), guest.shares)


def _is_at_rest(entry: Movable, now_s: float) -> bool:
    guest, estimate = entry.guest, entry.estimate
    return (
        now_s - guest.booted_at_s >= REST_S
        and guest.guard.gives_at_most is None
        and guest.highest - entry.lowest < MIB
        and not (estimate.emergency or estimate.thin or estimate.caching)
        and estimate.trend < MIB
    )
