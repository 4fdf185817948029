"""Safety checks around every policy and manual control: which moves are safe, and in which order. Pure.

It blocks moves of guests that cannot follow or must not be moved (see ``cooperation``), relieves emergencies
under every policy, and enforces the budget. Shrinks are sent at once. Ordinary grows get free memory only.
Emergencies also get the pending shrinks of other guests and, on an overloaded host, a loan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Generic

from qmpballoon.model.names import VmId
from qmpballoon.policy.allocation import MARGIN, clear_of_emergency, with_margin, within_budget
from qmpballoon.policy.cooperation import LATE_TICK_S, PROBE, Cooperation, Judgement, Safeties, judge
from qmpballoon.policy.estimate import EstimateRules, Past, estimate, observe
from qmpballoon.policy.sharing import Claim, split
from qmpballoon.policy.snapshot import (
    Decision,
    Decisions,
    Estimate,
    GuardView,
    GuestSnapshot,
    Hold,
    Policy,
    S,
    SetTarget,
    Snapshot,
    replaced,
)
from qmpballoon.units import MIB, PAGE

BOOT_BALLOON: Final = MIB  # left in a booting guest's balloon
FLOOR_STEPS: Final = 32  # floors are lowered in steps of size / 32: smaller steps cost commands


@dataclass(frozen=True, slots=True)
class GuardState(Generic[S]):
    """The policy's state, the state and history of each guest, and the last judgements."""

    inner: S
    cooperation: Mapping[VmId, Cooperation] = field(default_factory=dict)
    pasts: Mapping[VmId, Past] = field(default_factory=dict)
    judgements: Mapping[VmId, Judgement] = field(default_factory=dict)
    stale_before_s: float = float("-inf")
    lent: int = 0  # bytes beyond the budget that are lent to guests in an emergency


