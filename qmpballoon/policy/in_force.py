"""The reason that is in force for a VM: of its last move or hold, until its cause is over. Pure.

A move's reason is in force at once, and so is a problem's. The reason of any other hold follows when the move
is complete and its cause is over, but not before the reason has stood long enough to be seen: otherwise a
guest that is moved every second would change its reason at each tick.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

STANDS_S: Final = 2.0  # more than the shortest time between two published states
UNDER_WAY_FOR_S: Final = 30.0  # a move that takes longer is no reason any more


@dataclass(frozen=True, slots=True)
class Reason:
    """A stable word, and the mode of the VM to which it belongs."""

    why: str
    mode: str
    since: datetime  # wall-clock time from which this word is in force
    given_at_s: float  # monotonic time of the last decision with this word that changed something
    moves: bool = False  # of a target that was sent


def given(before: Reason | None, after: Reason) -> Reason:
    """Return the reason in force after a decision: the same word is in force since it was first given."""
    if before is None or (before.why, before.mode) != (after.why, after.mode):
        return after
    return replace(after, since=before.since)


def of_mode(mode: str, since: datetime, now_s: float) -> Reason:
    """Return the reason after a change of the mode, until the next decision."""
    if mode == "auto":
        return Reason(why="no-decision", mode=mode, since=since, given_at_s=now_s)
    return Reason(mode, mode, since, now_s)


def stands_until_s(reason: Reason) -> float:
    """Return the monotonic time until which a hold's reason does not follow."""
    return reason.given_at_s + STANDS_S


def is_over(reason: Reason | None, now_s: float, *, is_relieved: bool, is_at_target: bool) -> bool:
    """Tell whether a hold's reason may follow now.

    ``is_relieved``: no emergency of the guest lasts. A manual target stays as an emergency raised it, and so
    does the reason, until half of the guest's memory is available.
    """
    if reason is None or reason.why == "no-decision":
        return True
    if now_s < stands_until_s(reason):
        return False
    if reason.why == "emergency":
        return is_relieved
    return not reason.moves or is_at_target or now_s - reason.given_at_s >= UNDER_WAY_FOR_S
