"""``mom``: the balloon rules of oVirt's Memory Overcommitment Manager.

Follows oVirt/mom, ``doc/balloon.rules`` (commit e0f3d3b) and the intervals of ``doc/mom-balloon.conf``.

Figures are taken every 5 s and averaged over ten, decisions are made every 10 s. When less than 20 % of
the host is free every guest shrinks, by 5 % at most, down to what it uses and a part of its size that
falls with the host's free memory. Otherwise every guest grows by 5 %, or at once to what it uses and a
fifth more. Here the budget stands for the 80 % of the host that may be used. Page cache counts as used,
shares are ignored, and a starving guest does not grow while the host is short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from qmpballoon.model.names import VmId
from qmpballoon.policy.snapshot import Decisions, GuestSnapshot, SetTarget, Snapshot

MONITOR_S: Final = 5.0
POLICY_S: Final = 10.0
HISTORY: Final = 10  # samples that are averaged

PRESSURE: Final = 0.20  # of the host free: below it guests shrink
CRITICAL: Final = 0.05  # of the host free: at it guests are made to swap
GUEST_FREE: Final = 0.20  # of its size that an unconstrained guest keeps free
LARGEST_CHANGE: Final = 0.05  # of the size
DEAD_BAND: Final = 0.0025  # of the size


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample of a guest, in bytes."""

    balloon: int
    unused: int


@dataclass(frozen=True, slots=True)
class MomState:
    """The histories, newest last, and the times of the next sample and decision."""

    next_monitor_s: float = float("-inf")
    next_policy_s: float = float("-inf")
    host_free: tuple[float, ...] = ()  # fractions
    guests: Mapping[VmId, tuple[Sample, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mom:
    """The policy."""

    @property
    def name(self) -> str:
        """The stable name."""
        return "mom"

    def start(self) -> MomState:
        """Return the state before the first tick."""
        return MomState()

    def step(self, state: MomState, snapshot: Snapshot) -> tuple[MomState, Decisions]:
        """Take a sample and decide, each if it is due."""
        if snapshot.now_s >= state.next_monitor_s:
            state = _monitored(state, snapshot)
        if snapshot.now_s < state.next_policy_s:
            return state, {}
        free = _mean(state.host_free)
        decisions = {}
        for guest in snapshot.guests:
            history = state.guests.get(guest.id, ())
            if not history or guest.mode != "auto" or not guest.answers or not guest.driver_up:
                continue
            used = _mean([sample.balloon for sample in history]) - _mean(
                [sample.unused for sample in history]
            )
            shrinks = free < PRESSURE
            target = (
                shrunk(guest.actual, guest.floor, used, free)
                if shrinks
                else grown(guest.actual, guest.floor, guest.ceiling, used)
            )
            if target is not None:
                decisions[guest.id] = SetTarget(target, "host-pressure" if shrinks else "no-host-pressure")
        state = MomState(state.next_monitor_s, snapshot.now_s + POLICY_S, state.host_free, state.guests)
        return state, decisions


def shrunk(balloon: int, floor: int, used: float, host_free: float) -> int | None:
    """Return the smaller size in bytes of a guest of size ``balloon``, None to leave it.

    ``used`` in bytes and ``host_free``, a fraction, are averages.
    """
    keeps = host_free - 0.05 if host_free <= CRITICAL else GUEST_FREE * host_free / PRESSURE
    size = max(balloon * (1 - LARGEST_CHANGE), floor, used + keeps * balloon)
    return int(size) if size <= balloon and _is_enough(balloon, size) else None


def grown(balloon: int, floor: int, ceiling: int, used: float) -> int | None:
    """Return the larger size in bytes of a guest of size ``balloon``, None to leave it."""
    if balloon >= ceiling:
        return None
    size = min(ceiling, max(balloon * (1 + LARGEST_CHANGE), floor, used + GUEST_FREE * balloon))
    return int(size) if _is_enough(balloon, size) else None


def _is_enough(balloon: int, size: float) -> bool:
    return abs(size - balloon) > DEAD_BAND * balloon


def _monitored(state: MomState, snapshot: Snapshot) -> MomState:
    host = (snapshot.budget - snapshot.held_back) / (1 - PRESSURE)
    free = (host - snapshot.charged) / host if host > 0 else 0.0
    guests = {}
    for guest in snapshot.guests:
        sample = _sample(guest)
        if sample is not None:
            guests[guest.id] = (*state.guests.get(guest.id, ()), sample)[-HISTORY:]
    host_free = (*state.host_free, free)[-HISTORY:]
    return MomState(snapshot.now_s + MONITOR_S, state.next_policy_s, host_free, guests)


def _sample(guest: GuestSnapshot) -> Sample | None:
    unused = guest.sample.stats.free if guest.sample else None
    return None if unused is None or not guest.driver_up else Sample(guest.actual, unused)


def _mean(values: tuple[float, ...] | list[int]) -> float:
    return sum(values) / len(values) if values else 0.0
