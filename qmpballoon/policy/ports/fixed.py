"""``fixed``: a static split of the budget by shares, within the limits; needs are ignored."""

from __future__ import annotations

from dataclasses import dataclass, field

from qmpballoon.model.names import VmId
from qmpballoon.policy.sharing import Claim, split
from qmpballoon.policy.snapshot import Decision, Decisions, GuestSnapshot, Hold, SetTarget, Snapshot


@dataclass(frozen=True, slots=True)
class FixedState:
    """The VMs among which the budget was split, and the part of each in bytes."""

    names: frozenset[VmId] = frozenset()
    targets: dict[VmId, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Fixed:
    """Splits the budget again only when the set of VMs changes; shrinks come before grows."""

    @property
    def name(self) -> str:
        """The stable name."""
        return "fixed"

    def start(self) -> FixedState:
        """Return the state before the first tick."""
        return FixedState()

    def step(self, state: FixedState, snapshot: Snapshot) -> tuple[FixedState, Decisions]:
        """Return a target for each VM whose target is not its part yet."""
        names = frozenset(guest.id for guest in snapshot.guests)
        if names != state.names:
            state = FixedState(names, _static_split(snapshot))
        decisions: dict[VmId, Decision] = {}
        free = snapshot.budget - snapshot.charged
        for guest in sorted(snapshot.guests, key=lambda guest: _growth(guest, state)):
            target = state.targets.get(guest.id) if guest.driver_up else None
            if target is None or target == guest.target or (guest.target is None and target == guest.actual):
                continue
            growth = _growth(guest, state)
            if growth > max(0, free):
                decisions[guest.id] = Hold("waits-for-shrinks")
                continue
            free -= max(0, growth)
            decisions[guest.id] = SetTarget(target, "static-split")
        return state, decisions


def _static_split(snapshot: Snapshot) -> dict[VmId, int]:
    ours = [guest for guest in snapshot.guests if guest.mode == "auto"]
    others = sum(guest.charge for guest in snapshot.guests if guest.mode != "auto")
    claims = [Claim(guest.floor, guest.ceiling, guest.shares) for guest in ours]
    parts = split(snapshot.budget - others, claims)
    return {guest.id: part for guest, part in zip(ours, parts, strict=True)}


def _growth(guest: GuestSnapshot, state: FixedState) -> int:
    return state.targets.get(guest.id, guest.charge) - guest.charge
