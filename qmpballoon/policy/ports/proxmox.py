"""``proxmox``: the automatic ballooning of Proxmox VE.

Follows pve-manager, ``PVE/AutoBalloon.pm`` (``compute_alg1``) and ``auto_balloning`` in
``PVE/Service/pvestatd.pm``, as of 2025; checked against the values of its own test of that function.

Every 10 s the host's used memory is compared with 80 % of its RAM; the difference is given to VMs or taken
back. Here the budget stands for the 80 %, and the sum of all charges for the used memory. Within 10 MiB of it
no VM is moved, even if a guest starves. A VM has enough when its free memory (page cache does not count) is
over a quarter of its minimum. A VM with too little grows first, one with enough shrinks first, and the others
follow only if that changed nothing. No VM moves by more than 100 MiB a cycle. The age of the figures is
ignored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, SetTarget, Snapshot
from qmpballoon.units import MIB

CYCLE_S: Final = 10.0
DEAD_BAND: Final = 10 * MIB
LARGEST_CHANGE: Final = 100 * MIB
ENOUGH_FREE: Final = 0.25  # of the minimum


@dataclass(frozen=True, slots=True)
class Member:
    """The input of the computation about a VM, in bytes; ``free`` None: the guest does not report it."""

    balloon: int  # what it has: QMP's actual
    minimum: int
    maximum: int
    free: int | None
    shares: int = 1000

    @property
    def has_enough(self) -> bool:
        """Tell whether it has enough free memory to give some."""
        return (
            bool(self.free) and (self.free or 0) > self.minimum * ENOUGH_FREE and self.balloon >= self.minimum
        )


@dataclass(frozen=True, slots=True)
class ProxmoxState:
    """When the next cycle is due."""

    next_cycle_s: float = float("-inf")


@dataclass(frozen=True, slots=True)
class Proxmox:
    """The policy; its only memory is the time of the next cycle."""

    @property
    def name(self) -> str:
        """The stable name."""
        return "proxmox"

    def start(self) -> ProxmoxState:
        """Return the state before the first tick."""
        return ProxmoxState()

    def step(self, state: ProxmoxState, snapshot: Snapshot) -> tuple[ProxmoxState, Decisions]:
        """Compute the targets of one cycle, if it is due."""
        if snapshot.now_s < state.next_cycle_s:
            return state, {}
        members = {guest.id: _member(guest) for guest in snapshot.guests if _takes_part(guest)}
        goal = snapshot.budget - snapshot.held_back - snapshot.charged
        why = "host-below-target" if goal > 0 else "host-above-target"
        decisions = {vm: SetTarget(target, why) for vm, target in targets(members, goal).items()}
        return ProxmoxState(snapshot.now_s + CYCLE_S), decisions


def targets(
    members: Mapping[VmId, Member], goal: int, largest_change: int = LARGEST_CHANGE
) -> dict[VmId, int]:
    """Return the new size of each VM that changes, to grow all by ``goal`` bytes (negative: shrink)."""
    found: dict[VmId, int] = {}
    if abs(goal) <= DEAD_BAND:
        return found
    first = [vm for vm, member in members.items() if member.has_enough == (goal < 0)]
    rest = _change(members, found, first, goal, largest_change)
    if abs(rest) >= abs(goal):
        _change(members, found, list(members), rest, largest_change)
    return found


def _change(
    members: Mapping[VmId, Member],
    found: dict[VmId, int],
    vms: Sequence[VmId],
    amount: int,
    largest_change: int,
) -> int:
    """Change ``vms`` by ``amount`` in all; return the rest.

    Beyond its minimum each gets a part by shares. What a limit excludes is divided in another round.
    """
    rest = amount
    settled: set[VmId] = set()
    again = True
    while rest and again:
        again = False
        left = [vm for vm in vms if vm not in settled]
        above_minimum = rest + sum(found.get(vm, members[vm].balloon) - members[vm].minimum for vm in left)
        shares = sum(members[vm].shares for vm in left)
        changed, moved = 0, 0
        for vm in left:
            member = members[vm]
            part = member.minimum + int(above_minimum / shares * member.shares)
            wanted = max(member.minimum, min(member.maximum, part))
            again = again or wanted != part
            if amount > 0 and wanted > member.balloon:
                new = min(wanted, member.balloon + largest_change)
            elif wanted < member.balloon:
                new = max(wanted, member.balloon - largest_change)
            else:
                settled.add(vm)
                continue
            change = new - found.get(vm, member.balloon)
            found[vm] = new
            if change:
                changed += change
                moved += 1
                again = True
        rest -= changed
        again = again and moved > 0
    return rest


def _takes_part(guest: GuestSnapshot) -> bool:
    return guest.mode == "auto" and guest.answers and guest.driver_up and not guest.migrating


def _member(guest: GuestSnapshot) -> Member:
    free = guest.sample.stats.free if guest.sample else None
    return Member(guest.actual, guest.floor, guest.ceiling, free, guest.shares)