@dataclass(frozen=True, slots=True)
class Guard(Generic[S]):
    """A policy with the guard around it; the switches are for tests only."""

    policy: Policy[S]
    safeties: Safeties = field(default_factory=Safeties)
    rules: EstimateRules = field(default_factory=EstimateRules)

    @property
    def name(self) -> str:
        """The name of the policy."""
        return self.policy.name

    def start(self) -> GuardState[S]:
        """Return the state before the first tick."""
        return GuardState(self.policy.start())

    def step(self, state: GuardState[S], snapshot: Snapshot) -> tuple[GuardState[S], Decisions]:
        """Return the next state and what to do."""
        now_s = snapshot.now_s
        stale_before_s = now_s if snapshot.elapsed_s > LATE_TICK_S else state.stale_before_s
        cooperation, judgements, pasts = {}, {}, {}
        for guest in snapshot.guests:
            cooperation[guest.id], judgements[guest.id] = judge(
                state.cooperation.get(guest.id),
                guest,
                now_s,
                stale_before_s=stale_before_s,
                safeties=self.safeties,
            )
            past = observe(state.pasts.get(guest.id), guest, now_s, self.rules)
            if past is not None:
                pasts[guest.id] = past
        snapshot = _with_floors_that_fit(snapshot, pasts)
        seen = replace(
            snapshot,
            guests=tuple(
                _judged_guest(
                    guest,
                    judgements[guest.id],
                    cooperation[guest.id].asked_at_s,
                    pasts.get(guest.id),
                    now_s,
                    self.rules,
                )
                for guest in snapshot.guests
            ),
        )
        inner, requested = self.policy.step(state.inner, seen)
        requested = {
            guest.id: self._allowed(guest, snapshot.guests[index].mode, judgements[guest.id], requested, seen)
            for index, guest in enumerate(seen.guests)
        }
        decisions, lent = within_budget(requested, seen, enforce=self.safeties.enforce_budget)
        after = GuardState(inner, cooperation, pasts, judgements, stale_before_s, lent)
        return after, decisions

    def _allowed(
        self,
        guest: GuestSnapshot,
        mode: str,
        judgement: Judgement,
        requested: Decisions,
        snapshot: Snapshot,
    ) -> Decision:
        """Return the policy's decision as far as the guest's state allows it.

        ``mode`` is the guest's own mode; the policy may have seen another one.
        """
        if mode == "observe" and not (judgement.set_back or judgement.why):
            return requested.get(guest.id, Hold("observe"))  # is published; the governor does not send it
        if judgement.why == "booting" and guest.answers and guest.mode == "auto":
            return self._hold_at_ceiling(guest)
        if not judgement.may_grow and not judgement.set_back:
            return Hold(judgement.why or "held")
        relieved = self._relief(guest, judgement) if mode != "observe" else None
        if relieved is not None:
            decision = requested.get(guest.id)
            more = (
                isinstance(decision, SetTarget)
                and guest.mode == "auto"
                and decision.target >= relieved.target
            )
            return decision if more and decision is not None else relieved
        if mode != "auto":
            return Hold(mode)
        if judgement.awaits:
            return Hold(judgement.why or "awaits-figures")
        if judgement.proportional and not judgement.emergency_only:
            target = max(guest.actual, guest.clamp(proportional(guest, snapshot)))
            if target > guest.highest + MARGIN:
                return SetTarget(target, judgement.why or "proportional")
        if _is_target_unreachable(guest, judgement):
            return SetTarget(guest.actual, judgement.why or "set-back")
        if guest.mode != "auto":
            return Hold(judgement.why or guest.mode)
        decision = requested.get(guest.id, Hold("no-decision"))
        if isinstance(decision, Hold):
            return Hold(judgement.why) if judgement.why else decision
        if decision.target < guest.actual:
            return self._shrink(guest, judgement, decision)
        return decision

    def _hold_at_ceiling(self, guest: GuestSnapshot) -> Decision:
        """Raise a booting guest's target, so that its driver does not shrink it to the old target.

        The target is slightly below the size: a driver without work never writes ``actual``, and QEMU would
        report the old value indefinitely. Seen with QEMU 7.2 and Linux 6.1.
        """
        most = guest.size - BOOT_BALLOON
        target = min(guest.ceiling, most)
        if guest.target == guest.size != guest.actual:  # ``actual`` is of before a reset; not shrunk either
            return SetTarget(max(target, min(guest.actual, most)), "booting")
        if guest.target is None or guest.target >= target:
            return Hold("booting")
        return SetTarget(target, "booting")

    def _relief(self, guest: GuestSnapshot, judgement: Judgement) -> SetTarget | None:
        """Return the grow that an emergency needs, whatever the mode; None if there is none."""
        known = guest.estimate
        if not self.safeties.emergencies or known is None or not known.emergency:
            return None
        target = min(guest.ceiling, max(known.held * 3 // 2, known.held + 2 * guest.critical))
        if judgement.emergency_only:  # until its balloon moves again
            target = min(target, guest.actual + PROBE)
        if target - guest.highest < guest.least_relief:
            return None
        return SetTarget(target, _why(known), urgent=True)

    def _shrink(self, guest: GuestSnapshot, judgement: Judgement, decision: SetTarget) -> Decision:
        if not judgement.may_shrink:
            return Hold(judgement.why or "held")
        least = guest.floor
        if self.safeties.emergencies and guest.estimate is not None:
            held = guest.estimate.held
            least = max(least, with_margin(held), held + clear_of_emergency(guest))
        if judgement.probe:
            least = max(least, guest.actual - PROBE)
        target = max(decision.target, least)
        if target >= min(guest.actual, guest.target or guest.actual):
            return Hold(judgement.why or "nothing-left")
        return replace(decision, target=target, why="probe" if judgement.probe else decision.why)


def _with_floors_that_fit(snapshot: Snapshot, pasts: Mapping[VmId, Past]) -> Snapshot:
    """Return the host; if the sum of floors exceeds the budget, all floors are lowered by the same part.

    No floor is lowered below what its guest holds.
    """
    if sum(guest.floor for guest in snapshot.guests) <= snapshot.budget:
        return snapshot
    claims = [
        Claim(least=min(guest.floor, _held(guest, pasts.get(guest.id))), most=guest.floor, shares=guest.floor)
        for guest in snapshot.guests
    ]
    lowered = (
        replace(guest, floor=max(PAGE, floor - floor % max(PAGE, guest.size // FLOOR_STEPS)))
        for guest, floor in zip(snapshot.guests, split(snapshot.budget, claims), strict=True)
    )
    return replace(snapshot, guests=tuple(lowered))


def _held(guest: GuestSnapshot, past: Past | None) -> int:
    return guest.floor if past is None else with_margin(past.held)


def as_charged(snapshot: Snapshot, state: GuardState[S]) -> Snapshot:
    """Return the host with the charges that the judgements of the last step require."""
    guests = (
        replace(guest, charge_at_least=max(guest.charge_at_least, judgement.charge))
        if (judgement := state.judgements.get(guest.id)) is not None and judgement.charge is not None
        else guest
        for guest in snapshot.guests
    )
    return replace(snapshot, guests=tuple(guests))


def _judged_guest(
    guest: GuestSnapshot,
    judgement: Judgement,
    asked_at_s: float,
    past: Past | None,
    now_s: float,
    rules: EstimateRules,
) -> GuestSnapshot:
    """Return the guest as the policy sees it."""
    return replaced(
        guest,
        mode=guest.mode if _may_be_moved(guest, judgement) else "manual",
        sample=None if judgement.proportional else guest.sample,
        guard=GuardView(
            estimate=estimate(past, guest, now_s, rules) if past is not None and guest.driver_up else None,
            asked_at_s=asked_at_s,
            gives_at_most=PROBE if judgement.probe else None if judgement.may_shrink else 0,
        ),
        charge_at_least=max(guest.charge_at_least, judgement.charge or 0),
    )


def _why(estimate: Estimate) -> str:
    """Return the reason of a relief; after its beginning an emergency eases until the guest is safe."""
    return "emergency" if estimate.acute else "thin" if estimate.thin else "grow"


def _is_target_unreachable(guest: GuestSnapshot, judgement: Judgement) -> bool:
    if guest.target is None or not judgement.set_back:
        return False
    # A grow of at most PROBE stays: it costs little, and shows when the balloon moves again.
    return guest.target < guest.actual or (judgement.emergency_only and guest.target > guest.actual + PROBE)


def _may_be_moved(guest: GuestSnapshot, judgement: Judgement) -> bool:
    if not guest.driver_up:
        return True
    return judgement.may_grow and not judgement.emergency_only and not judgement.awaits


def proportional(guest: GuestSnapshot, snapshot: Snapshot) -> int:
    """Return the guest's size if all had the same part of their range, in bytes."""
    floors = sum(other.floor for other in snapshot.guests)
    ranges = sum(other.ceiling - other.floor for other in snapshot.guests)
    part = min(1.0, max(0.0, (snapshot.budget - floors) / ranges)) if ranges else 1.0
    return guest.floor + int(part * (guest.ceiling - guest.floor))
