"""Dividing an amount of memory by shares within limits: the water-fill. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmpballoon.units import PAGE


@dataclass(frozen=True, slots=True)
class Claim:
    """What one VM may get of an amount, in bytes: from ``least`` to ``most``, by ``shares``."""

    least: int
    most: int
    shares: int = 1000


def split(amount: int, claims: Sequence[Claim]) -> list[int]:
    """Return what each claim gets of ``amount`` bytes, in the order of the claims.

    All that is not held back by a limit gets the same number of bytes per share, in whole pages. If the
    least of all is more than the amount each gets its least; what nobody may take is left over.
    """
    given = sum(claim.least for claim in claims)
    if given >= amount:
        return [claim.least for claim in claims]
    bends = sorted(
        bend
        for claim in claims
        if claim.most > claim.least
        for bend in ((claim.least / claim.shares, claim.shares), (claim.most / claim.shares, -claim.shares))
    )
    level, filled, rising = 0.0, float(given), 0  # bytes per share; bytes; shares that rise with the level
    for bend, change in bends:
        step = (bend - level) * rising
        if filled + step >= amount:
            level += (amount - filled) / rising
            break
        level, filled, rising = bend, filled + step, rising + change
    else:
        return [max(claim.least, claim.most) for claim in claims]
    return [max(claim.least, min(claim.most, int(level * claim.shares) // PAGE * PAGE)) for claim in claims]
