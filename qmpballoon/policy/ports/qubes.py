"""``qubes``: the memory manager of Qubes OS; for the simulator only.

Follows QubesOS/qubes-core-admin, ``qubes/qmemman/algo.py`` (commit 173b415) and ``systemstate.py``
(commit 02ecfed), as of 2025; checked against the values of its own tests of the computation.

A VM prefers 1.3 times what it uses. If all can have that, the surplus is shared in proportion to the
preferences. If not, a VM that has more shrinks to its preference, and free memory goes to those that have
less. Donors come first. A grow waits up to 0.5 s for the memory, then gets what is free. A donor that did not
shrink is left out until it has moved. Changes of less than 150 MiB in all, or of 15 MiB for a VM below its
preference, are not made. The algorithm runs whenever a guest reports.

Here the free budget stands for Xen's free memory, and the VM's floor for the least preference (200 MiB).
Qubes' boost of dom0 has no counterpart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.units import MIB

CACHE_FACTOR: Final = 1.3
KEPT_FREE: Final = 50 * MIB
LEAST_DONATION: Final = 10 * MIB  # the smallest amount that is asked of a donor
LEAST_TRANSFER: Final = 150 * MIB
LEAST_GROWTH: Final = 15 * MIB  # of a VM below its preference
DONORS_HAVE_S: Final = 0.5
ROUNDING: Final = 0.999


@dataclass(frozen=True, slots=True)
class Domain:
    """The input of the computation about a VM, in bytes; ``used`` None: no figures, it is left out."""

    used: int | None
    minimum: int
    maximum: int
    actual: int  # its charge: the larger of actual and target
    last_target: int | None = None

    @property
    def preference(self) -> int:
        """The size that it should have."""
        return int(max(min((self.used or 0) * CACHE_FACTOR, self.maximum), self.minimum))


@dataclass(frozen=True, slots=True)
class QubesState:
    """Grows that wait for donors, and the donors that did not deliver."""

    waiting: tuple[tuple[VmId, int], ...] = ()  # acceptors and their targets, next first
    donors: Mapping[VmId, tuple[int, int]] | None = None  # charge before, target
    until_s: float = 0.0  # until when the next acceptor waits
    no_progress: frozenset[VmId] = frozenset()
    seen_at_s: float = float("-inf")  # of the newest figures that were used


@dataclass(frozen=True, slots=True)
class Qubes:
    """The policy."""

    @property
    def name(self) -> str:
        """The stable name."""
        return "qubes"

    def start(self) -> QubesState:
        """Return the state before the first tick."""
        return QubesState()

    def step(self, state: QubesState, snapshot: Snapshot) -> tuple[QubesState, Decisions]:
        """Continue a balance that waits for its donors, or begin one if a guest reported."""
        guests = {guest.id: guest for guest in snapshot.guests if _takes_part(guest)}
        decisions: dict[VmId, SetTarget] = {}
        if state.waiting:
            return _serve_waiting(state, snapshot, guests, decisions), decisions
        newest_s = max((guest.sample.seen_at_s for guest in guests.values() if guest.sample), default=0.0)
        if newest_s <= state.seen_at_s:
            return state, decisions
        moved = {vm for vm in state.no_progress if vm in guests and _has_moved(guests[vm])}
        state = replace(state, seen_at_s=newest_s, no_progress=state.no_progress - moved)
        domains = {vm: _domain(guest) for vm, guest in guests.items() if vm not in state.no_progress}
        free = snapshot.budget - snapshot.held_back - snapshot.charged
        wanted = balance(domains, free - KEPT_FREE)
        if not _is_worth_it(wanted, domains, free):
            return state, decisions
        donors = {vm: target for vm, target in wanted.items() if target < domains[vm].actual}
        for vm, target in donors.items():
            if target != guests[vm].target:
                decisions[vm] = SetTarget(target, "above-preference")
        given = {vm: (guests[vm].actual, target) for vm, target in donors.items()}
        acceptors = tuple((vm, target) for vm, target in wanted.items() if target > domains[vm].actual)
        state = replace(state, waiting=acceptors, donors=given, until_s=snapshot.now_s + DONORS_HAVE_S)
        return (_serve_waiting(state, snapshot, guests, decisions) if acceptors else state), decisions


def balance(domains: Mapping[VmId, Domain], free: int) -> dict[VmId, int]:
    """Return the targets in bytes that a balance of all with ``free`` bytes sets, donors first."""
    known = {vm: domain for vm, domain in domains.items() if domain.used is not None}
    available = free - sum(domain.preference - domain.actual for domain in known.values())
    targets = _with_surplus(known, available) if available > 0 else _when_short(known, free)
    donors = {vm: target for vm, target in targets.items() if target < known[vm].actual}
    return donors | targets


def _with_surplus(domains: Mapping[VmId, Domain], available: int) -> dict[VmId, int]:
    whole = sum(domain.preference for domain in domains.values())
    targets, left, takers = {}, 0, 0
    for vm, domain in domains.items():
        target = int(ROUNDING * (domain.preference + domain.preference / whole * available))
        if target > domain.maximum:
            left += target - domain.maximum
        else:
            takers += 1
        targets[vm] = min(target, domain.maximum)
    while left > 0 and takers > 0:
        bonus, left_next, takers_next = int(ROUNDING * (left / takers)), 0, takers
        for vm, target in targets.items():
            maximum = domains[vm].maximum
            if target >= maximum:
                continue
            if target + bonus >= maximum:
                left_next += target + bonus - maximum
                takers_next -= 1
            targets[vm] = min(maximum, target + bonus)
        left, takers = left_next, takers_next
    return targets


def _when_short(domains: Mapping[VmId, Domain], free: int) -> dict[VmId, int]:
    targets = {}
    left = free
    takers = {}
    for vm, domain in domains.items():
        spare = domain.actual - domain.preference
        if spare <= 0 and domain.actual < domain.maximum:
            takers[vm] = domain
        elif spare >= LEAST_DONATION:
            # The original subtracts what a donor gives instead of adding it; that is kept.
            left -= spare
            targets[vm] = domain.preference
    if left < 0:
        return targets
    whole = sum(domain.preference for domain in takers.values())
    for vm, domain in takers.items():
        share = domain.preference / whole * left
        targets[vm] = min(int(ROUNDING * (domain.actual + share)), domain.maximum)
    return targets


def _is_worth_it(targets: Mapping[VmId, int], domains: Mapping[VmId, Domain], free: int) -> bool:
    if KEPT_FREE - free > LEAST_GROWTH:
        return True
    asked = {vm: domains[vm].last_target or domains[vm].actual for vm in targets}
    changes = {vm: target - asked[vm] for vm, target in targets.items()}
    starving = any(
        change > LEAST_GROWTH and asked[vm] < domains[vm].preference for vm, change in changes.items()
    )
    return starving or sum(map(abs, changes.values())) + abs(free - KEPT_FREE) > LEAST_TRANSFER


def _serve_waiting(
    state: QubesState,
    snapshot: Snapshot,
    guests: Mapping[VmId, GuestSnapshot],
    decisions: dict[VmId, SetTarget],
) -> QubesState:
    """Give free memory to the waiting VMs in order; note the donors that did not deliver."""
    free = snapshot.budget - snapshot.held_back - snapshot.charged
    for place, (vm, target) in enumerate(state.waiting):
        guest = guests.get(vm)
        if guest is None:
            continue
        growth = target - guest.charge
        if free - growth >= 0.9 * KEPT_FREE:
            decisions[vm] = SetTarget(target, "below-preference")
            free -= growth
            continue
        if snapshot.now_s < state.until_s:
            return replace(state, waiting=state.waiting[place:])
        reachable = guest.charge + free - KEPT_FREE
        if reachable > guest.floor:
            decisions[vm] = SetTarget(guest.clamp(reachable), "donors-late")
        late = {
            donor
            for donor, (before, asked) in (state.donors or {}).items()
            if donor in guests
            and guests[donor].actual > asked + KEPT_FREE / 4
            and guests[donor].actual == before
        }
        return replace(state, waiting=(), donors=None, no_progress=state.no_progress | late)
    return replace(state, waiting=(), donors=None)


def _has_moved(guest: GuestSnapshot) -> bool:
    target = guest.actual if guest.target is None else guest.target
    return guest.charge <= target + KEPT_FREE / 2 or guest.charge < _domain(guest).preference


def _takes_part(guest: GuestSnapshot) -> bool:
    return guest.mode == "auto" and guest.answers and guest.driver_up and guest.run_state == "running"


def _domain(guest: GuestSnapshot) -> Domain:
    """Return the VM for the computation; used memory excludes page cache, as Qubes guests report it."""
    sample, used = guest.sample, None
    if sample is not None and sample.actual is not None:
        free, caches = sample.stats.free, sample.stats.caches
        used = sample.held if free is None or caches is None else max(0, sample.actual - free - caches)
    return Domain(used, guest.floor, guest.ceiling, guest.charge, guest.target)
