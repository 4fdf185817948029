"""Grants decisions within the budget. Shrinks are always granted, grows only from free memory. Pure.

An emergency may also use pending shrinks of other guests, the part of a booting guest's charge that is not
resident, and finally a loan beyond the budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qmpballoon.policy.estimate import EMERGENCY_EASES_AT, TREND_LOOKS_AHEAD_S
from qmpballoon.policy.sharing import water_fill
from qmpballoon.policy.snapshot import Decision, Decisions, GuestSnapshot, Hold, SetTarget, Snapshot
from qmpballoon.units import MIB, PAGE

LOAN: Final = 0.25  # of what the host has beyond the budget
MARGIN: Final = 8 * MIB
CLEARANCE: Final = 1.1  # times the available memory of an emergency: no guest is shrunk below that
BOOTING_GROWS: Final = 1.25  # times its resident memory: what a booting guest may use before its driver is up


def within_budget(requested: Decisions, snapshot: Snapshot, *, enforce: bool = True) -> tuple[Decisions, int]:
    """Return the decisions that the budget allows, and the bytes that are lent beyond the budget.

    Without ``enforce`` everything is granted; only tests use that.
    """
    guests = {guest.id: guest for guest in snapshot.guests}
    grows = {
        vm: decision
        for vm, decision in requested.items()
        if isinstance(decision, SetTarget) and decision.target > guests[vm].charge
    }
    urgent = {vm: decision.target - guests[vm].charge for vm, decision in grows.items() if decision.urgent}
    ordinary = {
        vm: decision.target - guests[vm].charge for vm, decision in grows.items() if not decision.urgent
    }
    pending = sum(
        _pending_shrink(guests[vm], decision) for vm, decision in requested.items() if vm not in urgent
    )
    free, not_resident = snapshot.free, sum(_charged_beyond_rss(guest) for guest in snapshot.guests)
    of_budget = snapshot.budget - snapshot.held_back - snapshot.charged + pending + not_resident
    shares = {vm: guest.shares for vm, guest in guests.items()}
    within = free + pending + not_resident
    most = _available_to_emergencies(snapshot, of_budget, pending)
    paid = water_fill(urgent, shares, min(within, most))
    short = {vm: _relief(guests[vm], size) - paid[vm] for vm, size in urgent.items()}
    loans = water_fill(short, shares, most - sum(paid.values()))
    paid = {vm: size + loans[vm] for vm, size in paid.items()}
    lent = max(0, sum(paid.values()) - max(0, of_budget))
    paid |= water_fill(ordinary, shares, free - sum(paid.values()))
    if not enforce:
        paid = urgent | ordinary
    return {
        **requested,
        **{vm: _grant(guests[vm], decision, paid[vm]) for vm, decision in grows.items()},
    }, lent


def with_margin(held: int) -> int:
    """Return the least that a guest must have, in bytes: below this it starts to reclaim or kill."""
    return held * 105 // 100 + MARGIN


def clear_of_emergency(guest: GuestSnapshot, times: float = CLEARANCE) -> int:
    """Return the headroom that keeps a guest out of an emergency for some seconds, in bytes.

    This is ``times`` the available memory at which an emergency begins, plus the growth expected in that
    time.
    """
    trend = guest.estimate.trend if guest.estimate is not None else 0.0
    return max(MARGIN, int(times * guest.critical)) + int(TREND_LOOKS_AHEAD_S * trend)


def _relief(guest: GuestSnapshot, asked: int) -> int:
    """Return the part of a grow that ends the guest's emergency for some seconds; no more is lent."""
    known = guest.estimate
    if known is None:
        return asked
    safe = known.held + clear_of_emergency(guest, EMERGENCY_EASES_AT)
    return max(0, min(asked, safe - guest.charge))


def _grant(guest: GuestSnapshot, decision: SetTarget, size: int) -> Decision:
    """Return the grow as far as it was granted, or a hold if the granted part is too small for a command."""
    asked = decision.target - guest.charge
    can_wait = not decision.urgent and guest.estimate is not None and not guest.estimate.thin
    least = max(MARGIN // 2, guest.actual // 50, asked // 2 if can_wait else 0)
    if decision.urgent:
        least = guest.least_relief
    if size == asked or size >= least:
        return replace(decision, target=guest.charge + size // PAGE * PAGE)
    if decision.urgent and guest.target is not None and guest.target <= guest.actual - guest.least_relief:
        return replace(decision, target=guest.actual)  # cancels a pending shrink; needs no free memory
    return Hold("awaits-memory")


def _pending_shrink(guest: GuestSnapshot, decision: Decision) -> int:
    """Return the bytes that the guest was asked for and has not given yet."""
    target = decision.target if isinstance(decision, SetTarget) else guest.target
    if not guest.driver_up or target is None:
        return 0
    return max(0, guest.actual - target)


def _charged_beyond_rss(guest: GuestSnapshot) -> int:
    """Return what a booting guest is charged beyond what it has resident."""
    if guest.driver_up or guest.rss is None:
        return 0
    return max(0, guest.charge - max(guest.floor, int(guest.rss * BOOTING_GROWS)))


def _available_to_emergencies(snapshot: Snapshot, of_budget: int, pending: int) -> int:
    """Return the bytes available to emergencies, by the budget and by the host's memory.

    A loan may use half of the reserve, or half of the host's available memory if that is less than its
    reserve. Pending shrinks are available however short the host is.
    """
    lends = snapshot.overload == "guests"
    if lends:
        of_budget += int(LOAN * max(0, snapshot.mem_total - snapshot.budget))
    if snapshot.mem_available is None:
        return of_budget
    kept = min(snapshot.reserve, snapshot.mem_available) // 2 if lends else snapshot.reserve
    of_host = max(0, snapshot.mem_available - kept) + pending - snapshot.promised
    return min(of_budget, of_host)
