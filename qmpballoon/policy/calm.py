"""While nothing that a step depends on has changed, it need not be made again. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from operator import is_
from typing import Final

from qmpballoon.policy.cooperation import LATE_TICK_S
from qmpballoon.policy.snapshot import Snapshot
from qmpballoon.units import MIB

STEP_EVERY_S: Final = 10.0  # while nothing moves
_LITTLE: Final = 16 * MIB  # of the host's available memory


@dataclass(frozen=True, slots=True)
class CalmStep:
    """The host as the last step saw it, which decided to move no guest."""

    snapshot: Snapshot
    healths: tuple[str, ...]  # of all VMs; time alone changes some: a grace is over, a guest is stale

    def holds_for(self, now: Snapshot, healths: tuple[str, ...]) -> bool:
        """Tell whether a step would decide the same now: nothing moved, and little time has passed.

        A guest whose facts are the same is the same object. What else depends on time alone (back-offs, the
        decay of a trend) waits until the next full step.
        """
        before = self.snapshot
        moved = (before.mem_available or 0) - (now.mem_available or 0)
        return (
            now.now_s - before.now_s < STEP_EVERY_S
            and now.elapsed_s <= LATE_TICK_S
            and healths == self.healths
            and len(now.guests) == len(before.guests)
            and all(map(is_, now.guests, before.guests))
            and (now.budget, now.reserve, now.held_back, now.overload, now.mem_total)
            == (before.budget, before.reserve, before.held_back, before.overload, before.mem_total)
            and abs(moved) <= max(_LITTLE, (before.mem_available or 0) // 100)
            and (now.mem_available is None) == (before.mem_available is None)
        )
