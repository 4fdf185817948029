"""Distrust of guests that win memory by an emergency and do not use it. Pure.

A guest can touch memory only to claim it: its RSS confirms the claim, it is relieved at once, and then it
frees what it touched. A claim is the time from an emergency until ten seconds after it. It is unused if held
falls within that time by half of what the guest was given. The first unused claims change nothing, because an
honest guest may have a short burst. After more of them its emergencies are not urgent, its mean of held
memory counts, and it is moved no more often than every ten seconds, until the distrust has faded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from qmpballoon.units import MIB

USED_FOR_S: Final = 10.0  # memory that is held for longer was needed
LEAST_GIVEN: Final = 8 * MIB  # during a claim; less is not worth counting
LEAST_UNUSED: Final = 16 * MIB
BELIEVED: Final = 3.0  # unused claims without an effect
MOST: Final = 8.0
FADES_PER_S: Final = 1 / 60
PACE_S: Final = 10.0  # between two moves of a guest whose claims are not believed


@dataclass(frozen=True, slots=True)
class Claims:
    """The claim that a guest makes now, if any, and how many it did not use; sizes in bytes."""

    claimed_at_s: float | None = None  # the last emergency of the claim
    before: int = 0  # the smallest actual during it
    held: int = 0  # the most that was held since then
    actual: int = 0  # the largest since then
    unused: float = 0.0  # at ``at_s``
    at_s: float = 0.0

    def unused_at(self, now_s: float) -> float:
        """Return the number of unused claims, faded until now."""
        return max(0.0, self.unused - FADES_PER_S * (now_s - self.at_s))

    def are_believed(self, now_s: float) -> bool:
        """Tell whether the guest's emergencies are urgent."""
        return self.unused <= BELIEVED or self.unused_at(now_s) <= BELIEVED


def noted(claims: Claims, now_s: float, *, held: int, actual: int, emergency: bool) -> Claims:
    """Return the claims after this tick."""
    if claims.claimed_at_s is None:
        if not emergency:
            return claims
        return replace(claims, claimed_at_s=now_s, before=actual, held=held, actual=actual)
    if claims.actual - claims.before >= LEAST_GIVEN and claims.held - held >= _unused(claims):
        return Claims(unused=min(MOST, claims.unused_at(now_s) + 1), at_s=now_s)
    if not emergency and now_s - claims.claimed_at_s >= USED_FOR_S:
        return replace(claims, claimed_at_s=None)
    if actual < claims.before:  # it was shrunk; only what it gets after that counts
        return replace(claims, before=actual, held=held, actual=actual)
    if not emergency and held <= claims.held and actual <= claims.actual:
        return claims
    return replace(
        claims,
        claimed_at_s=now_s if emergency else claims.claimed_at_s,
        held=max(claims.held, held),
        actual=max(claims.actual, actual),
    )


def _unused(claims: Claims) -> int:
    """Return the fall of held memory at which the claim was not used, in bytes."""
    return max(LEAST_UNUSED, (claims.actual - claims.before) // 2)
