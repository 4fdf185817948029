"""``fairshare``: what guests hold first, then emergencies, floors and wishes, by shares. Pure.

Each tick every guest is entitled to a size, in tiers, each filled by shares until the budget is spent:

    a  the floor as far as it is held      f  floors
    b  what is held                        g  uses: held with headroom and growth
    c  and half a second of a burst        h  page cache, a quarter more where it is short
    d  emergencies: half as much again     i  wants: of the last minute, before a collapse, at a peak
    e  what will be held in a second

What a guest held some time ago comes after the page cache that others have now: a renewed need is detected at
once, and page cache can be given back at once.

An entitlement alone moves nothing. A guest grows when its headroom is below half of what it is entitled to;
others shrink when a guest lacks memory, or the pool of free budget is low. If the need is urgent, donors give
all that is needed at once, otherwise a quarter of it. The guard orders the moves and enforces the budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.allocation import CLEAR, MARGIN, clear_of_emergency, with_margin
from qmpballoon.policy.estimate import EMERGENCY_EASES_AT
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
GIVES_AGAIN_S: Final = 1.0  # pause before a guest is asked again
CALM_S: Final = 2.0  # between two rounds of shrinks if no need is urgent
BURST_MARGIN: Final = 16 * MIB  # beyond MARGIN: 0.6 s of a burst of 40 MiB/s, until it is seen and relieved


@dataclass(frozen=True, slots=True)
class FairShare:
    """The default policy. It has no state: the guard's estimate covers what guests need over time."""

    name: str = "fairshare"

    def start(self) -> None:
        """Return the state before the first tick: none."""

    def step(self, state: None, snapshot: Snapshot) -> tuple[None, Decisions]:
        """Return what to do."""
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
        decisions |= moves(known, entitled, snapshot, pool)
        return None, decisions


