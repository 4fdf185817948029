"""``fairshare``: held memory first, then emergencies, floors and further demand, by shares. Pure.

Each tick every guest is entitled to a size, in tiers, each filled by shares until the budget is spent:

    a  the floor as far as it is held      f  floors
    b  what is held                        g  uses: held with headroom and growth
    c  and half a second of a burst        h  page cache, a quarter more where it is short
    d  emergencies: half as much again     i  wants: of the last minute, before a collapse, at a peak
    e  what will be held in a second

What a guest held some time ago comes after present page cache of others: a renewed need is detected at once,
and page cache can be released at once.

An entitlement alone causes no move. A guest grows when its headroom is below half of what it is entitled to;
others shrink when a guest lacks memory, or the pool of free budget is low. If the need is urgent, donors give
all that is needed at once, otherwise a quarter of it. If no guest lacks memory, guests at rest are brought to
equal headroom (`evening`). The guard orders the moves and enforces the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.allocation import CLEARANCE, MARGIN, clear_of_emergency, with_margin
from qmpballoon.policy.claims import PACE_S
from qmpballoon.policy.estimate import EMERGENCY_EASES_AT
from qmpballoon.policy.evening import Plan, carried_out, is_needed, planned
from qmpballoon.policy.sharing import filled_in_tiers
from qmpballoon.policy.snapshot import (
    Decision,
    Decisions,
    Estimate,
    GuestSnapshot,
    Hold,
    SetTarget,
    Snapshot,
)
from qmpballoon.units import MIB

POOL: Final = 0.04  # of the budget, or of the host if that is less; kept for the next emergency
BOOTS_WITHIN_S: Final = 20.0  # a guest without a driver for longer counts as having none, and keeps its size
SOON: Final = 64 * MIB  # what a guest delivers in half a second
SHRINK_PAUSE_S: Final = 1.0  # before a guest is shrunk again
CALM_S: Final = 2.0  # between two rounds of shrinks if no need is urgent
BURST_MARGIN: Final = 16 * MIB  # beyond MARGIN: 0.6 s of a burst of 40 MiB/s, until it is relieved


@dataclass(frozen=True, slots=True)
class FairShare:
    """The default policy. The guard's estimate keeps the history; the state is a plan for guests at rest.

    Only tests turn ``evens_out`` off.
    """

    name: str = "fairshare"
    evens_out: bool = True

    def start(self) -> Plan | None:
        """Return the state before the first tick: no plan."""
        return None

    def step(self, state: Plan | None, snapshot: Snapshot) -> tuple[Plan | None, Decisions]:
        """Return the next state and what to do."""
        known = {
            guest.id: _Known(guest, guest.estimate)
            for guest in snapshot.guests
            if guest.mode == "auto" and guest.driver_up and guest.estimate is not None
        }
        decisions: dict[VmId, Decision] = {
            guest.id: Hold("no-figures") for guest in snapshot.guests if guest.id not in known
        }
        pool = int(min(snapshot.budget, snapshot.mem_total or snapshot.budget) * POOL)
        entitled = entitlements(known, snapshot, pool)
        needed = moves(known, entitled, snapshot, pool)
        decisions |= needed
        if not self.evens_out or is_needed(needed.values()):
            return None, decisions
        plan = state or planned(known, entitled, snapshot, pool)
        if plan is None:
            return None, decisions
        plan, evened = carried_out(plan, known, snapshot)
        return plan, {**decisions, **evened}


@dataclass(frozen=True, slots=True)
class _Known:
    """A guest that may be moved, with its estimate."""

    guest: GuestSnapshot
    estimate: Estimate

    @property
    def lowest(self) -> int:
        """The smaller of actual and target, in bytes."""
        return min(self.guest.actual, self.guest.target or self.guest.actual)

    @property
    def cache(self) -> int:
        """The page cache that it would use."""
        return self.estimate.caches * 5 // 4 if self.estimate.caching else self.estimate.caches

    @property
    def least_shrink(self) -> int:
        """The smallest shrink that is worth a command."""
        return max(8 * MIB, self.guest.actual // 25)

    @property
    def dead_band(self) -> int:
        """The smallest grow that is worth a command; half of it or less for a thin guest or an emergency."""
        if self.estimate.emergency:
            return self.guest.least_relief
        return self.least_shrink // 2 if self.estimate.thin else self.least_shrink

    def is_paced(self, now_s: float) -> bool:
        """Tell whether it was moved too recently for a guest whose claims are doubted."""
        return self.estimate.doubted and now_s - self.guest.guard.asked_at_s < PACE_S

    @property
    def over_ceiling(self) -> int:
        """By how much it exceeds its ceiling, in bytes."""
        return max(0, self.lowest - self.guest.ceiling)

    def least_shrink_now(self, now_s: float, *, over: bool, is_urgent: bool) -> int:
        """Return the smallest shrink now: half if urgent, 1 MiB if the host is over its budget.

        The usual minimum applies to a guest that was shrunk within the last second, because it has little
        left.
        """
        least = MIB if over else self.least_shrink // 2 if is_urgent else self.least_shrink
        if now_s - self.guest.guard.asked_at_s < SHRINK_PAUSE_S:
            least = self.least_shrink
        limit = self.guest.guard.gives_at_most  # a probe is worth a command, however large the guest
        return least if limit is None else max(MIB, min(least, limit))

    def can_give(self, *, over: bool) -> int:
        """Return what can be taken at once without causing an emergency in this guest.

        The distance to an emergency is smaller if the host is over its budget.
        """
        keeps = clear_of_emergency(self.guest, CLEARANCE if over else EMERGENCY_EASES_AT)
        gives = max(0, int(0.9 * (self.lowest - self.estimate.held - keeps)))
        limit = self.guest.guard.gives_at_most
        return gives if limit is None else min(gives, limit)

    def least_worth_a_command(self, *, over: bool) -> int:
        """Return the smallest shrink to send if possible, even if the guest is entitled to a part of it."""
        return min(self.least_shrink, SOON, self.can_give(over=over), self.lowest - self.guest.floor)


def entitlements(known: Mapping[VmId, _Known], snapshot: Snapshot, pool: int) -> Mapping[VmId, int]:
    """Return the size that each movable guest is entitled to now, in bytes."""
    others = sum(_counted(guest, snapshot.now_s) for guest in snapshot.guests if guest.id not in known)
    total = snapshot.charged + snapshot.free - pool - others  # of the budget, or of what the host has
    if not known:
        return {}
    shares = {vm: entry.guest.shares for vm, entry in known.items()}
    tiers = zip(*[_levels(entry) for entry in known.values()], strict=True)
    return filled_in_tiers(tuple(dict(zip(known, tier, strict=True)) for tier in tiers), shares, total)


def _counted(guest: GuestSnapshot, now_s: float) -> int:
    """Return the bytes of a guest that is not moved, which the others cannot be entitled to.

    A booting guest counts with its floor. If it counted with its size, all others would shrink during each
    boot.
    """
    boots = not guest.driver_up and now_s - guest.booted_at_s < BOOTS_WITHIN_S
    return min(guest.charge, guest.floor) if boots else guest.charge


def _levels(entry: _Known) -> list[int]:
    """Return the sizes up to which the guest is filled in tiers a to i."""
    guest, estimate = entry.guest, entry.estimate
    held, ceiling = estimate.counted, guest.ceiling
    needs = with_margin(held)
    cached = estimate.uses + entry.cache
    levels = (
        min(guest.floor, needs),
        needs,
        needs + BURST_MARGIN,
        held * 3 // 2 if estimate.emergency else 0,
        held * 110 // 100 + MARGIN + int(estimate.trend),
        guest.floor,
        estimate.uses,
        cached,
        max(estimate.want, cached),
    )
    return [level if level < ceiling else ceiling for level in levels]


def moves(
    known: Mapping[VmId, _Known], entitled: Mapping[VmId, int], snapshot: Snapshot, pool: int
) -> dict[VmId, Decision]:
    """Return the grows and shrinks that the entitlements call for."""
    decisions: dict[VmId, Decision] = {
        vm: Hold("unused-claims" if entry.estimate.doubted else "at-ease") for vm, entry in known.items()
    }
    lacking = 0
    is_urgent = False
    for vm, entry in known.items():
        target = entry.guest.clamp(entitled[vm])
        more = target - entry.guest.highest
        if more <= entry.dead_band or entry.is_paced(snapshot.now_s):
            continue
        headroom, intended = entry.guest.highest - entry.estimate.counted, target - entry.estimate.counted
        below_floor = entry.guest.highest < entry.guest.floor
        estimate = entry.estimate
        lacks_headroom = estimate.emergency or estimate.doubted or below_floor or 2 * headroom < intended
        rested = snapshot.now_s - entry.guest.guard.asked_at_s >= CALM_S
        caching = entry.estimate.caching and more > 2 * entry.dead_band and rested
        if not (lacks_headroom or caching):
            continue
        lacking += more
        is_urgent = is_urgent or entry.estimate.emergency or entry.estimate.thin
        why = _why(entry.estimate, lacks_headroom=lacks_headroom)
        decisions[vm] = SetTarget(target, why, urgent=entry.estimate.emergency)
    for vm, entry in known.items():
        if 0 < entry.over_ceiling <= entry.can_give(over=False):
            decisions[vm] = SetTarget(entry.guest.ceiling, "give")
    free = snapshot.free
    pending = sum(max(0, guest.charge - (guest.target or guest.charge)) for guest in snapshot.guests)
    wanted = lacking + (pool if lacking or free + pending < pool // 2 else 0) - free - pending
    if wanted > 0:
        decisions |= shrinks(
            known, entitled, decisions, wanted, is_urgent=is_urgent or free < 0, snapshot=snapshot
        )
    return decisions


def _why(estimate: Estimate, *, lacks_headroom: bool) -> str:
    if estimate.acute:
        return "emergency"
    return "cache" if not lacks_headroom else "thin" if estimate.thin else "grow"


def shrinks(
    known: Mapping[VmId, _Known],
    entitled: Mapping[VmId, int],
    decisions: Mapping[VmId, Decision],
    wanted: int,
    *,
    is_urgent: bool,
    snapshot: Snapshot,
) -> dict[VmId, Decision]:
    """Return the shrinks that free ``wanted`` bytes; guests with the largest surplus come first.

    If the need is urgent, all of it is taken at once, from each guest only as much as it delivers quickly.
    Otherwise a quarter is taken, and no more for two seconds. A shrink may exceed the guest's part, to be
    worth a command; the excess is free for the next guest that lacks memory.
    """
    over = snapshot.free < 0
    donors = {vm: entry for vm, entry in known.items() if not isinstance(decisions[vm], SetTarget)}
    surplus = {
        vm: min(entry.can_give(over=over), entry.lowest - entry.guest.clamp(entitled[vm]))
        for vm, entry in donors.items()
        if is_urgent or not entry.is_paced(snapshot.now_s)
    }
    surplus = {
        vm: size
        for vm, size in surplus.items()
        if size >= known[vm].over_ceiling
        and size >= known[vm].least_shrink_now(snapshot.now_s, over=over, is_urgent=is_urgent)
    }
    rested = all(snapshot.now_s - known[vm].guest.guard.asked_at_s >= CALM_S for vm in surplus)
    if not surplus or not (is_urgent or rested):
        return {}
    total = sum(surplus.values())
    left = wanted * 5 // 4 if is_urgent else max(wanted // 4, MARGIN)
    given: dict[VmId, Decision] = {}
    for vm in sorted(surplus, key=lambda name: (-surplus[name], name)):
        part = min(surplus[vm], max(SOON, -(-surplus[vm] * wanted // total), known[vm].over_ceiling))
        part = max(part, known[vm].least_worth_a_command(over=over))
        given[vm] = SetTarget(known[vm].lowest - part, "give")
        left -= part
        if left <= 0:
            break
    return given
