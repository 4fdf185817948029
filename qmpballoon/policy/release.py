"""How far the automatic guests may grow when nobody rules them any more: a clean stop of the agent. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from qmpballoon.model.names import VmId
from qmpballoon.model.tolerance import is_reached
from qmpballoon.policy.sharing import water_fill
from qmpballoon.policy.snapshot import GuestSnapshot, Snapshot
from qmpballoon.units import round_up_to_page


def released(host: Snapshot) -> Mapping[VmId, int]:
    """Return the targets in bytes of those that may grow, within what the host has beyond its reserve."""
    if host.mem_available is None:
        return {}
    guests = {guest.id: guest for guest in host.guests if _may_grow(guest)}
    requested = {vm: guest.ceiling - guest.charge for vm, guest in guests.items()}
    shares = {vm: guest.shares for vm, guest in guests.items()}
    gets = water_fill(requested, shares, host.mem_available - host.reserve)
    return {
        vm: round_up_to_page(guest.charge + gets[vm])
        for vm, guest in guests.items()
        if not is_reached(guest.charge + gets[vm], _least(guest), guest.size)
    }


def _may_grow(guest: GuestSnapshot) -> bool:
    is_running = guest.answers and guest.run_state == "running" and not guest.migrating
    return guest.mode == "auto" and guest.driver_up and is_running


def _least(guest: GuestSnapshot) -> int:
    """Return the smaller one of actual and target: the guest may be on its way there."""
    return guest.actual if guest.target is None else min(guest.actual, guest.target)