@dataclass(frozen=True, slots=True)
class _Known:
    """A guest that may be moved, with its estimate."""

    guest: GuestSnapshot
    estimate: Estimate

    @property
    def lowest(self) -> int:
        """What it has, or will have when the last target is reached, whichever is less."""
        return min(self.guest.actual, self.guest.target or self.guest.actual)

    @property
    def cache(self) -> int:
        """The page cache that it would use."""
        return self.estimate.caches * 5 // 4 if self.estimate.caching else self.estimate.caches

    @property
    def least_gift(self) -> int:
        """The smallest shrink that is worth a command."""
        return max(8 * MIB, self.guest.actual // 25)

    @property
    def dead_band(self) -> int:
        """The smallest grow that is worth a command; half of it or less for a thin guest or an emergency."""
        if self.estimate.emergency:
            return self.guest.least_relief
        return self.least_gift // 2 if self.estimate.thin else self.least_gift

    @property
    def over_ceiling(self) -> int:
        """How far it is above its ceiling, in bytes."""
        return max(0, self.lowest - self.guest.ceiling)

    def worth_giving(self, now_s: float, *, over: bool, hurry: bool) -> int:
        """Return the smallest shrink for now: half if urgent, 1 MiB if the host is over its budget.

        A guest that was asked a moment ago has little left, so the usual minimum applies to it.
        """
        least = MIB if over else self.least_gift // 2 if hurry else self.least_gift
        if now_s - self.guest.guard.asked_at_s < GIVES_AGAIN_S:
            least = self.least_gift
        limit = self.guest.guard.gives_at_most  # a probe is worth a command, however large the guest
        return least if limit is None else max(MIB, min(least, limit))

    def may_give(self, *, over: bool) -> int:
        """Return what can be taken at once without causing an emergency in this guest.

        The distance to an emergency is smaller if the host is over its budget.
        """
        keeps = clear_of_emergency(self.guest, CLEAR if over else EMERGENCY_EASES_AT)
        gives = max(0, int(0.9 * (self.lowest - self.estimate.held - keeps)))
        limit = self.guest.guard.gives_at_most
        return gives if limit is None else min(gives, limit)

    def worth_a_command(self, *, over: bool) -> int:
        """Return the least to take if it can be given, even if the guest is entitled to a part of it."""
        return min(self.least_gift, SOON, self.may_give(over=over), self.lowest - self.guest.floor)


def entitlements(known: Mapping[VmId, _Known], snapshot: Snapshot, pool: int) -> Mapping[VmId, int]:
    """Return the size that each movable guest is entitled to now, in bytes."""
    others = sum(_counts(guest, snapshot.now_s) for guest in snapshot.guests if guest.id not in known)
    total = snapshot.charged + snapshot.free - pool - others  # of the budget, or of what the host has
    if not known:
        return {}
    shares = {vm: entry.guest.shares for vm, entry in known.items()}
    tiers = zip(*[_levels(entry) for entry in known.values()], strict=True)
    return filled_in_tiers(tuple(dict(zip(known, tier, strict=True)) for tier in tiers), shares, total)


def _counts(guest: GuestSnapshot, now_s: float) -> int:
    """Return what a guest that is not moved takes from the others' entitlement.

    A booting guest counts with its floor. Its size would make all others shrink for the seconds of a boot.
    """
    boots = not guest.driver_up and now_s - guest.booted_at_s < BOOTS_WITHIN_S
    return min(guest.charge, guest.floor) if boots else guest.charge


def _levels(entry: _Known) -> list[int]:
    """Return the sizes up to which the guest is filled in tiers a to i."""
    guest, estimate = entry.guest, entry.estimate
    held, ceiling = estimate.held, guest.ceiling
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
    """Return who grows and who shrinks, given what each is entitled to."""
    decisions: dict[VmId, Decision] = dict.fromkeys(known, Hold("at-ease"))
    lacking = 0
    hurry = False
    for vm, entry in known.items():
        target = entry.guest.clamp(entitled[vm])
        more = target - entry.guest.highest
        if more <= entry.dead_band:
            continue
        headroom, intended = entry.guest.highest - entry.estimate.held, target - entry.estimate.held
        below_floor = entry.guest.highest < entry.guest.floor
        pressed = entry.estimate.emergency or below_floor or 2 * headroom < intended
        rested = snapshot.now_s - entry.guest.guard.asked_at_s >= CALM_S
        caching = entry.estimate.caching and more > 2 * entry.dead_band and rested
        if not (pressed or caching):
            continue
        lacking += more
        hurry = hurry or entry.estimate.emergency or entry.estimate.thin
        why = _why(entry.estimate, pressed=pressed)
        decisions[vm] = SetTarget(target, why, urgent=entry.estimate.emergency)
    for vm, entry in known.items():
        if 0 < entry.over_ceiling <= entry.may_give(over=False):
            decisions[vm] = SetTarget(entry.guest.ceiling, "give")
    free = snapshot.free
    coming = sum(max(0, guest.charge - (guest.target or guest.charge)) for guest in snapshot.guests)
    wanted = lacking + (pool if lacking or free + coming < pool // 2 else 0) - free - coming
    if wanted > 0:
        decisions |= gifts(known, entitled, decisions, wanted, hurry=hurry or free < 0, snapshot=snapshot)
    return decisions


def _why(estimate: Estimate, *, pressed: bool) -> str:
    if estimate.emergency:
        return "emergency"
    return "cache" if not pressed else "thin" if estimate.thin else "grow"


def gifts(
    known: Mapping[VmId, _Known],
    entitled: Mapping[VmId, int],
    decisions: Mapping[VmId, Decision],
    wanted: int,
    *,
    hurry: bool,
    snapshot: Snapshot,
) -> dict[VmId, Decision]:
    """Return how much each guest gives for ``wanted`` bytes in all; those with the most to spare give first.

    If the need is urgent, all of it is taken at once, from each guest only as much as it delivers quickly.
    Otherwise a quarter is taken, and no more until two seconds later. A guest may be asked for more than its
    part, to make the command worthwhile; the surplus is free for the next guest that lacks memory.
    """
    over = snapshot.free < 0
    donors = {vm: entry for vm, entry in known.items() if not isinstance(decisions[vm], SetTarget)}
    surplus = {
        vm: min(entry.may_give(over=over), entry.lowest - entry.guest.clamp(entitled[vm]))
        for vm, entry in donors.items()
    }
    surplus = {
        vm: size
        for vm, size in surplus.items()
        if size >= max(known[vm].worth_giving(snapshot.now_s, over=over, hurry=hurry), known[vm].over_ceiling)
    }
    rested = all(snapshot.now_s - known[vm].guest.guard.asked_at_s >= CALM_S for vm in surplus)
    if not surplus or not (hurry or rested):
        return {}
    there = sum(surplus.values())
    left = wanted * 5 // 4 if hurry else max(wanted // 4, MARGIN)
    given: dict[VmId, Decision] = {}
    for vm in sorted(surplus, key=lambda name: (-surplus[name], name)):
        part = min(surplus[vm], max(SOON, -(-surplus[vm] * wanted // there), known[vm].over_ceiling))
        part = max(part, known[vm].worth_a_command(over=over))
        given[vm] = SetTarget(known[vm].lowest - part, "give")
        left -= part
        if left <= 0:
            break
    return given
